"""The fused head loss over a batch, which most objectives are made of."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.errors import ConfigError
from jaxdistill.kernels.linear_divergence import linear_divergence
from jaxdistill.kernels.linear_logprobs import Logprobs, linear_logprobs
from jaxdistill.methods.base import MONITOR
from jaxdistill.sharding import current_mesh
from jaxdistill.types import Batch, Known, Mean, Outputs, TeacherSignal


def from_heads(
    head: Any,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    knobs: Mapping[str, Array],
    known: Known | None = None,
    sparse: str | None = None,
    **options: Any,
) -> dict[str, Mean]:
    """The fused head loss over a batch of rows.

    Args:
      head: see `base.Head`.
      student: its hidden states and head.
      teacher: the same of the teacher; None for cross-entropy alone, or beside `known`.
      batch: the rows.
      knobs: the one that is read is `base.MONITOR`.
      known: what is known of the teacher where there are no hidden states.
      sparse: the kind of `kernels.sparse` that then stands in place of `kind`.
      options: as `linear_divergence` takes them.
    """
    head = dict(head)
    vocab, columns = head.pop("vocab"), head.pop("columns", None)
    bias = lambda outputs: None if outputs.head_bias is None else outputs.head_bias[:vocab]
    if teacher is not None:
        options |= {
            "teacher_hidden": teacher.hidden,
            "teacher_head": teacher.head[:vocab],
            "teacher_bias": bias(teacher),
            "teacher_softcap": teacher.softcap,
        }
        if columns is not None:
            options |= _shared(columns, options)
    elif known is not None:
        options |= {
            "kind": sparse,
            "teacher_ids": known.ids,
            "teacher_logprobs": known.logprobs,
            "teacher_rest": known.rest,
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
    if known is not None and known.entropy is not None:
        means |= _of_draws(means["loss/divergence"], known.entropy, batch)
    count = jax.lax.stop_gradient(means["loss/ce"].count)
    return {"loss": Mean(total, count), **means}


def said(head: Any, outputs: Outputs, batch: Batch, **asked: Any) -> tuple[Array, Array]:
    """(log q, entropy) of a model at the batch's targets, [B, L] each.

    Args:
      head: see `base.Head`.
      outputs: of the model.
      batch: the rows; targets that do not count give 0.
      asked: as `statistics` takes them.
    """
    means = statistics(head, outputs, batch.targets, batch.mask, **asked)
    assert means.logprobs is not None, "of the ids that were given"
    return means.logprobs, means.entropy


def said_by_teacher(head: Any, signal: TeacherSignal, batch: Batch, **asked: Any) -> Array:
    """log p of the teacher at the batch's targets, [B, L]: computed, or as a server said it."""
    if signal.outputs is not None:
        return said(head, signal.outputs, batch, **asked)[0]
    assert signal.known is not None, "what says nothing is no teacher"
    return signal.known.logprobs[..., 0]


def statistics(head: Any, outputs: Outputs, ids: Array, mask: Array, **asked: Any) -> Logprobs:
    """What a model's head says of given tokens, [B, L].

    Args:
      head: see `base.Head`; of its `vocab` rows, whichever model's they are.
      outputs: of the model.
      ids: one token for each position.
      mask: where it is asked for.
      asked: what else, as `linear_logprobs` takes it: temperature, sets, top_k.
    """
    vocab, bias = head["vocab"], outputs.head_bias
    how = {name: value for name, value in head.items() if name not in ("vocab", "columns")}
    return linear_logprobs(
        outputs.hidden,
        outputs.head[:vocab],
        ids,
        mask=mask,
        bias=None if bias is None else bias[:vocab],
        softcap=outputs.softcap,
        mesh=current_mesh(),
        **how | asked,
    )


def _shared(columns: tuple[int, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """What both heads have; a token is the same row in both.

    Raises:
      ConfigError: for a divergence that needs rows of one width.
    """
    kind = options.get("kind", "forward_kl")
    if not isinstance(kind, str) or options.get("taid_t") is not None:
        raise ConfigError(
            "method: this divergence needs every token of the student in the teacher, which lacks "
            "some: use kd, reverse_kd or distillm, or tokenizer.from: teacher"
        )
    rows = np.asarray(columns, np.int32)
    return {"student_columns": rows, "teacher_columns": rows}


def _of_draws(cross_entropy: Mean, entropy: Array, batch: Batch) -> dict[str, Mean]:
    """The KL that drawn tokens estimate without bias: their cross-entropy less the entropy."""
    weights = batch.mask.astype(jnp.float32)
    total = jax.lax.stop_gradient(jnp.sum(jnp.where(weights > 0, weights * entropy, 0.0)))
    return {
        "loss/kl_t1": Mean(cross_entropy.total - total, cross_entropy.count),
        "teacher/entropy": Mean(total, cross_entropy.count),
    }
