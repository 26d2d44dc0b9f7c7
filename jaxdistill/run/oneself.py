"""A teacher that is the student itself: whose weights it has, and what it reads."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdistill import errors, optim, rules, teachers
from jaxdistill.compress import quantize
from jaxdistill.config import Config
from jaxdistill.config import oneself as options
from jaxdistill.data.privileged import PrivilegedView, phrases
from jaxdistill.data.rendering import read_template
from jaxdistill.models import DecoderConfig, forward_flops_per_token
from jaxdistill.run import states
from jaxdistill.train.state import TrainState, whole


def copies(config: Config) -> bool:
    """Whether the teacher is a copy of the first weights, an argument of the step.

    Beside adapters the frozen model is that already.
    """
    oneself = options.of(config)
    return oneself is not None and oneself.weights == "frozen" and config.student.lora is None


def average_of(config: Config) -> tuple[float, int] | None:
    """(decay, every) of the average that the optimizer keeps; None where there is none."""
    oneself = options.of(config)
    if oneself is None or oneself.weights != "ema":
        return None
    return oneself.ema_decay, oneself.ema_every


def view_of(config: Config, tokenizer: Any) -> PrivilegedView | None:
    """How the teacher's prompts are made; None where it reads what the student reads."""
    oneself, data = options.of(config), config.data
    if oneself is None or oneself.context is None:
        return None
    return PrivilegedView(
        tokenizer,
        options.length(oneself, data.seq_len),
        oneself.context,
        without=oneself.without_context,
        long=oneself.long_context,
        skip_first=oneself.skip_first,
        chat_template=None if data.chat_template is None else read_template(data.chat_template),
        template_kwargs=data.template_kwargs,
        own_kwargs=oneself.template_kwargs,
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


def teacher_of(config: Config, student: DecoderConfig) -> teachers.Teacher:
    """What says what the student itself says of a batch, by its teacher's weights.

    Args:
      config: of the run.
      student: its shape.
    """
    oneself, section = options.of(config), config.student
    assert oneself is not None, "only asked for where it is its own teacher"
    read = weights_of(config)
    itself = teachers.online(
        student,
        compute_dtype=jnp.dtype(section.compute_dtype),
        attention=section.attention,
        aligned=oneself.context is not None,
    )

    def teacher(params: Any, state: TrainState, batch: Any) -> Any:
        weights = read(params, state)
        if section.quantize is not None:  # as the student computes
            weights = quantize.aware(weights, section.quantize)
        return itself(weights, state, batch)

    return teacher


def weights_of(config: Config) -> Callable[[Any, TrainState], Any]:
    """(the step's argument, the state before the step) -> the teacher's parameters."""
    oneself, adapters = options.of(config), states.adapters_of(config.student)
    assert oneself is not None, "only asked for where it is its own teacher"

    def frozen(params: Any, state: TrainState) -> Any:
        return state.frozen if params is None else params

    def averaged(params: Any, state: TrainState) -> Any:
        kept = optim.average(state.opt_state)
        if config.optimizer.offload:
            kept = jax.device_put(kept, jax.memory.Space.Device)
        return whole(kept, state.frozen, adapters)["student"]

    def live(params: Any, state: TrainState) -> Any:
        return whole(state.params, state.frozen, adapters)["student"]

    return {"frozen": frozen, "ema": averaged, "live": live}[oneself.weights]


def flops_per_token(config: Config, student: DecoderConfig) -> float | None:
    """FLOPs of the teacher for each token of the student's rows; None where it is another model."""
    oneself, length = options.of(config), config.data.seq_len
    if oneself is None:
        return None
    theirs = length if oneself.context is None else options.length(oneself, length)
    return forward_flops_per_token(student, theirs) * theirs / length


def rows(view: PrivilegedView | None) -> dict[str, Any]:
    """What `rollouts.rows.rows_of` is told of the teacher's view."""
    if view is None:
        return {}
    return {"second": (view.seq_len, view.codec.pad), "skip": view.skip_first}


def leaks_of(config: Config, tokenizer: Any) -> Callable[[Sequence[np.ndarray]], float] | None:
    """Answers -> the share that speaks in words of the teacher's prompt; None: nobody looks."""
    oneself = options.of(config)
    if oneself is None or oneself.context is None:
        return None
    given = oneself.leak_phrases
    found = phrases(oneself.context) if given == "auto" else [one.lower() for one in given]
    if not found:
        return None

    def share(answers: Sequence[np.ndarray]) -> float:
        texts = [" ".join(tokenizer.decode(one).lower().split()) for one in answers]
        return sum(any(phrase in text for phrase in found) for text in texts) / len(texts)

    return share
