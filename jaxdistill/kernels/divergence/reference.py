"""The definition of `divergence` in plain jnp, with JAX's own gradient: what all else must equal.

    loss = alpha CE(s, y) + (1 - alpha) T^2 D(softmax(z / T), softmax(s / T)),   z the target:
    the teacher's logits t, or with TAID the constant (1 - taid_t) s + taid_t t

In float32, or in float64 where the student's logits are float64.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels import rows
from jaxdistill.kernels.operands import Coefficients, LossSpec
from jaxdistill.kernels.statistics import LOWEST


class Terms(NamedTuple):
    """Of each row, [...]; 0 where there are no labels or no teacher, and z is None then."""

    loss: Array
    cross_entropy: Array
    divergence: Array  # with its T^2
    target: Array | None  # z, [..., V]


def reference(
    spec: LossSpec,
    student: Array,
    teacher: Array,
    labels: Array | None,
    weights: Array,
    coefficients: Coefficients,
) -> Array:
    """weights * loss, [...]; exactly 0 in value and gradient where the weight is 0.

    Args:
      spec: what is computed.
      student: s, [..., V].
      teacher: t, [..., V].
      labels: y, int [...], or None.
      weights: [...].
      coefficients: temperature is [] or [...].
    """
    counted = weights != 0
    s, t = (jnp.where(counted[..., None], logits, 0) for logits in (student, teacher))
    y = None if labels is None else jnp.where(counted, labels, 0)
    weights = jax.lax.stop_gradient(weights)
    if not coefficients.has_scalar_temperature:
        temperature = jnp.where(counted, coefficients.temperature, 1.0)
        coefficients = coefficients._replace(temperature=temperature)
    return jnp.where(counted, weights * terms(spec, s, t, y, coefficients).loss, 0.0)


def terms(
    spec: LossSpec, s: Array, t: Array | None, y: Array | None, coefficients: Coefficients
) -> Terms:
    """The loss of each row and what it is made of; only s, alpha and T have a gradient."""
    alpha, temperature, *constants = coefficients
    (parameters, taid_t, smoothing), t = jax.lax.stop_gradient((constants, t))
    wide = lambda x: jnp.maximum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), LOWEST)
    s, z = wide(s), None
    loss = cross_entropy = divergence = jnp.zeros(s.shape[:-1], s.dtype)
    if y is not None:
        cross_entropy = _cross_entropy(s, y, smoothing)
        loss += alpha * cross_entropy
    if t is not None:
        z = wide(t)
        if taid_t is not None:
            z = jax.lax.stop_gradient((1 - taid_t) * s + taid_t * z)
        u, w = (x / (temperature[..., None] if temperature.ndim else temperature) for x in (s, z))
        if isinstance(spec.kind, str):
            entry = rows.make(spec.kind, *(one.astype(s.dtype) for one in parameters)).value
            divergence = jnp.sum(entry(jax.nn.log_softmax(w), jax.nn.log_softmax(u)), axis=-1)
            divergence = rows.not_below_zero(divergence)
        else:
            assert spec.kind is not None, "with a teacher there is a divergence"
            divergence = spec.kind(u, w, y)
        if spec.scale_by_t2:
            divergence *= temperature**2
        loss += (1 - alpha) * divergence
    return Terms(loss, cross_entropy, divergence, z)


def _cross_entropy(s: Array, y: Array, smoothing: Array | None) -> Array:
    """-(1 - eps) log q_y - eps mean_v log q_v over the possible entries; NaN for no label."""
    log_q = jax.nn.log_softmax(s)
    index = jnp.where(y < 0, s.shape[-1], y)[..., None]  # a negative index counts from the end
    at_label = jnp.take_along_axis(log_q, index, -1, mode="fill", fill_value=jnp.nan)[..., 0]
    if smoothing is None:
        return -at_label
    mean = jnp.mean(log_q, axis=-1, where=s > LOWEST / 2)
    return -(1 - smoothing) * at_label - smoothing * mean
