"""The fused head loss over a batch, which most objectives are made of."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

from jaxdistill.kernels.linear_divergence import linear_divergence
from jaxdistill.methods.base import MONITOR
from jaxdistill.sharding import current_mesh
from jaxdistill.types import Batch, Mean, Outputs


def from_heads(
    head: Any,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    knobs: Mapping[str, Array],
    **options: Any,
) -> dict[str, Mean]:
    """The fused head loss over a batch of rows; `options` as `linear_divergence` takes them."""
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
