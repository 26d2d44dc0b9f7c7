"""The stages of a run: from which step to which its teacher is asked, a program for each."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxdistill import methods, rules
from jaxdistill.config.models import Teacher
from jaxdistill.errors import ConfigError
from jaxdistill.train.step import PerShape
from jaxdistill.types import Mean

KNOB = "knobs/teacher"  # 1 in the steps that ask the teacher; a stage that begins is no loss spike


class Stage(NamedTuple):
    """A part of a run whose steps are one program.

    Attributes:
      first: the first of its steps, from 0.
      taught: whether they ask the teacher.
    """

    first: int
    taught: bool


def of(teacher: Teacher | None, method: Any, steps: int) -> list[Stage]:
    """The stages of a run, in order; one, where the teacher is asked throughout or never.

    Args:
      teacher: its section.
      method: the options of the method.
      steps: of the run.
    """
    if teacher is None or (teacher.from_ is None and teacher.until is None):
        return [Stage(0, True)]
    begin = 0 if teacher.from_ is None else rules.moment(teacher.from_, steps)
    end = steps if teacher.until is None else rules.moment(teacher.until, steps)
    if not methods.of(method).needs_teacher(method):  # the control of such a run
        return [Stage(0, True)]
    parts = [Stage(0, False)] if begin else []
    return [*parts, Stage(begin, True), *([Stage(end, False)] if end < steps else [])]


def check(parts: Sequence[Stage], method: Any, facts: methods.Facts) -> None:
    """The method works without its teacher in some of the steps.

    Raises:
      ConfigError: where it adapts to what the teacher says, or has stages of its own.
    """
    if len(parts) == 1:
        return
    built = methods.build(method, facts)
    adapting = [
        name for name, knob in built.knobs.items() if isinstance(knob, optax.GradientTransformation)
    ]
    why = f"has a knob, {adapting[0]}, that adapts to what the teacher says" if adapting else None
    why = "trains its parts in stages of its own" if built.trained else why
    if why is not None:
        raise ConfigError(
            f"teacher.until, teacher.from: method {method.name} {why}: leave them out, or "
            "take a method whose knobs are numbers or schedules, such as kd"
        )


class Staged:
    """The step of a run by its number: that of its stage, with the teacher's parameters or none.

    Args:
      stages: of the run.
      programs: the step of each, by whether it asks the teacher.
      teacher_params: of the teacher.
      tell: called with (number of a step, stage) when another stage begins with it.
      asked: called before every step with whether it asks the teacher.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        programs: dict[bool, PerShape],
        teacher_params: Any,
        tell: Callable[[int, Stage], None],
        asked: Callable[[bool], None],
    ):
        self._stages, self._programs, self._teacher_params = stages, programs, teacher_params
        self._tell, self._asked = tell, asked

    def prepare(self, state: Any, batch: Any) -> None:
        """Compiles what is still to come, so that what does not fit is known before training."""
        now = self._at(int(state.step) + 1)
        for stage in self._stages[self._stages.index(now) :]:
            self._programs[stage.taught].prepare(state, self._params(stage), batch)

    def __call__(self, number: int, state: Any, batch: Any) -> tuple[Any, dict[str, Mean]]:
        """Step `number`, from 1, of the state before it."""
        stage = self._at(number)
        if number == stage.first + 1 and stage.first:
            self._tell(number, stage)
        self._asked(stage.taught)
        state, means = self._programs[stage.taught](state, self._params(stage), batch)
        if len(self._stages) > 1:
            means = {**means, KNOB: Mean(jnp.float32(stage.taught), jnp.float32(1))}
        return state, means

    def _at(self, number: int) -> Stage:
        return [stage for stage in self._stages if stage.first < number][-1]

    def _params(self, stage: Stage) -> Any:
        return self._teacher_params if stage.taught else None
