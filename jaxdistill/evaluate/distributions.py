"""The program that compares next-token distributions with a teacher's and with the text."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.evaluate.meter import CALIBRATION, MeterStep
from jaxdistill.evaluate.scoring import chunk_logits, over_chunks
from jaxdistill.models import DecoderConfig, decoder
from jaxdistill.types import Batch, Mean

BINS = 15


def step(
    config: DecoderConfig,
    teacher: DecoderConfig | None,
    *,
    vocab: int,
    compute_dtype: DTypeLike = jnp.bfloat16,
    columns: tuple[int, ...] | None = None,
) -> MeterStep:
    """step(params, teacher_params, batch, {}) -> named means of a model, beside a teacher or alone.

    Models of one configuration share one compiled program.

    Args:
      config: of the model.
      teacher: of the model to compare with.
      vocab: how many rows of the heads are tokens.
      compute_dtype: dtype of activations.
      columns: the tokens that both have, which are compared; None: all.
    """
    means = functools.partial(_means, config, teacher, vocab, np.dtype(compute_dtype))
    shared = None if columns is None else np.asarray(columns, np.int32)
    return lambda params, teacher_params, batch, knobs: means(params, teacher_params, batch, shared)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _means(
    config: DecoderConfig,
    teacher: DecoderConfig | None,
    vocab: int,
    dtype: DTypeLike,
    params: Any,
    teacher_params: Any,
    batch: Batch,
    columns: Array | None,
) -> dict[str, Mean]:
    """Means over the counted tokens of a batch; one chunk of logits exists at a time.

    Returns:
      loss/ce, student/entropy, and as a total of [15, 3] the calibration: per bin of the highest
      probability the number of tokens, the sum of that probability, and how often that token came.
      With a teacher also what `_compared` returns.
    """
    apply = functools.partial(
        decoder.apply,
        tokens=batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        compute_dtype=dtype,
    )
    student_outputs = apply(config, params)
    teacher_outputs = None if teacher is None else apply(teacher, teacher_params)
    rows, length = batch.tokens.shape

    def sums(hidden_BCD, targets_BC, mask_BC, teacher_BCD):
        weights_BC = mask_BC.astype(jnp.float32)
        q_BCV = chunk_logits(hidden_BCD, student_outputs, vocab)
        logq_BCV = jax.nn.log_softmax(q_BCV, axis=-1)
        picked_BC = jnp.take_along_axis(logq_BCV, targets_BC[..., None], -1)[..., 0]
        values = {"loss/ce": -picked_BC, "student/entropy": _entropy(logq_BCV)}
        if teacher_outputs is not None:
            p_BCV = chunk_logits(teacher_BCD, teacher_outputs, vocab)
            if columns is None:
                values |= _compared(q_BCV, p_BCV, logq_BCV)
            else:
                q_BCS, p_BCS = q_BCV[..., columns], p_BCV[..., columns]
                values |= _compared(q_BCS, p_BCS, jax.nn.log_softmax(q_BCS, axis=-1))
        totals = {name: jnp.sum(value * weights_BC) for name, value in values.items()}
        totals[CALIBRATION] = _bins(logq_BCV, targets_BC, weights_BC)
        return totals, jnp.sum(weights_BC)

    beside = student_outputs.hidden if teacher_outputs is None else teacher_outputs.hidden
    arrays = (student_outputs.hidden, batch.targets, batch.mask, beside)
    parts = over_chunks(sums, rows, vocab, length, *arrays)
    totals, count = jax.tree.map(lambda array: jnp.sum(array, axis=0), parts)
    return {name: Mean(total, count) for name, total in totals.items()}


def _compared(q: Array, p: Array, logq: Array) -> dict[str, Array]:
    """Per token the differences of student and teacher, from logits [B, C, V]: [B, C] each.

    Returns:
      loss/kl_t1 = KL(teacher || student), loss/reverse_kl = KL(student || teacher),
      teacher/entropy, agree/top1 (both have a common most likely token), agree/top5 (share of the
      five most likely that are the same), agree/acceptance = sum_v min(p_v, q_v).
    """
    logp = jax.nn.log_softmax(p, axis=-1)
    several = min(5, logq.shape[-1])
    ours, theirs = jax.lax.top_k(logq, several)[1], jax.lax.top_k(logp, several)[1]
    same = jnp.any(ours[..., :, None] == theirs[..., None, :], axis=-1)
    best_of_q = q == jnp.max(q, axis=-1, keepdims=True)
    best_of_p = p == jnp.max(p, axis=-1, keepdims=True)
    return {
        "loss/kl_t1": _expected(logp, logp - logq),
        "loss/reverse_kl": _expected(logq, logq - logp),
        "teacher/entropy": _entropy(logp),
        "agree/top1": jnp.any(best_of_q & best_of_p, axis=-1).astype(jnp.float32),
        "agree/top5": jnp.mean(same.astype(jnp.float32), axis=-1),
        "agree/acceptance": jnp.sum(jnp.minimum(jnp.exp(logp), jnp.exp(logq)), axis=-1),
    }


def _expected(logp: Array, values: Array) -> Array:
    """sum_v p_v values_v; 0 * (log 0 - x) is 0 in a divergence and NaN in floating point."""
    p = jnp.exp(logp)
    return jnp.sum(jnp.where(p > 0, p * values, 0.0), axis=-1)


def _entropy(logp: Array) -> Array:
    return -_expected(logp, logp)


def _bins(logq_BCV: Array, targets_BC: Array, weights_BC: Array) -> Array:
    """[15, 3] of count, confidence and hits by bins of equal width of the highest probability."""
    confidence_BC = jnp.exp(jnp.max(logq_BCV, axis=-1))
    hit_BC = (jnp.argmax(logq_BCV, axis=-1) == targets_BC).astype(jnp.float32)
    index_BC = jnp.clip(jnp.ceil(confidence_BC * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    inside_BCK = jax.nn.one_hot(index_BC, BINS, dtype=jnp.float32) * weights_BC[..., None]
    each_3BC = jnp.stack([jnp.ones_like(confidence_BC), confidence_BC, hit_BC])
    return jnp.einsum("BCK,ABC->KA", inside_BCK, each_3BC)
