"""The definition of `linear_logprobs` in plain jnp, with JAX's own gradient and all logits."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.kernels.linear_divergence.chunk import Operands
from jaxdistill.kernels.linear_logprobs.outputs import Logprobs
from jaxdistill.kernels.softcap import soft_cap
from jaxdistill.kernels.statistics import LOWEST


def reference(x: Operands, top_k: int, softcap: float | None, logits_dtype: DTypeLike) -> Logprobs:
    """The answers of every token, from logits [..., V] in memory; float32, or float64 of float64.

    Args:
      x: all arrays.
      top_k: how many of the most likely tokens.
      softcap: of the logits.
      logits_dtype: in which logits are rounded.
    """
    counted = x.weights != 0
    hidden = jnp.where(counted[..., None], x.student_hidden, 0)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    head = x.student_head.astype(hidden.dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=wide)
    if x.student_bias is not None:
        logits += x.student_bias.astype(wide).reshape(*(1,) * (logits.ndim - 1), -1)
    logits = soft_cap(logits, softcap).astype(logits_dtype).astype(wide)
    s, temperature = jnp.maximum(logits, LOWEST), x.coefficients.temperature
    tempered = s / (temperature[..., None] if temperature.ndim else temperature)
    log_sum_exp = jax.nn.logsumexp(tempered, axis=-1)
    log_q = tempered - log_sum_exp[..., None]
    number = lambda array: _where(counted, array, 0.0)
    logprobs = log_masses = top_ids = top_logprobs = None
    if x.ids is not None:
        picked = jnp.take_along_axis(
            log_q, jnp.maximum(x.ids, 0), axis=-1, mode="fill", fill_value=jnp.nan
        )
        logprobs = number(jnp.where(x.ids < 0, 0.0, picked))
    if x.sets is not None:
        columns = [x.sets[:, m].reshape(*(1,) * (s.ndim - 1), -1) for m in range(x.sets.shape[1])]
        parts = [jax.nn.logsumexp(jnp.where(c, log_q, -jnp.inf), axis=-1) for c in columns]
        log_masses = number(jnp.stack(parts, axis=-1))
    if top_k:
        top_ids = jax.lax.top_k(s, top_k)[1]
        top_logprobs = number(jnp.take_along_axis(log_q, top_ids, axis=-1))
        top_ids = _where(counted, top_ids, -1)
    entropy = -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
    argmax = _where(counted, jnp.argmax(s, axis=-1).astype(jnp.int32), -1)
    return Logprobs(
        logprobs, number(entropy), number(log_sum_exp), argmax, log_masses, top_ids, top_logprobs
    )


def _where(counted: Array, x: Array, other: float | int) -> Array:
    return jnp.where(counted.reshape(*counted.shape, *(1,) * (x.ndim - counted.ndim)), x, other)
