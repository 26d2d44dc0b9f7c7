"""The stages of a run: when its teacher is asked and its student rounded, a program for each."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxdistill import methods, rules
from jaxdistill.compress import quantize
from jaxdistill.config import quantize as bits
from jaxdistill.config.models import Student, Teacher
from jaxdistill.errors import ConfigError
from jaxdistill.models.quantized import Quantization
from jaxdistill.train.step import PerShape
from jaxdistill.types import Mean

# What a stage is by: 1 in the steps that ask the teacher; bits of a weight as the student computes,
# of one that is not rounded 32. A stage that begins is no loss spike.
TEACHER, BITS = "knobs/teacher", "knobs/bits"
_FLOAT = 32


class Stage(NamedTuple):
    """A part of a run whose steps are one program.

    Attributes:
      first: the first of its steps, from 0.
      taught: whether they ask the teacher.
      rounded: how the student's kernels compute; None: as they are.
    """

    first: int
    taught: bool
    rounded: Quantization | None = None

    @property
    def program(self) -> Hashable:
        """What its steps are compiled for."""
        return self.taught, self.rounded

    def told(self, before: "Stage") -> tuple[dict[str, Any], list[str]]:
        """What is new in it, as an event and in words."""
        facts: dict[str, Any] = {}
        words = []
        if self.taught != before.taught:
            facts["teacher"] = self.taught
            asked = "is asked" if self.taught else "is asked no more: cross-entropy alone"
            words.append(f"the teacher {asked}")
        if self.rounded != before.rounded:
            facts["quantize"] = None if self.rounded is None else str(self.rounded)
            words.append(f"the student computes in {self.rounded or 'floating point'}")
        return facts, words


def of(teacher: Teacher | None, student: Student, method: Any, steps: int) -> list[Stage]:
    """The stages of a run, in order; one, where nothing changes.

    Args:
      teacher: its section.
      student: its section.
      method: the options of the method.
      steps: of the run.
    """
    asked = dict(_asked(teacher, method, steps))
    rounded = {first: quantize.of(given) for first, given in bits.stages(student.quantize, steps)}
    stages: list[Stage] = []
    for first in sorted(asked.keys() | rounded.keys()):
        taught = asked[max(step for step in asked if step <= first)]
        stages.append(Stage(first, taught, rounded[max(step for step in rounded if step <= first)]))
    return stages


def _asked(teacher: Teacher | None, method: Any, steps: int) -> list[tuple[int, bool]]:
    """(first step, from 0; whether the teacher is asked from then on) in order."""
    if teacher is None or (teacher.from_ is None and teacher.until is None):
        return [(0, True)]
    if not methods.of(method).needs_teacher(method):  # the control of such a run
        return [(0, True)]
    begin = 0 if teacher.from_ is None else rules.moment(teacher.from_, steps)
    end = steps if teacher.until is None else rules.moment(teacher.until, steps)
    parts = [(0, False)] if begin else []
    return [*parts, (begin, True), *([(end, False)] if end < steps else [])]


def check(parts: Sequence[Stage], method: Any, facts: methods.Facts) -> None:
    """The method works without its teacher in some of the steps.

    Raises:
      ConfigError: where it adapts to what the teacher says, or has stages of its own.
    """
    if all(stage.taught for stage in parts):
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
      programs: the step of each, by `Stage.program`.
      teacher_params: of the teacher.
      tell: called with (number of a step, stage, the one before) when another stage begins with it.
      asked: called before every step with whether it asks the teacher.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        programs: Mapping[Hashable, PerShape],
        teacher_params: Any,
        tell: Callable[[int, Stage, Stage], None],
        asked: Callable[[bool], None],
    ):
        self._stages, self._programs, self._teacher_params = stages, programs, teacher_params
        self._tell, self._asked = tell, asked
        self._knobs = {
            TEACHER: len({stage.taught for stage in stages}) > 1,
            BITS: len({stage.rounded for stage in stages}) > 1,
        }

    def prepare(self, state: Any, batch: Any) -> None:
        """Compiles what is still to come, so that what does not fit is known before training."""
        now = self._at(int(state.step) + 1)
        for stage in self._stages[self._stages.index(now) :]:
            self._programs[stage.program].prepare(state, self._params(stage), batch)

    def __call__(self, number: int, state: Any, batch: Any) -> tuple[Any, dict[str, Mean]]:
        """Step `number`, from 1, of the state before it."""
        stage = self._at(number)
        if number == stage.first + 1 and stage.first:
            self._tell(number, stage, self._at(number - 1))
        self._asked(stage.taught)
        state, means = self._programs[stage.program](state, self._params(stage), batch)
        scheme = None if stage.rounded is None else stage.rounded.scheme
        values = {TEACHER: stage.taught, BITS: _FLOAT if scheme is None else scheme.bits}
        shown = {name: values[name] for name, moves in self._knobs.items() if moves}
        one = {name: Mean(jnp.float32(value), jnp.float32(1)) for name, value in shown.items()}
        return state, {**means, **one}

    def _at(self, number: int) -> Stage:
        return [stage for stage in self._stages if stage.first < number][-1]

    def _params(self, stage: Stage) -> Any:
        return self._teacher_params if stage.taught else None
