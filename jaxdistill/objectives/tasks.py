"""Methods of several tasks in one batch: Distilling Step-by-Step."""

import dataclasses
from typing import Unpack

import jax.numpy as jnp
from jax import Array

from jaxdistill.objectives.base import Head, Objective, from_heads, no_parameters
from jaxdistill.types import Batch, Mean


def step_by_step(
    *,
    explains: tuple[int, int],
    label_weight: float = 0.5,
    with_teacher: bool = False,
    **head: Unpack[Head],
) -> Objective:
    """Distilling Step-by-Step: a * L_label + (1 - a) * L_rationale, each the mean of its tokens.

    Own means, over the whole batch, keep long rationales from drowning short labels; the paper's
    L_label + lambda * L_rationale is a = 1 / (1 + lambda). Both tasks are documents of one batch,
    told apart by one token of their prompts. Each token's loss is cross-entropy, or with a teacher
    that of `kd`; knobs are then alpha and temperature.

    Args:
      explains: (place, token): a document with this token there is a rationale, any other a label.
      label_weight: a, 0 to 1.
      with_teacher: add KL(teacher || student) on the same tokens.
      head: see `Head`.

    Reference: Hsieh et al. 2023, arXiv 2305.02301; a is its code's alpha.
    """
    place, token = explains

    def is_rationale(batch: Batch) -> Array:
        index = jnp.arange(batch.tokens.shape[1])[None, :] - batch.positions + place
        index = jnp.clip(index, 0, batch.tokens.shape[1] - 1)
        return jnp.take_along_axis(batch.tokens, index, axis=1) == token

    def prepare(batch: Batch) -> dict[str, Array]:
        counted, rationale = batch.mask.astype(jnp.float32), is_rationale(batch)
        return {
            "label_tokens": jnp.sum(jnp.where(rationale, 0.0, counted)),
            "rationale_tokens": jnp.sum(jnp.where(rationale, counted, 0.0)),
        }

    def apply(params, student, signal, batch, knobs):
        told = knobs if "label_tokens" in knobs else {**knobs, **prepare(batch)}
        labels, rationales = told["label_tokens"], told["rationale_tokens"]
        each = lambda share, count: share * (labels + rationales) / jnp.maximum(count, 1.0)
        weight = jnp.where(
            is_rationale(batch), each(1 - label_weight, rationales), each(label_weight, labels)
        )
        counted = batch.mask.astype(jnp.float32)
        weighed = dataclasses.replace(batch, mask=counted * weight)
        soft = {name: knobs[name] for name in ("alpha", "temperature") if with_teacher}
        means = from_heads(
            head, student, signal.outputs if with_teacher else None, weighed, knobs,
            **(soft or {"alpha": 1.0}),
        )  # fmt: skip
        return means | {"loss": Mean(means["loss"].total, jnp.sum(counted))}

    knobs = ("alpha", "temperature") * with_teacher
    return Objective(no_parameters, apply, knobs, needs_teacher=with_teacher, prepare=prepare)
