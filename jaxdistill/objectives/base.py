"""What an objective is, and the fused head loss that most of them are made of."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Required, TypedDict

import jax
from jax import Array

from jaxdistill.kernels.linear_divergence import linear_divergence
from jaxdistill.sharding import current_mesh
from jaxdistill.types import Batch, Mean, Outputs, TeacherSignal

# A bool among the knobs: whether the metrics at T = 1 are wanted; absent, they are.
MONITOR = "monitor"
# A mean among an objective's own: what adaptive knobs read instead of the loss.
CONTROL = "control"
Apply = Callable[[Any, Outputs, TeacherSignal, Batch, Mapping[str, Array]], dict[str, Mean]]


class Objective(NamedTuple):
    """What a method minimises.

    Attributes:
      init: key -> parameters of its own.
      apply: (params, student, signal, batch, knobs) -> named means, "loss" among them.
      knobs: names that `apply` reads from `knobs`.
      needs_teacher: whether `signal` must hold a teacher.
      student_taps: layers of the student whose outputs `apply` reads.
      teacher_taps: layers of the teacher.
      student_relations: layers of the student whose queries, keys and values `apply` reads.
      teacher_relations: layers of the teacher.
      prepare: whole batch -> more knobs, made before it is split into micro-batches; or None.
      token_means: whether its metrics are means over tokens; where not, evaluation takes kd's.
    """

    init: Callable[[Array], Any]
    apply: Apply
    knobs: tuple[str, ...] = ()
    needs_teacher: bool = True
    student_taps: tuple[int, ...] = ()
    teacher_taps: tuple[int, ...] = ()
    student_relations: tuple[int, ...] = ()
    teacher_relations: tuple[int, ...] = ()
    prepare: Callable[[Batch], Mapping[str, Array]] | None = None
    token_means: bool = True


class Head(TypedDict, total=False):
    """How the fused head loss is computed; but for rounding the same numbers come out in any case.

    Attributes:
      vocab: how many rows of both heads are real tokens; padded rows behind them are left out.
      chunk: tokens whose logits exist at one time on a device; None chooses.
      implementation: of the row statistics, see `kernels.support`; None chooses.
      logits_dtype: in which logits are kept; None: that of the hidden states.
    """

    vocab: Required[int]
    chunk: int | None
    implementation: str | None
    logits_dtype: str | None


def no_parameters(key: Array) -> dict:
    return {}


def from_heads(
    head: Any,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    knobs: Mapping[str, Array],
    **options: Any,
) -> dict[str, Mean]:
    """The fused head loss over a batch of rows."""
    head = dict(head)
    vocab = head.pop("vocab")
    bias = lambda outputs: None if outputs.head_bias is None else outputs.head_bias[:vocab]
    if teacher is not None:
        options |= {
            "teacher_hidden": teacher.hidden,
            "teacher_head": teacher.head[:vocab],
            "teacher_bias": bias(teacher),
            "teacher_softcap": teacher.softcap,
        }
    total, means = linear_divergence(
        student.hidden,
        student.head[:vocab],
        student_bias=bias(student),
        student_softcap=student.softcap,
        labels=batch.targets,
        mask=batch.mask,
        reduction="sum",
        monitor=knobs.get(MONITOR),
        mesh=current_mesh(),
        **head,
        **options,
    )
    count = jax.lax.stop_gradient(means["loss/ce"].count)
    return {"loss": Mean(total, count), **means}
