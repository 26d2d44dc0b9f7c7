"""The load-balancing loss of routed experts."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError


def load_balancing(scores: ArrayLike, chosen: int, mask: ArrayLike) -> Array:
    """How unevenly tokens are spread over experts; `chosen` where they are spread evenly.

        X * sum_x f_x P_x
        f_x: choices of expert x per token,   P_x: mean probability of expert x

    Means are over the counted tokens of all layers together, as transformers takes them. What is
    chosen has no gradient; the probabilities have.

    Args:
      scores: [layers, B, L, X], what each layer's router makes of each token.
      chosen: experts that a token passes.
      mask: [B, L], which tokens count: padding does not.

    Returns:
      float32 [], without a unit, at most X.

    Raises:
      ConfigError: unless 1 <= chosen <= X, or for shapes that do not fit.

    Reference: Fedus, Zoph, Shazeer 2021, arXiv 2101.03961, equations (4) to (6); with several
    experts per token as in Mixtral.
    """
    scores = jnp.asarray(scores, jnp.float32)
    if scores.ndim != 4 or scores.shape[1:3] != jnp.shape(mask):
        raise ConfigError(
            f"load_balancing: scores {list(scores.shape)} and mask {list(jnp.shape(mask))}: "
            "must be [layers, B, L, X] and [B, L]"
        )
    layers, *_, experts = scores.shape
    if not 1 <= chosen <= experts:
        raise ConfigError(f"load_balancing: chosen = {chosen}: must be from 1 to {experts} experts")
    counted = jnp.asarray(mask, jnp.float32)[None, ..., None]
    scores = jnp.where(counted == 0, 0.0, scores)  # padding may hold anything
    tokens = jnp.maximum(layers * jnp.sum(counted), 1.0)
    shares = jax.nn.softmax(scores, axis=-1)
    _, expert_K = jax.lax.top_k(shares, chosen)
    picked = jnp.sum(jax.nn.one_hot(expert_K, experts), axis=-2)
    mean = lambda values: jnp.sum(values * counted, axis=(0, 1, 2)) / tokens
    return experts * jnp.sum(jax.lax.stop_gradient(mean(picked)) * mean(shares))
