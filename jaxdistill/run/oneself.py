"""A teacher that is the student itself: whose weights it has, and what it reads."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdistill import errors, optim, rules, teachers
from jaxdistill.compress import quantize
from jaxdistill.config import oneself as options
from jaxdistill.config.data import Data
from jaxdistill.config.models import Student
from jaxdistill.config.oneself import Oneself
from jaxdistill.data.dataset import empty_second
from jaxdistill.data.privileged import PrivilegedView, phrases
from jaxdistill.data.rendering import read_template
from jaxdistill.methods import Objective
from jaxdistill.models import DecoderConfig, forward_flops_per_token
from jaxdistill.run import states
from jaxdistill.run.teaching import Plain, StudentStart, Teaching
from jaxdistill.train.state import TrainState, whole


def copies(given: Oneself | None, student: Student) -> bool:
    """Whether the teacher is a copy of the first weights, an argument of the step.

    Beside adapters the frozen model is that already.
    """
    return given is not None and given.weights == "frozen" and student.lora is None


def average_of(given: Oneself | None) -> tuple[float, int] | None:
    """(decay, every) of the average that the optimizer keeps; None where there is none."""
    if given is None or given.weights != "ema":
        return None
    return given.ema_decay, given.ema_every


def view_of(given: Oneself | None, data: Data, tokenizer: Any) -> PrivilegedView | None:
    """How the teacher's prompts are made; None where it reads what the student reads."""
    if given is None or given.context is None:
        return None
    return PrivilegedView(
        tokenizer,
        options.length(given, data.seq_len),
        given.context,
        without=given.without_context,
        long=given.long_context,
        skip_first=given.skip_first,
        chat_template=None if data.chat_template is None else read_template(data.chat_template),
        template_kwargs=data.template_kwargs,
        own_kwargs=given.template_kwargs,
    )


def check(view: PrivilegedView | None, student: DecoderConfig, mesh: Mesh) -> None:
    """The student reads rows as long as the teacher's view, and each device has whole rows.

    Raises:
      ConfigError: with the numbers.
    """
    if view is None:
        return
    key = "teacher.self.seq_len"
    errors.check(rules.row_length(view.seq_len, "student", student.max_positions, key))
    if mesh.shape["context"] > 1:
        raise errors.ConfigError(
            f"mesh.context = {mesh.shape['context']}: the answers lie elsewhere in the teacher's "
            "rows (teacher.self.context): use 1"
        )


@dataclasses.dataclass(frozen=True)
class Itself(Plain):
    """The student as its own teacher, with its weights of some time.

    Attributes:
      given: its section.
      section: the student's.
      offload: whether the optimizer's state waits in the host's memory.
      model: the student's shape.
      start: a copy of the first weights, where it is one; without parameters until it is made.
    """

    given: Oneself
    section: Student
    offload: bool
    model: DecoderConfig
    start: StudentStart | None

    @property
    def params(self) -> Any:
        return None if self.start is None else self.start.params

    def abstract_params(self, mesh: Mesh) -> Any:
        return None if self.start is None else self.start.abstract_params(mesh)

    def signal(self, objective: Objective | None = None) -> teachers.TeacherFunction:
        itself = teachers.online(
            self.model,
            compute_dtype=jnp.dtype(self.section.compute_dtype),
            attention=self.section.attention,
            aligned=self.given.context is not None,
        )

        def teacher(params: Any, state: TrainState, batch: Any) -> Any:
            weights = self.weights(params, state)
            rounded = quantize.of(self.section.quantize)
            if rounded is not None:  # as the student computes
                weights = quantize.aware(weights, rounded)
            return itself(weights, state, batch)

        return teacher

    def weights(self, params: Any, state: TrainState) -> Any:
        """The teacher's parameters, from the step's argument and the state before the step."""
        adapters = states.adapters_of(self.section)
        if self.given.weights == "frozen":
            return state.frozen if params is None else params
        if self.given.weights == "live":
            return whole(state.params, state.frozen, adapters)["student"]
        kept = optim.average(state.opt_state)
        if self.offload:
            kept = jax.device_put(kept, jax.memory.Space.Device)
        return whole(kept, state.frozen, adapters)["student"]

    def empty(self, length: int, theirs: int) -> dict[str, Any]:
        if self.given.context is None:
            return {}
        return empty_second(length, options.length(self.given, length), 0)

    def flops_per_token(self, length: int, theirs: int) -> float:
        theirs = length if self.given.context is None else options.length(self.given, length)
        return forward_flops_per_token(self.model, theirs) * theirs / length


def rows(view: PrivilegedView | None) -> dict[str, Any]:
    """What `rollouts.rows.rows_of` is told of the teacher's view."""
    if view is None:
        return {}
    return {"second": (view.seq_len, view.codec.pad), "skip": view.skip_first}


def leaks_of(teaching: Teaching, tokenizer: Any) -> Callable[[Sequence[np.ndarray]], float] | None:
    """Answers -> the share that speaks in words of the teacher's prompt; None: nobody looks."""
    if not isinstance(teaching, Itself) or teaching.given.context is None:
        return None
    own = teaching.given.leak_phrases
    wanted = phrases(teaching.given.context) if own == "auto" else [one.lower() for one in own]
    if not wanted:
        return None

    def share(answers: Sequence[np.ndarray]) -> float:
        texts = [" ".join(tokenizer.decode(one).lower().split()) for one in answers]
        return sum(any(phrase in text for phrase in wanted) for text in texts) / len(texts)

    return share
