"""Weights for text of another sampler than the policy that is trained: q_old / mu, bounded."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.losses.pairs import sequence_weights
from jaxdistill.losses.policy import sequence_sum
from jaxdistill.types import Mean

RULES = ("truncate", "mask", "sequence_mask", "geometric_mask")


class SamplerWeights(NamedTuple):
    """A correction and what it cost.

    Attributes:
      weights: float32 [B, L], 0 under the mask's False; a constant to the gradient.
      at_bound: the share of tokens whose ratio the rule cut or dropped.
      mismatch: the mean of exp(d) - 1 - d, d = log q_old - log mu, never negative.
      difference: the mean of |d|.
    """

    weights: Array
    at_bound: Mean
    mismatch: Mean
    difference: Mean


def sampler_weights(
    old_logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    rule: str = "truncate",
    upper: float = 2.0,
    lower: float = 0.0,
    segment_ids: ArrayLike | None = None,
) -> SamplerWeights:
    """Importance weights w = q_old / mu of sampled tokens, bounded by a rule.

        truncate:        min(w, upper)
        mask:            w, and 0 outside [lower, upper]
        sequence_mask:   w, and 0 for sequences whose product of w exceeds upper
        geometric_mask:  min(w, upper), and 0 for sequences whose geometric mean of w lies outside
                         [lower, upper]

    The product over a sequence grows with its length: a mean difference of 0.01 per token is a
    factor of 22,000 after 1,000 tokens. `truncate` has no such cliff.

    Args:
      old_logprobs: [B, L], log q_old of the sampled tokens, by the program that trains.
      sampler_logprobs: [B, L], log mu, of the distribution that was really sampled: temperature and
        filters included.
      mask: bool [B, L], the sampled tokens; what lies under False may be anything.
      rule: one of `RULES`.
      upper: above 1, or 1.
      lower: of the two-sided rules, 0 to 1.
      segment_ids: int [B, L], where several sequences are packed into a row.

    Returns:
      SamplerWeights.

    Raises:
      ConfigError: if shapes differ, or for another rule or bounds out of range.

    Reference: truncation Ionides 2008; Yao et al. 2025 on samplers of language models.
    """
    if rule not in RULES:
        raise ConfigError(f"rule = {rule!r}: must be one of {', '.join(RULES)}")
    if not upper >= 1.0 or not 0.0 <= lower <= 1.0:
        raise ConfigError(f"lower = {lower}, upper = {upper}: must be in [0, 1] and at least 1")
    mask = jnp.asarray(mask).astype(bool)
    old, mu = jnp.asarray(old_logprobs), jnp.asarray(sampler_logprobs)
    if old.shape != mask.shape or mu.shape != mask.shape or mask.ndim != 2:
        raise ConfigError(
            f"sampler_weights: old_logprobs {list(old.shape)}, sampler_logprobs {list(mu.shape)} "
            f"and mask {list(mask.shape)} must have one shape, [B, L]"
        )
    gap = jnp.where(mask, old.astype(jnp.float32) - mu.astype(jnp.float32), 0.0)
    gap = jax.lax.stop_gradient(gap)
    ratio = jnp.exp(gap)
    if rule == "truncate":
        bounded, weights = ratio > upper, jnp.minimum(ratio, upper)
    elif rule == "mask":
        bounded = (ratio > upper) | (ratio < lower)
        weights = jnp.where(bounded, 0.0, ratio)
    elif rule == "sequence_mask":
        bounded = sequence_sum(gap, segment_ids) > jnp.log(upper)
        weights = jnp.where(bounded, 0.0, ratio)
    else:
        mean = jnp.exp(sequence_sum(sequence_weights(mask, segment_ids) * gap, segment_ids))
        dropped = (mean > upper) | (mean < lower)
        bounded = dropped | (ratio > upper)
        weights = jnp.where(dropped, 0.0, jnp.minimum(ratio, upper))
    tokens = mask.sum().astype(jnp.float32)
    over = lambda values: Mean(jnp.where(mask, values, 0.0).sum().astype(jnp.float32), tokens)
    return SamplerWeights(
        jnp.where(mask, weights, 0.0),
        over(bounded),
        over(jnp.expm1(gap) - gap),
        over(jnp.abs(gap)),
    )
