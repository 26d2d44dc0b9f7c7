"""The definition of each sparse divergence on whole rows of logits, with JAX's own gradient."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels import rows
from jaxdistill.kernels.sparse import definition
from jaxdistill.kernels.sparse.definition import SparseTeacher
from jaxdistill.kernels.statistics import LOWEST


def divergence(kind: str, logits: Array, known: SparseTeacher) -> Array:
    """D of each row, [...]; float32, or float64 for float64 logits.

    Args:
      kind: a key of `definition.KINDS`.
      logits: the student's, over the temperature, [..., V].
      known: of the teacher, at that temperature.
    """
    entry, vocab = definition.KINDS[kind], logits.shape[-1]
    counts = definition.is_known(known)
    log_q = jax.nn.log_softmax(jnp.maximum(logits, LOWEST))
    ids = jnp.where(counts, known.ids, vocab)
    at = lambda index: jnp.take_along_axis(log_q, index, -1, mode="fill", fill_value=jnp.nan)
    picked = jnp.where(counts, at(jnp.where(counts, known.ids, 0)), 0.0)
    value = jnp.sum(definition.entries(entry, known, counts, picked)[0], axis=-1)
    if entry.ghost:
        others = jnp.where(kept(ids, vocab), LOWEST, log_q)
        rest_q = jax.nn.logsumexp(others, axis=-1)
        value += definition.ghost(definition.rest_of(known, counts, vocab), rest_q)
        value = rows.not_below_zero(value)
    if known.sampled is not None:
        within = lambda log: jnp.sum(jnp.where(counts, jnp.exp(log), 0.0), axis=-1)
        drawn = at(jnp.maximum(known.sampled, 0)[..., None])[..., 0]
        masses = within(picked), within(known.logprobs)
        value += definition.sampled_tail(known, counts, drawn, *masses)
    return value


def kept(ids: Array, vocab: int) -> Array:
    """Which of the V tokens are among [..., K] of them, V or more for none: bool [..., V]."""
    columns = ids.reshape(-1, ids.shape[-1])
    rows = jnp.arange(len(columns))[:, None]
    none = jnp.zeros((len(columns), vocab), bool)
    return none.at[rows, columns].set(True, mode="drop").reshape(*ids.shape[:-1], vocab)
