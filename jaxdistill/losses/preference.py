"""Direct preference optimisation: a chosen and a rejected answer against a reference model."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.types import Mean


def dpo(
    chosen: ArrayLike,
    rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: float = 0.1,
    mask: ArrayLike | None = None,
) -> dict[str, Mean]:
    """DPO: the student prefers the chosen answer more than the reference does.

        margin = beta ((log q(chosen) - log r(chosen)) - (log q(rejected) - log r(rejected)))
        loss = -log sigmoid(margin)

    Args:
      chosen: [B], log q of whole answers: sums over their tokens, not means.
      rejected: [B].
      reference_chosen: [B], the same under the reference, a constant.
      reference_rejected: [B].
      beta: above 0; the larger, the closer to the reference.
      mask: bool [B], the pairs that there are; None: all. What lies under False may be anything.

    Returns:
      "loss", "reward/margin" and "reward/accuracy" (margin above 0), and "reward/chosen" and
      "reward/rejected", beta (log q - log r) of each: Means over the pairs.

    Raises:
      ConfigError: if shapes differ or beta is not above 0.

    >>> import jax.numpy as jnp
    >>> pair = jnp.array([-2.0]), jnp.array([-3.0])
    >>> print(f"{dpo(*pair, *pair)['loss'].value:.4f}")
    0.6931

    Reference: Rafailov et al. 2023, arXiv 2305.18290, equation 7.
    """
    if not beta > 0:
        raise ConfigError(f"beta = {beta}: must be above 0")
    given = (chosen, rejected, reference_chosen, reference_rejected)
    ours, theirs, first, second = (jnp.asarray(values).astype(jnp.float32) for values in given)
    shapes = {values.shape for values in (ours, theirs, first, second)}
    if len(shapes) > 1 or ours.ndim != 1:
        raise ConfigError(f"dpo: shapes {sorted(map(list, shapes))} must be one, [pairs]")
    there = jnp.ones(ours.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    if there.shape != ours.shape:
        raise ConfigError(f"dpo: the mask {list(there.shape)} must have one shape with the rest")
    first, second = jax.lax.stop_gradient((first, second))
    better, worse = (jnp.where(there, beta * gap, 0.0) for gap in (ours - first, theirs - second))
    margin = better - worse
    pairs = there.sum().astype(jnp.float32)
    over = lambda values: Mean(jnp.where(there, values, 0.0).sum().astype(jnp.float32), pairs)
    return {
        "loss": over(-jax.nn.log_sigmoid(margin)),
        "reward/margin": over(margin),
        "reward/accuracy": over(margin > 0),
        "reward/chosen": over(better),
        "reward/rejected": over(worse),
    }
