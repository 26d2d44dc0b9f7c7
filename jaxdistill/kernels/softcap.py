"""The soft cap of logits and attention scores, c tanh(x / c), as Gemma 2 has it."""

import jax.numpy as jnp
from jax import Array


def soft_cap(x: Array, cap: float | None, scale: float | None = None) -> Array:
    """cap * tanh(scale * x / cap): within (-cap, cap), and nearly scale * x around 0.

    Args:
      x: [...], logits or scores before the cap.
      cap: c > 0; None leaves `scale * x`.
      scale: multiplies x first, in one product with 1 / cap; None is 1.

    Returns:
      [...], in the dtype of x.

    >>> import jax.numpy as jnp
    >>> print(soft_cap(jnp.array([0.0, 1.0, 100.0]), 2.0).round(3))
    [0.    0.924 2.   ]

    Reference: Gemma Team 2024 (Gemma 2), arXiv 2408.00118, section 2.
    """
    if cap is None:
        return x if scale is None else x * scale
    return cap * jnp.tanh(x / cap if scale is None else x * (scale / cap))


def soft_cap_slope(capped: Array, cap: float) -> Array:
    """d soft_cap / d x = 1 - tanh(x / cap)^2, from the capped values: [...].

    A value below -cap is an impossible entry that was masked after the cap: its slope is 0.
    """
    share = jnp.maximum(capped, -cap) / cap
    return 1 - share**2
