"""Policy gradients on sampled text: one clipped loss, of which GRPO to CISPO are the named forms.

Every loss returns a `Mean` whose count is known before the batch is split (tokens, or sequences),
so that the sum over micro-batches and devices, divided once, is the loss of the whole batch.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.losses.pairs import sequence_weights
from jaxdistill.types import Mean

RATIOS = ("token", "sequence", "sequence_token")
PERS = ("sequence", "token", "length")


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a policy loss is computed; `POLICIES` has the published ones.

    Attributes:
      lower: e of the lower clip, ratios below 1 - e stop pushing down.
      upper: e of the upper clip 1 + e. With `detached` the largest weight itself.
      ratio: "token", rho_t = q / q_old; "sequence", the geometric mean of a sequence's, for each
        of its tokens; "sequence_token", the same value, whose gradient goes through each token.
      per: what the loss is a mean of: "sequence" (a mean over the tokens of each first), "token",
        or "length", each sequence's sum divided by the longest length allowed.
      detached: the weight min(rho, upper) is a constant and log q carries the gradient (CISPO).
      bound: the largest ratio that counts where the advantage is negative; None: any.
    """

    lower: float = 0.2
    upper: float = 0.2
    ratio: str = "token"
    per: str = "token"
    detached: bool = False
    bound: float | None = None

    def __post_init__(self) -> None:
        if self.ratio not in RATIOS or self.per not in PERS:
            raise ConfigError(
                f"policy: ratio = {self.ratio!r}, per = {self.per!r}: ratio must be one of "
                f"{', '.join(RATIOS)}, per one of {', '.join(PERS)}"
            )
        if not 0 <= self.lower < 1 or not self.upper > 0:
            raise ConfigError(
                f"policy: lower = {self.lower}, upper = {self.upper}: lower must be in [0, 1), "
                "upper above 0"
            )
        if self.bound is not None and not self.bound > 1 + self.upper:
            raise ConfigError(
                f"policy: bound = {self.bound}: must be above 1 + upper = {1 + self.upper}: the "
                "clip would never act"
            )


POLICIES: Mapping[str, Policy] = {
    "grpo": Policy(per="sequence"),
    "dr_grpo": Policy(per="length"),
    "dapo": Policy(upper=0.28),
    "gspo": Policy(lower=3e-4, upper=4e-4, ratio="sequence", per="sequence"),
    "gspo_token": Policy(lower=3e-4, upper=4e-4, ratio="sequence_token", per="sequence"),
    "cispo": Policy(upper=5.0, detached=True),
}


def policy_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    policy: Policy = POLICIES["dapo"],
    *,
    segment_ids: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    max_length: int | None = None,
) -> dict[str, Mean]:
    """The clipped policy gradient of sampled tokens.

        rho = exp(log q - log q_old)
        loss_t = -w min(rho A, clip(rho, 1 - lower, 1 + upper) A)
        detached:  loss_t = -w sg(min(rho, upper)) A log q

    With rho = 1 everywhere the gradient of each form is that of -A log q (REINFORCE). The mean is
    over sequences, tokens, or sequences of the longest length, as `policy.per` says.

    Args:
      logprobs: [B, L], log q of the sampled tokens under the student that is trained.
      old_logprobs: [B, L], the same before the first update on this batch; no gradient.
      advantages: [B, L], the same number for all tokens of a sequence unless a teacher adds to it;
        no gradient.
      mask: bool [B, L], the tokens that the policy made and that count. What lies under False may
        be anything, NaN too.
      policy: one of `POLICIES`, or one of your own.
      segment_ids: int [B, L], 0 to L, where several sequences are packed into a row; None: each row
        is a sequence.
      weights: [B, L], w, the correction for another sampler (`sampler_weights`); None: 1.
      max_length: tokens that a sequence may have, for `per` "length".

    Returns:
      "loss", and "policy/clip_low" and "policy/clip_high", the shares of tokens at which the lower
      and the upper clip stop the gradient (detached: high is the share at the largest weight).

    Raises:
      ConfigError: if shapes differ, or max_length is missing.

    Reference: GRPO arXiv 2402.03300, Dr.GRPO 2503.20783, DAPO 2503.14476, GSPO 2507.18071, CISPO
    2506.13585, the bound INTELLECT-2 2505.07291.
    """
    mask = jnp.asarray(mask).astype(bool)
    new, old, gain = (_under(mask, values) for values in (logprobs, old_logprobs, advantages))
    old, gain = jax.lax.stop_gradient((old, gain))
    factor = jnp.ones_like(new) if weights is None else jax.lax.stop_gradient(_under(mask, weights))
    rho = jnp.exp(_log_ratio(new, old, mask, policy.ratio, segment_ids))
    if policy.detached:
        values = -jax.lax.stop_gradient(jnp.minimum(rho, policy.upper)) * gain * new
        low, high = jnp.zeros_like(mask), rho > policy.upper
    else:
        free = rho if policy.bound is None else jnp.minimum(rho, policy.bound)
        clipped = jnp.clip(rho, 1.0 - policy.lower, 1.0 + policy.upper)
        values = -jnp.minimum(free * gain, clipped * gain)
        low = (rho < 1.0 - policy.lower) & (gain < 0)
        high = (rho > 1.0 + policy.upper) & (gain > 0)
    tokens = mask.sum().astype(jnp.float32)
    share = lambda where: Mean((where & mask).sum().astype(jnp.float32), tokens)
    loss = per_mean(factor * values, mask, policy.per, segment_ids, max_length)
    return {"loss": loss, "policy/clip_low": share(low), "policy/clip_high": share(high)}


def per_mean(
    values: ArrayLike,
    mask: ArrayLike,
    per: str,
    segment_ids: ArrayLike | None = None,
    max_length: int | None = None,
) -> Mean:
    """The mean of token values over tokens, over sequences, or over sequences of full length.

        token:     sum_t v / N
        sequence:  sum_i mean_t v / B
        length:    sum_i sum_t v / (B max_length)

    Args:
      values: [B, L].
      mask: bool [B, L]; what lies under False may be anything.
      per: one of `PERS`.
      segment_ids: as in `policy_loss`.
      max_length: as in `policy_loss`.

    Returns:
      A Mean. A sequence counts if it has a token under the mask.

    Raises:
      ConfigError: if shapes differ, for another `per`, or if max_length is missing or below 1.
    """
    mask = jnp.asarray(mask).astype(bool)
    values = _under(mask, values)
    each = sequence_weights(mask, segment_ids)  # one over the tokens of the sequence
    if per not in PERS:
        raise ConfigError(f"per = {per!r}: must be one of {', '.join(PERS)}")
    if per == "token":
        return Mean(values.sum(), mask.sum().astype(jnp.float32))
    if per == "sequence":
        return Mean((each * values).sum(), each.sum())
    if max_length is None or max_length < 1:
        raise ConfigError(f"max_length = {max_length}: must be the most tokens a sequence may have")
    return Mean(values.sum() / max_length, each.sum())


def kl_loss(
    logprobs: ArrayLike,
    reference_logprobs: ArrayLike,
    *,
    estimator: str = "k2",
    old_logprobs: ArrayLike | None = None,
) -> Array:
    """A KL to a reference p from sampled tokens, by the gradient that it has.

        l = log p - log q
        k2 = l^2 / 2                   its gradient is, in expectation, that of KL(q || p)
        k3 = exp(l) - 1 - l            that of KL(p || q), although its value estimates KL(q || p)
        ratio_k3 = q / sg(q_old) k3    that of KL(q || p), and its value too

    The value of k2 is biased. k1 = -l has no gradient in expectation and is not offered.

    Args:
      logprobs: [...], log q of the sampled tokens.
      reference_logprobs: [...], log p; no gradient.
      estimator: "k2", "k3" or "ratio_k3".
      old_logprobs: log q_old for "ratio_k3"; None: those of `logprobs`, as in a first update.

    Returns:
      [...], nats, per token.

    Raises:
      ConfigError: for another estimator; for k1 with the reason.

    Reference: Schulman 2020, "Approximating KL divergence"; the gradients by enumeration in
    tests/losses/test_policy.py.
    """
    if estimator == "k1":
        raise ConfigError(
            "estimator = k1: its gradient is 0 in expectation, so that it only adds noise: use k2 "
            "or ratio_k3"
        )
    if estimator not in ("k2", "k3", "ratio_k3"):
        raise ConfigError(f"estimator = {estimator!r}: must be one of k2, k3, ratio_k3")
    new = jnp.asarray(logprobs)
    gap = jax.lax.stop_gradient(jnp.asarray(reference_logprobs)) - new
    if estimator == "k2":
        return 0.5 * gap**2
    values = jnp.expm1(gap) - gap
    if estimator == "k3":
        return values
    old = new if old_logprobs is None else jnp.asarray(old_logprobs)
    return jnp.exp(new - jax.lax.stop_gradient(old)) * values


def _log_ratio(
    new: Array, old: Array, mask: Array, ratio: str, segment_ids: ArrayLike | None
) -> Array:
    """log rho of each token."""
    tokens = new - old
    if ratio == "token":
        return tokens
    mean = sequence_sum(sequence_weights(mask, segment_ids) * tokens, segment_ids)
    if ratio == "sequence":
        return mean
    return jax.lax.stop_gradient(mean) + new - jax.lax.stop_gradient(new)


def sequence_sum(values: Array, segment_ids: ArrayLike | None = None) -> Array:
    """The sum over each sequence, at each of its tokens: [B, L] -> [B, L]."""
    if segment_ids is None:
        return jnp.broadcast_to(values.sum(-1, keepdims=True), values.shape)
    length = values.shape[-1]
    one = lambda row, own: jax.ops.segment_sum(row, own, length + 1)[own]
    return jax.vmap(one)(values, jnp.asarray(segment_ids))


def _under(mask: Array, values: ArrayLike) -> Array:
    """The values in float32, 0 where the mask is False, whatever stands there."""
    values = jnp.asarray(values)
    if values.shape != mask.shape or mask.ndim != 2:
        raise ConfigError(
            f"policy: an array {list(values.shape)} and the mask {list(mask.shape)} must have one "
            "shape, [B, L]"
        )
    return jnp.where(mask, values.astype(jnp.float32), 0.0)
