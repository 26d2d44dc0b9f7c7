"""A group of rows of logits: the answers of each, and the slopes that their cotangents make."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels import logprob_rows
from jaxdistill.kernels import statistics as stats
from jaxdistill.kernels.linear_divergence.chunk import Static
from jaxdistill.kernels.linear_logprobs.outputs import Cotangents, Logprobs, Residuals
from jaxdistill.kernels.logprob_rows import Mass, Picks
from jaxdistill.kernels.measure import measure
from jaxdistill.kernels.operands import Coefficients, VocabularyShard
from jaxdistill.kernels.statistics import LEAD


def answer(
    logits: Array,
    temperature: Any,
    counted: Array,
    ids: Array | None,
    sets: Array | None,
    top_k: int,
    static: Static,
    shard: VocabularyShard,
) -> tuple[Logprobs, Residuals]:
    """The answers of n rows, and what their slopes need.

    Args:
      logits: [n, V] of this device.
      temperature: [] or [n].
      counted: bool [n]; the other rows are 0, and -1 where they would name a token.
      ids: int [n, K], or None.
      sets: bool [V, M], or None.
      top_k: how many of the most likely tokens.
      static: of the call: V of all devices, and the implementation of the statistics.
      shard: the columns here.
    """
    s, vocab = stats.clamp(logits), static.vocabularies[0]
    if static.group < static.chunk:
        # Made once, in the cache, and not in each loop that reads it.
        s = jax.lax.optimization_barrier(s)
    coefficients = Coefficients(jnp.float32(0), temperature)
    measured = measure(
        ("sum_s", "self_s", LEAD),
        {"s": logits},
        {"s": s},
        coefficients,
        static.implementation,
        shard,
    )
    top, total = measured["max_s"], measured["sum_s"]
    log_sum = jnp.log(total)
    entropy = log_sum - measured["self_s"] / total
    of_logits = lambda s: logprob_rows.shifted(s, top, temperature) - log_sum[:, None]
    logprobs = log_masses = masses = top_ids = top_logprobs = None
    if ids is not None:
        logprobs = of_logits(logprob_rows.pick(logits, ids, shard)[0])
        logprobs = jnp.where(ids >= vocab, jnp.nan, jnp.where(ids < 0, 0.0, logprobs))
    if sets is not None:
        masses = jnp.stack(
            [logprob_rows.log_mass(s, inside, top, temperature, shard) for inside in _each(sets)],
            axis=1,
        )
        log_masses = masses - log_sum[:, None]
    if top_k:
        values, top_ids = logprob_rows.largest(s, top_k, shard)
        top_logprobs = of_logits(values)
    # A row of NaN has no place of its largest logit.
    argmax = jnp.clip(-measured[LEAD], 0, vocab - 1).astype(jnp.int32)
    answers = Logprobs(
        logprobs, entropy, top / temperature + log_sum, argmax, log_masses, top_ids, top_logprobs
    )
    none = lambda x: 0.0 if jnp.issubdtype(x.dtype, jnp.floating) else -1
    answers = jax.tree.map(lambda x: _where(counted, x, none(x)), answers)
    return answers, Residuals(top, log_sum, entropy, masses, top_ids)


def slope(
    logits: Array,
    temperature: Any,
    counted: Array,
    ids: Array | None,
    sets: Array | None,
    kept: Residuals,
    cotangents: Cotangents,
    shard: VocabularyShard,
) -> tuple[Array, Array]:
    """d / d logits [n, V] and d / d T [n] of the numbers, each with its cotangent.

    Args are those of `answer`; `kept` is what it kept.
    """
    s = stats.clamp(logits)
    by = Cotangents(*(None if c is None else _where(counted, c, 0.0) for c in cotangents))
    picked = []
    if by.logprobs is not None and ids is not None:
        picked.append((ids, by.logprobs))
    if by.top_logprobs is not None and kept.top_ids is not None:
        picked.append((kept.top_ids, by.top_logprobs))
    picks = None
    if picked:
        tokens, weights = (jnp.concatenate(parts, axis=1) for parts in zip(*picked, strict=True))
        weights = jnp.where(tokens < 0, 0.0, weights)
        picks = Picks(shard.column(tokens), weights)
    masses = []
    if by.log_masses is not None and kept.log_masses is not None and sets is not None:
        for m, inside in enumerate(_each(sets)):
            log_mass = kept.log_masses[:, m]
            empty = log_mass == -jnp.inf
            masses.append(Mass(inside, log_mass, jnp.where(empty, 0.0, by.log_masses[:, m])))
    by_x = logprob_rows.slopes(
        logprob_rows.shifted(s, kept.top, temperature),
        kept.log_sum,
        by_log_sum=by.log_sum_exp,
        picks=picks,
        masses=masses,
        by_entropy=by.entropy,
        entropy=kept.entropy,
    )
    by_x = _where(counted, by_x, 0.0)
    # x = s / T. The slope sums to log_sum_exp's cotangent over a row, so shifted logits serve.
    moved = shard.sum(jnp.sum(by_x * (s - kept.top[:, None]), axis=1))
    if by.log_sum_exp is not None:
        moved += jnp.where(counted, by.log_sum_exp * kept.top, 0.0)
    return by_x / logprob_rows.as_column(temperature), -moved / temperature**2


def _each(sets: Array) -> list[Array]:
    """The columns of each set, bool [1, V]."""
    return [sets[:, m][None, :] for m in range(sets.shape[1])]


def _where(counted: Array, x: Array, other: float | int) -> Array:
    return jnp.where(counted.reshape(-1, *(1,) * (x.ndim - 1)), x, jax.lax.full_like(x, other))
