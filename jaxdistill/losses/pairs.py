"""DistiLLM and DistiLLM-2 on given responses: skewed KL per token, per response, or over pairs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.losses import divergences
from jaxdistill.losses.likelihood import masked_mean
from jaxdistill.losses.whole_rows import detached_skew_reverse_kl
from jaxdistill.ranges import BALANCE
from jaxdistill.types import Mean

DIRECTIONS = ("forward", "reverse")


class Response(NamedTuple):
    """What both models say about responses, one per row.

    Attributes:
      student_logits: [B, L, V].
      teacher_logits: [B, L, V].
      mask: bool [B, L], the tokens of the response; prompt and padding count nothing.
    """

    student_logits: ArrayLike
    teacher_logits: ArrayLike
    mask: ArrayLike


def distillm(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    mask: ArrayLike,
    *,
    direction: str = "forward",
    skew: ArrayLike = 0.1,
) -> Mean:
    """DistiLLM: the skewed KL of one direction, over all tokens of the batch.

        forward:  KL(p || skew p + (1 - skew) q)        reverse:  KL(q || (1 - skew) p + skew q)

    The published loss has no cross-entropy and no temperature; the responses come from data and,
    ever more often, from the student itself.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      mask: bool [...], the tokens that count.
      direction: "forward" or "reverse".
      skew: weight of the first distribution in the mixture, 0 to 1.

    Returns:
      Mean over the tokens.

    Raises:
      ConfigError: for another direction, a skew out of range, or shapes that do not fit.

    Reference: Ko, Kim, Chen, Yun 2024, arXiv 2402.03898.
    """
    if direction not in DIRECTIONS:
        raise ConfigError(f"direction = {direction!r}: must be one of {', '.join(DIRECTIONS)}")
    forward = direction == "forward"
    loss = divergences.skew_forward_kl if forward else divergences.skew_reverse_kl
    return masked_mean(loss(student_logits, teacher_logits, skew=skew), mask)


def distillm2(
    chosen: Response,
    rejected: Response,
    *,
    skew_chosen: ArrayLike = 0.1,
    skew_rejected: ArrayLike = 0.1,
    balance: ArrayLike = 1.0,
) -> dict[str, Mean]:
    """DistiLLM-2: the teacher's responses pull the student up, its own are pushed down.

        (2 - balance) mean_t KL(p || a p + (1 - a) q)  on the teacher's response (chosen)
          +   balance mean_t KL(q || (1 - b) p + b sg(q))  on the student's (rejected)

    Each response is a mean over its tokens, then the batch a mean over its pairs: a long response
    weighs as much as a short one. The q within the second mixture is a constant.

    Args:
      chosen: the teacher's responses.
      rejected: the student's responses to the same prompts, row by row; another length is fine.
      skew_chosen: a, a scalar or [B], such as `distillm2_skew` gives.
      skew_rejected: b, the same.
      balance: weight of the rejected side, 0 to 2; from 1 to 1.5 by `distillm2_balance`.

    Returns:
      "loss", a Mean over the pairs in which either response has a token, and each side's own mean,
      "loss/chosen" and "loss/rejected", over the responses that have one.

    Raises:
      ConfigError: if shapes do not fit or a skew lies outside [0, 1].

    Reference: Ko et al. 2025, arXiv 2503.07067; the constant q is its code's.
    """
    checks.number("balance", balance, BALANCE, "distillm2: ")
    means, rows = [], []
    sides = (
        (chosen, divergences.skew_forward_kl, skew_chosen),
        (rejected, detached_skew_reverse_kl, skew_rejected),
    )
    for response, loss, skew in sides:
        weights = sequence_weights(response.mask)
        if jnp.ndim(skew):
            skew = checks.array("skew", skew)
            if skew.shape != weights.shape[:1]:
                raise ConfigError(
                    f"distillm2: a skew {list(skew.shape)}: must be one number, or "
                    f"{list(weights.shape[:1])}, one for each response"
                )
            skew = skew[:, None, None]
        values = loss(response.student_logits, response.teacher_logits, skew=skew)
        rows.append((weights > 0).any(-1))
        total = masked_mean(values, weights).total
        means.append(Mean(total, rows[-1].sum().astype(jnp.float32)))
    if rows[0].shape != rows[1].shape:
        raise ConfigError(
            f"distillm2: {rows[0].size} chosen and {rows[1].size} rejected responses: must be as "
            "many, one of each per prompt"
        )
    pairs = (rows[0] | rows[1]).sum().astype(jnp.float32)
    total = (2.0 - balance) * means[0].total + balance * means[1].total
    return {"loss": Mean(total, pairs), "loss/chosen": means[0], "loss/rejected": means[1]}


def sequence_weights(mask: ArrayLike, segment_ids: ArrayLike | None = None) -> Array:
    """Weights that make a mean over tokens the mean of responses' means: mask / (tokens of each).

    As `mask` of `kernels.linear_divergence` they give each response the same weight.

    Args:
      mask: bool or float [..., L], the tokens that count.
      segment_ids: int [..., L], 0 to L, whose tokens are one response; None: each row is one.

    Returns:
      float32 [..., L]; each response sums to 1, and to 0 where it has no token.

    Raises:
      ConfigError: if the shapes differ.

    >>> import jax.numpy as jnp
    >>> print(sequence_weights(jnp.array([[True, True], [False, True], [False, False]])))
    [[0.5 0.5]
     [0.  1. ]
     [0.  0. ]]
    """
    weights = jnp.asarray(mask).astype(jnp.float32)
    if segment_ids is None:
        count = weights.sum(-1, keepdims=True)
    else:
        segments, length = jnp.asarray(segment_ids), weights.shape[-1]
        if segments.shape != weights.shape:
            raise ConfigError(
                f"sequence_weights: mask {list(weights.shape)} and segment_ids "
                f"{list(segments.shape)} must have one shape"
            )
        one = lambda row, own: jax.ops.segment_sum(row, own, length + 1)[own]
        rows = weights.reshape(-1, length), segments.reshape(-1, length)
        count = jax.vmap(one)(*rows).reshape(weights.shape)
    return weights / jnp.where(count == 0, 1.0, count)


def distillm2_skew(
    teacher_log_probability: ArrayLike,
    student_log_probability: ArrayLike,
    first_gap: ArrayLike,
    *,
    skew: float = 0.1,
    smallest: float = 0.01,
) -> Array:
    """DistiLLM-2's curriculum: the closer the student is to the teacher, the smaller the skew.

    clip(1 - (1 - skew) first_gap / (exp(log p) - exp(log q) + 1e-5), smallest, skew)

    Args:
      teacher_log_probability: [...], log p, the mean log-probability of a response's tokens.
      student_log_probability: [...], log q, the same under the student. For the rejected side the
        method's code takes student minus teacher: there give log q first and log p second, and a
        `first_gap` of exp(log q) - exp(log p).
      first_gap: the mean of exp(log p) - exp(log q) over the first batch, which all later ones are
        measured against.
      skew: the largest value, that of the start.
      smallest: the smallest value.

    Returns:
      [...], constants to the gradient, float32.

    Raises:
      ConfigError: unless 0 <= smallest <= skew <= 1, or for shapes that differ.

    Reference: Ko et al. 2025, arXiv 2503.07067; an option of its code, off by default.
    """
    if not 0 <= smallest <= skew <= 1:
        raise ConfigError(
            f"smallest = {smallest}, skew = {skew}: must be 0 <= smallest <= skew <= 1"
        )
    p, q = (
        jnp.exp(jnp.asarray(x, jnp.float32))
        for x in (teacher_log_probability, student_log_probability)
    )
    if p.shape != q.shape:
        raise ConfigError(
            f"teacher_log_probability {list(p.shape)} and student_log_probability {list(q.shape)} "
            "must have one shape, a number per response"
        )
    gap = p - q + 1e-5
    # A gap of exactly 0 would make 0 / 0 at a first gap of 0; a student that is ahead has a
    # negative gap, and so the largest skew.
    ratio = (1.0 - skew) * first_gap / jnp.where(gap == 0, 1e-5, gap)
    return jax.lax.stop_gradient(jnp.clip(1.0 - ratio, smallest, skew))


def distillm2_balance(progress: ArrayLike) -> Array:
    """Weight of the rejected side over a run, 1 + min(1, 2 x) / 2: from 1 to 1.5 at its middle.

    Args:
      progress: x, steps made over steps of the run, held within [0, 1].

    Reference: Ko et al. 2025, arXiv 2503.07067; an option of its code, off by default.
    """
    x = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
    return 1.0 + 0.5 * jnp.minimum(1.0, 2.0 * x)
