"""Advantages of sampled answers: rewards within a group, a teacher per token, and their length."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.losses.policy import sequence_sum

SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: ArrayLike,
    judged: ArrayLike | None = None,
    *,
    scale: str = "group",
    eps: float = 1e-4,
) -> Array:
    """How much better each answer is than the others to its prompt.

        A = (r - mean of the group) / (std + eps)

    The standard deviation divides by n - 1, over the group or over all answers of the batch. An
    answer that no verifier could judge counts in neither and has A = 0. A group without spread has
    A = 0.

    Args:
      rewards: [P, S], S answers to each of P prompts, of the whole batch: groups are made before it
        is split over devices or micro-batches.
      judged: bool [P, S], which rewards are known; None: those that are finite.
      scale: whose standard deviation divides: "group", "batch", or "none".
      eps: added to it.

    Returns:
      float32 [P, S].

    Raises:
      ConfigError: if the shapes differ, S is 1, or for another scale.

    >>> import jax.numpy as jnp
    >>> print(group_advantages(jnp.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])))
    [[ 0.866 -0.866 -0.866  0.866]
     [ 0.     0.     0.     0.   ]]

    Reference: Shao et al. 2024, arXiv 2402.03300; "none": Liu et al. 2025, arXiv 2503.20783.
    """
    values = jnp.asarray(rewards)
    known = jnp.isfinite(values) if judged is None else jnp.asarray(judged).astype(bool)
    if values.ndim != 2 or known.shape != values.shape:
        raise ConfigError(
            f"group_advantages: rewards {list(values.shape)} and judged {list(known.shape)} must "
            "have one shape, [prompts, answers]"
        )
    if values.shape[1] < 2:
        raise ConfigError(
            "group_advantages: one answer to each prompt has nothing to be compared with: sample "
            "at least 2"
        )
    if scale not in SCALES:
        raise ConfigError(f"scale = {scale!r}: must be one of {', '.join(SCALES)}")
    values = jnp.where(known, values.astype(jnp.float32), 0.0)
    count = known.sum(1, keepdims=True)
    mean = values.sum(1, keepdims=True) / jnp.maximum(count, 1)
    gap = jnp.where(known & spread(rewards, known)[:, None], values - mean, 0.0)
    if scale == "none":
        return gap
    if scale == "group":
        variance = (gap**2).sum(1, keepdims=True) / jnp.maximum(count - 1, 1)
    else:
        total = known.sum()
        middle = values.sum() / jnp.maximum(total, 1)
        squares = jnp.where(known, (values - middle) ** 2, 0.0)
        variance = squares.sum() / jnp.maximum(total - 1, 1)
    return gap / (jnp.sqrt(variance) + eps)


def spread(rewards: ArrayLike, judged: ArrayLike | None = None) -> Array:
    """Which groups have two different rewards, and so something to learn: [P, S] -> bool [P]."""
    values = jnp.asarray(rewards)
    known = jnp.isfinite(values) if judged is None else jnp.asarray(judged).astype(bool)
    highest = jnp.where(known, values, -jnp.inf).max(1)
    lowest = jnp.where(known, values, jnp.inf).min(1)
    return highest > lowest


def teacher_advantages(
    logprobs: ArrayLike,
    teacher_logprobs: ArrayLike,
    mask: ArrayLike,
    *,
    weight: ArrayLike = 1.0,
    discount: float = 0.0,
) -> Array:
    """What a teacher that gives one number per token adds to the advantages.

        l_t = log p(y_t) - log q(y_t),    A_t = weight sum_{u >= t} discount^(u - t) l_u

    With discount 0 its policy gradient is, in expectation, that of KL(q || p) at each position;
    with discount 1 that of the KL of whole sequences.

    Args:
      logprobs: [B, L], log q of the sampled tokens; no gradient.
      teacher_logprobs: [B, L], log p.
      mask: bool [B, L], the tokens of the answer, each row one sequence; others give 0 and pass
        nothing on.
      weight: the coefficient, a number or an array of shape ().
      discount: of later tokens, 0 to 1.

    Returns:
      float32 [B, L], nats.

    Raises:
      ConfigError: if shapes differ or the discount lies outside [0, 1].
    """
    mask = jnp.asarray(mask).astype(bool)
    new, teacher = jnp.asarray(logprobs), jnp.asarray(teacher_logprobs)
    if new.shape != mask.shape or teacher.shape != mask.shape or mask.ndim != 2:
        raise ConfigError(
            f"teacher_advantages: logprobs {list(new.shape)}, teacher_logprobs "
            f"{list(teacher.shape)} and mask {list(mask.shape)} must have one shape, [B, L]"
        )
    if not 0.0 <= discount <= 1.0:
        raise ConfigError(f"discount = {discount}: must be in [0, 1]")
    gap = jnp.where(mask, teacher.astype(jnp.float32) - new.astype(jnp.float32), 0.0)

    def back(later: Array, column: Array) -> tuple[Array, Array]:
        total = column + discount * later
        return total, total

    _, sums = jax.lax.scan(back, jnp.zeros_like(gap[:, 0]), gap.T, reverse=True)
    return jax.lax.stop_gradient(jnp.where(mask, sums.T, 0.0) * jnp.asarray(weight))


def early_weights(
    advantages: ArrayLike,
    mask: ArrayLike,
    gamma: float = 0.5,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """Weights of the tokens of an answer that fall as its advantages are spent.

        u_t = sum_{s < t} |A_s| / sum_s |A_s|,    w_t = 1 + gamma (1 - u_t)

    Args:
      advantages: [B, L], one per token; no gradient.
      mask: bool [B, L], the tokens of answers; what lies under False may be anything.
      gamma: of the first token, at least 0.
      segment_ids: int [B, L], rising, where several answers are packed into a row; None: each row
        is one.

    Returns:
      float32 [B, L], 1 to 1 + gamma; 1 + gamma where all advantages of an answer are 0.

    Raises:
      ConfigError: if shapes differ or gamma is negative.

    >>> import jax.numpy as jnp
    >>> print(early_weights(jnp.array([[0.5, -0.2, 1.0, -0.3]]), jnp.ones((1, 4), bool)))
    [[1.5   1.375 1.325 1.075]]

    Reference: IW-OPD, arXiv 2606.22600.
    """
    mask, values = jnp.asarray(mask).astype(bool), jnp.asarray(advantages)
    if values.shape != mask.shape or mask.ndim != 2:
        raise ConfigError(
            f"early_weights: advantages {list(values.shape)} and mask {list(mask.shape)} must have "
            "one shape, [B, L]"
        )
    if gamma < 0:
        raise ConfigError(f"gamma = {gamma}: must be at least 0")
    sizes = jnp.where(mask, jnp.abs(values.astype(jnp.float32)), 0.0)
    own = jnp.zeros(mask.shape, jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)

    def forward(carry: tuple[Array, Array], column: tuple[Array, Array]):
        spent, segment = carry
        size, here = column
        spent = jnp.where(here == segment, spent, 0.0)
        return (spent + size, here), spent

    start = jnp.zeros_like(sizes[:, 0]), own[:, 0]
    _, spent = jax.lax.scan(forward, start, (sizes.T, own.T))
    total = sequence_sum(sizes, segment_ids)
    share = spent.T / jnp.where(total > 0, total, 1.0)
    return jax.lax.stop_gradient(1.0 + gamma * (1.0 - share))


def overlong_penalty(lengths: ArrayLike, *, limit: int, ramp: int) -> Array:
    """What a long answer loses, before it is cut: DAPO's soft punishment.

        0 up to limit - ramp, then falling evenly to -1 at limit, and -1 beyond

    Args:
      lengths: int [...], tokens of each answer.
      limit: the most tokens an answer may have.
      ramp: over how many tokens before it the penalty grows.

    Returns:
      float32 [...], -1 to 0, to be added to the reward.

    Raises:
      ConfigError: unless 0 < ramp <= limit.

    >>> import jax.numpy as jnp
    >>> print(overlong_penalty(jnp.array([16384, 18432, 20480, 30000]), limit=20480, ramp=4096))
    [ 0.  -0.5 -1.  -1. ]

    Reference: Yu et al. 2025, arXiv 2503.14476.
    """
    if not 0 < ramp <= limit:
        raise ConfigError(f"overlong: limit = {limit}, ramp = {ramp}: ramp must be in 1 to limit")
    lengths = jnp.asarray(lengths)
    return jnp.clip((limit - ramp - lengths) / ramp, -1.0, 0.0).astype(jnp.float32)
