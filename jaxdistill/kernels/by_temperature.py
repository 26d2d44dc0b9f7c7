"""The slope of a divergence by its temperature, in a form whose leading terms do not cancel.

With d = log q - log p, which falls as 1 / T, the parts of d (T^2 D) / dT are of the order of d and
d^2 and cancel to one of d^3: in float32 their difference is rounding alone where T is large. For
KL(p || q), z~ = z - E_p z and z the target's logits, the rest that stays can be written as

    d (T^2 D) / dT = T sum p phi(d) - sum p psi(d) z~        psi(d) = e^d - 1 - d
                                                             phi(d) = 2 psi(d) - d (e^d - 1)

and near d = 0 psi and phi are made of their series. Other divergences take away what sums to 0; a
mixture's own weights are rounded to some 1e-7, and what is smaller in JSD and skew stays noise.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels.rows import Row
from jaxdistill.kernels.statistics import LOWEST

_NEAR = 0.5  # where the series hold to the last digit, of float64 too
_PSI = tuple(range(2, 16))
_PHI = tuple(math.factorial(n) // (n - 2) for n in range(3, 15))


def slope(
    row: Row,
    s: Array,
    z: Array,
    log_s: Array,
    log_z: Array,
    temperature: Any,
    scaled: bool,
    total: Callable[[Array], Array],
    held: Array | None = None,
) -> Array:
    """d (T^2 D) / dT, or d D / dT where the divergence is not scaled.

    Args:
      row: the divergence.
      s: the student's logits less their maximum, [..., V]; impossible entries are near `LOWEST`.
      z: the target's, the same.
      log_s: log sum_v exp(s / T), [..., 1], over the whole vocabulary.
      log_z: of the target, the same.
      temperature: T, [] or [..., 1].
      scaled: whether the divergence is multiplied by T^2.
      total: the sum over the vocabulary, [..., V] -> [..., 1].
      held: what stays of both logits, [..., V], where an entry s / T moves as (s - held) / T does;
        None for nothing.

    Returns:
      [..., 1].
    """
    k = 1 / temperature
    log_q, log_p = s * k - log_s, z * k - log_z
    q, p = jnp.exp(log_q), jnp.exp(log_p)
    no_s, no_z = s <= LOWEST / 2, z <= LOWEST / 2
    # From the logits' difference: that of two rounded log-probabilities has lost its digits.
    d = jnp.where(no_s & no_z, 0.0, (s - z) * k - (log_s - log_z))
    if held is not None:
        s, z = s - held, z - held
    mean_s, mean_z = total(q * s), total(p * z)
    if row.closed:
        shift = temperature * (log_s - log_z)
        parts = {
            "forward": (p, q, d, z - mean_z, s - shift - mean_z),
            "reverse": (q, p, -d, s - mean_s, z + shift - mean_s),
        }
        moved = row.closed.value(
            {name: total(_kl(*parts[name], temperature, scaled)) for name in row.closed.reads}
        )
    else:
        both = ~(no_s | no_z)
        s, z = s - mean_s, z - mean_z
        zero = jnp.zeros((), s.dtype)
        flat = row.dlogq(zero, zero)  # of equal models; its share of q sums to 0 with s
        size, at = jnp.ones_like(p), (log_p, log_q)
        if row.homogeneous:
            # Relative to the larger of p and q, whose logarithms would round the difference away.
            size, at = jnp.maximum(p, q), (jnp.minimum(-d, 0.0), jnp.minimum(d, 0.0))
        g = size * row.dlogq(*at) - flat * q
        h = size * row.dlogp(*at) + flat * p
        apart = jnp.where(g == 0, 0.0, g * s) + jnp.where(h == 0, 0.0, h * z)
        entries = -jnp.where(both, g * (s - z) + (g + h) * z, apart)
        if scaled:
            entries += 2 * temperature * (size * row.value(*at) - flat * (q - p))
        moved = total(entries)
    return moved if scaled else moved * k**2


def _kl(p: Array, q: Array, d: Array, z: Array, s: Array, temperature: Any, scaled: bool) -> Array:
    """The entries of T^2 dD/dT + 2 T D of KL(p || q), without the last term if not `scaled`.

    z is the first model's logits less their mean under p; s the other's, with z + T d = s.
    """
    near = jnp.abs(d) < _NEAR
    x = jnp.where(near, d, 0.0)
    psi = x * x * _nested(x, _PSI)
    phi = -(x**3) * _series(x, _PHI)
    of_d = phi if scaled else -x * (x + psi)
    inside = temperature * (p * of_d) - p * (psi * z)
    excess = q - p
    weighted = jnp.where(p == 0, 0.0, p * d)
    outside = jnp.where(p == 0, 0.0, weighted * z) - excess * s
    if scaled:
        outside += 2 * temperature * (excess - weighted)
    return jnp.where(near, inside, outside)


def _nested(x: Array, divisors: tuple[int, ...]) -> Array:
    """1 / a (1 + x / b (1 + x / c ...))."""
    value = jnp.ones_like(x)
    for divisor in divisors[:0:-1]:
        value = 1 + x / divisor * value
    return value / divisors[0]


def _series(x: Array, divisors: tuple[int, ...]) -> Array:
    """1 / a + x / b + x^2 / c ..."""
    value = jnp.zeros_like(x)
    for divisor in reversed(divisors):
        value = value * x + 1 / divisor
    return value
