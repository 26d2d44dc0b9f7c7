"""One function per method, all on one page.

An objective is a pair of pure functions, in Optax's manner:

    init(key) -> parameters of its own, trained with the student and dropped at export ({} for most)
    apply(params, student, signal, batch, knobs) -> {name: Mean}

`apply` gets the student's and the teacher's hidden states and heads, never logits, and returns sums
and counts over the batch's counted tokens; the mean named "loss" is optimised, the rest is shown.
`knobs` holds the numbers that may move during a run, by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array

from jaxdistill.kernels.linear_divergence import linear_divergence
from jaxdistill.sharding import current_mesh
from jaxdistill.types import Batch, Mean, Outputs, TeacherSignal

# A bool among the knobs: whether the metrics at T = 1 are wanted; absent, they are.
MONITOR = "monitor"
Apply = Callable[[Any, Outputs, TeacherSignal, Batch, Mapping[str, Array]], dict[str, Mean]]


class Objective(NamedTuple):
    """What a method minimises.

    Attributes:
      init: key -> parameters of its own.
      apply: (params, student, signal, batch, knobs) -> named means, "loss" among them.
      knobs: names that `apply` reads from `knobs`.
      needs_teacher: whether `signal` must hold a teacher.
    """

    init: Callable[[Array], Any]
    apply: Apply
    knobs: tuple[str, ...] = ()
    needs_teacher: bool = True


def kd(
    *,
    vocab: int,
    divergence: str = "forward_kl",
    scale_by_t2: bool = True,
    chunk: int | None = None,
) -> Objective:
    """Knowledge distillation: alpha * CE + (1 - alpha) * T^2 * D(teacher, student).

    Knobs: alpha, temperature.

    Args:
      vocab: how many rows of both heads are real tokens; padded rows behind them are left out.
      divergence: a kind of `kernels.rows.KINDS`; `forward_kl` is KL(teacher || student).
      scale_by_t2: multiply the divergence by T^2.
      chunk: tokens whose logits exist at one time on a device; None chooses.

    Reference: Hinton, Vinyals, Dean 2015, arXiv 1503.02531.
    """

    def apply(params, student, signal, batch, knobs):
        return _from_heads(
            student,
            signal.outputs,
            batch,
            vocab,
            kind=divergence,
            alpha=knobs["alpha"],
            temperature=knobs["temperature"],
            scale_by_t2=scale_by_t2,
            chunk=chunk,
            monitor=knobs.get(MONITOR),
        )

    return Objective(_no_parameters, apply, ("alpha", "temperature"))


def sft(*, vocab: int, chunk: int | None = None) -> Objective:
    """Supervised fine-tuning: cross-entropy of the data, no teacher."""

    def apply(params, student, signal, batch, knobs):
        monitor = knobs.get(MONITOR)
        return _from_heads(student, None, batch, vocab, alpha=1.0, chunk=chunk, monitor=monitor)

    return Objective(_no_parameters, apply, needs_teacher=False)


def _no_parameters(key: Array) -> dict:
    return {}


def _from_heads(
    student: Outputs, teacher: Outputs | None, batch: Batch, vocab: int, **options: Any
) -> dict[str, Mean]:
    """The fused head loss over a batch of rows."""
    bias = lambda outputs: None if outputs.head_bias is None else outputs.head_bias[:vocab]
    if teacher is not None:
        options |= {
            "teacher_hidden": teacher.hidden,
            "teacher_head": teacher.head[:vocab],
            "teacher_bias": bias(teacher),
        }
    total, means = linear_divergence(
        student.hidden,
        student.head[:vocab],
        student_bias=bias(student),
        labels=batch.targets,
        mask=batch.mask,
        reduction="sum",
        mesh=current_mesh(),
        **options,
    )
    count = jax.lax.stop_gradient(means["loss/ce"].count)
    return {"loss": Mean(total, count), **means}


OBJECTIVES: Mapping[str, Callable[..., Objective]] = {"kd": kd, "sft": sft}
