"""CTKD's learned temperature: one number or one per token, and the gradient that is reversed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError


def ctkd_temperature(w: ArrayLike, *, t_start: ArrayLike = 1.0, t_range: ArrayLike = 20.0) -> Array:
    """T = t_start + t_range * sigmoid(w), in (t_start, t_start + t_range) for any w.

    Args:
      w: [...], what is learned; the reference code starts it at 1, where T is 15.62.
      t_start: the smallest temperature, positive.
      t_range: largest minus smallest temperature, not negative. The reference code calls it t_end,
        though T goes to t_start + t_end.

    Returns:
      [...], float32 (float64 for float64 w).

    Raises:
      ConfigError: for a Python number out of its range.

    >>> print(round(float(ctkd_temperature(1.0)), 2))
    15.62

    Reference: Li et al. 2022 (CTKD), arXiv 2211.16231, and its code for the range.
    """
    if isinstance(t_start, int | float) and not t_start > 0:
        raise ConfigError(f"t_start = {t_start}: must be positive, the smallest temperature")
    if isinstance(t_range, int | float) and not t_range >= 0:
        raise ConfigError(f"t_range = {t_range}: must not be negative, T goes up from t_start")
    w = jnp.asarray(w)
    wide = jnp.promote_types(w.dtype, jnp.float32)
    start, width = (jnp.asarray(x, wide) for x in (t_start, t_range))
    return start + width * jax.nn.sigmoid(w.astype(wide))


def init_temperature_head(width: int | None = None) -> dict[str, Array]:
    """Parameters of one temperature for all tokens, or of one per token: w = 1 everywhere.

    Args:
      width: D of the hidden states that a token's own temperature is read from; None for one w.

    Returns:
      {"bias": []}, with `width` {"kernel": [D], "bias": []}. Keep them from weight decay, which
      would pull T to the middle of its range.
    """
    own = {} if width is None else {"kernel": jnp.zeros(width)}
    return own | {"bias": jnp.ones(())}


def temperature_head(params: Any, hidden: ArrayLike | None = None) -> Array:
    """w = hidden . kernel + bias, or the bias alone where there is no kernel.

    The hidden states are constants: the student must not lower its loss through its temperature.

    Args:
      params: of `init_temperature_head`.
      hidden: [..., D], or None for one temperature.

    Returns:
      [...], or [] where there is no kernel; float32.

    Raises:
      ConfigError: if the kernel wants hidden states and there are none, or of another width.
    """
    if "kernel" not in params:
        return params["bias"]
    kernel = params["kernel"]
    if hidden is None or jnp.shape(hidden)[-1:] != kernel.shape:
        shape = "none" if hidden is None else list(jnp.shape(hidden))
        raise ConfigError(
            f"temperature_head: hidden = {shape}: must be [..., {kernel.size}], the width of the "
            "head's kernel; init_temperature_head(width=...) makes another"
        )
    constant = jax.lax.stop_gradient(jnp.asarray(hidden)).astype(kernel.dtype)
    return constant @ kernel + params["bias"]


@jax.custom_jvp
def reverse_gradient(x: ArrayLike, factor: ArrayLike) -> Array:
    """x itself, but its slope is multiplied by `factor`; below 0, descent on a loss ascends it.

    y = x,    dy = factor * dx

    Args:
      x: [...], of any float dtype.
      factor: a scalar, may be traced; a constant to the gradient. CTKD takes `cosine_lambda`.

    An optimizer that adapts to the size of gradients, such as Adam, divides a factor out that
    changes slowly: only its sign is left. There multiply the update instead, as
    `optim.optimizer(scaled={"objective/temperature": lambda step: -cosine_lambda(step / steps)})`
    does for parameters under these names, and let the factor here be -1. CTKD's own code has SGD.

    >>> import jax
    >>> value, slope = jax.value_and_grad(reverse_gradient)(3.0, -0.5)
    >>> print(float(value), float(slope))
    3.0 -0.5

    Reference: Ganin, Lempitsky 2014, arXiv 1409.7495.
    """
    return jnp.asarray(x)


@reverse_gradient.defjvp
def _reverse_gradient_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    x, factor = primals
    x = jnp.asarray(x)
    return x, jnp.asarray(factor).astype(x.dtype) * tangents[0]


def cosine_lambda(
    progress: ArrayLike, *, lambda_max: float = 0.0, lambda_min: float = -1.0
) -> Array:
    """CTKD's curriculum: lambda_min + (lambda_max - lambda_min) (1 + cos(pi x)) / 2.

    Args:
      progress: x, [...]; in CTKD's code the epoch over the number of loops. Held within [0, 1].
      lambda_max: at x = 0, where the temperature stands still.
      lambda_min: at x = 1 and after, where it ascends the loss as fast as the student descends.

    Returns:
      [...], the factor for `reverse_gradient`.

    Raises:
      ConfigError: if lambda_min is above lambda_max.

    >>> print([round(float(cosine_lambda(epoch / 10)), 3) for epoch in (0, 1, 5, 10)])
    [0.0, -0.024, -0.5, -1.0]

    Reference: Li et al. 2022 (CTKD), arXiv 2211.16231.
    """
    if lambda_min > lambda_max:
        raise ConfigError(
            f"lambda_min = {lambda_min}, lambda_max = {lambda_max}: the curriculum goes down from "
            "lambda_max to lambda_min"
        )
    x = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
    return lambda_min + (lambda_max - lambda_min) * (1.0 + jnp.cos(jnp.pi * x)) / 2.0
