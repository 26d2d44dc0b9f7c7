"""Log-probabilities of tokens and sets in rows of logits, and the slopes of what is made of them.

With s the logits of a row, top the largest, and T the temperature,

    x_v = (s_v - top) / T      log_sum = log sum_v e^x_v      log q_v = x_v - log_sum
    log of the mass of a set S = log_mass_S - log_sum,        log_mass_S = log sum_{v in S} e^x_v

top and log_sum stay two numbers: added into one, logits of 300 would cost the log-probabilities
their last five bits. All sums are over the whole vocabulary, whichever devices share it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels.operands import VocabularyShard
from jaxdistill.kernels.statistics import NOTHING, clamp
from jaxdistill.kernels.token_loss import as_column


class Picks(NamedTuple):
    """Cotangents [n, K] of the log-probabilities in K columns, -1 for a column elsewhere."""

    columns: Array
    cotangents: Array


class Mass(NamedTuple):
    """A set of columns in each row, and the cotangent of the log of its share of the mass.

    Attributes:
      inside: bool [n, V], or [1, V] for all rows.
      log_mass: [n].
      cotangent: [n].
    """

    inside: Array
    log_mass: Array
    cotangent: Array


def shifted(s: Array, top: Array, temperature: Any) -> Array:
    """x, [n, V] or [n, K], of logits of that shape."""
    return (s - as_column(top)) / as_column(temperature)


def pick(logits: Array, ids: Array, vocabulary: VocabularyShard) -> tuple[Array, Array]:
    """The clamped logits [n, K] of tokens, 0 for one of no column; and their columns here or -1.

    From logits as they came and clamped after, so that no row is widened for a few of its entries.
    """
    columns = vocabulary.column(ids)
    here = clamp(jnp.take_along_axis(logits, jnp.maximum(columns, 0), axis=1))
    return vocabulary.sum(jnp.where(columns >= 0, here, 0.0)), columns


def inside(columns: Array, width: int) -> Array:
    """Which of `width` columns are among [n, K] of them: bool [n, width]."""
    none = jnp.zeros((len(columns), width), bool)
    return none.at[_rows(columns), _or_beyond(columns, width)].set(True, mode="drop")


def log_mass(
    s: Array, inside: Array, top: Array, temperature: Any, vocabulary: VocabularyShard
) -> Array:
    """log_mass of a set, [n]; -inf for one without columns.

    The set's own largest logit is taken out first, so that no mass is too small.
    """
    own = vocabulary.max(jnp.max(jnp.where(inside, s, NOTHING), axis=1))
    entries = jnp.where(inside, jnp.exp(shifted(s, own, temperature)), 0.0)
    total = vocabulary.sum(jnp.sum(entries, axis=1))
    return (own - top) / temperature + jnp.log(total)


def largest(s: Array, k: int, vocabulary: VocabularyShard) -> tuple[Array, Array]:
    """The k largest logits of each row, descending, and their tokens: [n, k] each.

    Of equal logits the lower token comes first.
    """
    if vocabulary.padded:  # behind an impossible token of another device, whose number it has
        column = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
        s = jnp.where(column < vocabulary.size, s, NOTHING)
    values, columns = jax.lax.top_k(s, min(k, s.shape[1]))
    ids = columns + vocabulary.offset
    if not vocabulary.axes:
        return values, ids
    gather = lambda a: jax.lax.all_gather(a, vocabulary.axes, axis=1, tiled=True)
    values, ids = gather(values), gather(ids)
    best, places = jax.lax.top_k(values, k)
    return best, jnp.take_along_axis(ids, places, axis=1)


def slopes(
    x: Array,
    log_sum: Array,
    *,
    by_log_sum: Array | None = None,
    picks: Picks | None = None,
    masses: Sequence[Mass] = (),
    by_entropy: Array | None = None,
    entropy: Array | None = None,
) -> Array:
    """The slope by x, [n, V], of numbers made of the rows, from their cotangents.

        by a log-probability of column k     onehot_k - q
        by the log of a set's mass           [v in S] q_v / q(S) - q_v
        by log_sum                           q
        by the entropy H                     -q (log q + H)

    Args:
      x: of `shifted`.
      log_sum: [n].
      by_log_sum: cotangent [n] of top / T + log_sum.
      picks: of log-probabilities.
      masses: of sets.
      by_entropy: cotangent [n].
      entropy: [n], where there is a cotangent.
    """
    log_q = x - log_sum[:, None]
    weight = jnp.zeros_like(log_sum) if by_log_sum is None else by_log_sum
    if picks is not None:
        weight = weight - jnp.sum(picks.cotangents, axis=1)
    for mass in masses:
        weight = weight - mass.cotangent
    factor = weight[:, None]
    if by_entropy is not None and entropy is not None:
        # q = 0 where log q is -1e30: the product is an exact 0.
        factor = factor - by_entropy[:, None] * (log_q + entropy[:, None])
    slope = jnp.exp(log_q) * factor
    for mass in masses:
        share = jnp.where(mass.inside, jnp.exp(x - mass.log_mass[:, None]), 0.0)
        slope += share * mass.cotangent[:, None]
    if picks is not None:
        at = _rows(picks.columns), _or_beyond(picks.columns, x.shape[1])
        slope = slope.at[at].add(picks.cotangents, mode="drop")
    return slope


def _rows(columns: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, columns.shape, 0)


def _or_beyond(columns: Array, width: int) -> Array:
    """Columns for a scatter that drops what is beyond the width: -1 would count from the end."""
    return jnp.where(columns < 0, width, columns)
