"""Picks the next token: greedy, or drawn after temperature, top-k and top-p."""

import jax
import jax.numpy as jnp
from jax import Array


def filter_logits(
    logits_BV: Array,
    temperature: Array | float,
    top_k: Array | int | None,
    top_p: Array | float | None,
) -> Array:
    """Logits / temperature with every token outside top-k and top-p at -inf.

    top-k keeps the k largest (all that equal the k-th, too); top-p then keeps the smallest set of
    most probable tokens whose probability reaches p, measured after temperature and top-k; the most
    probable token always stays.

    Args:
      logits_BV: float [B, V].
      temperature: scalar above 0.
      top_k: scalar count, or None for all.
      top_p: scalar in (0, 1], or None for all.

    Returns:
      Float32 [B, V].

    Reference: top-k, Fan et al. 2018, arXiv 1805.04833; top-p, Holtzman et al. 2019,
    arXiv 1904.09751.
    """
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    if top_k is None and top_p is None:
        return logits_BV
    falling_BV = -jnp.sort(-logits_BV, axis=-1)
    size = logits_BV.shape[-1]
    if top_k is not None:
        place = jnp.clip(top_k, 1, size) - 1
        lowest_B1 = jax.lax.dynamic_index_in_dim(falling_BV, place, axis=-1)
        logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
        falling_BV = jnp.where(falling_BV < lowest_B1, -jnp.inf, falling_BV)
    if top_p is not None:
        probability_BV = jax.nn.softmax(falling_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        # At p = 1 rounding of the running sum must not drop the last token.
        kept_BV = ((before_BV < top_p) | (top_p >= 1)).at[:, 0].set(True)
        lowest_B1 = jnp.min(jnp.where(kept_BV, falling_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
    return logits_BV


def pick(logits_BV: Array, keys_B: Array, settings: dict[str, Array]) -> Array:
    """int32 [B]: the largest logit where `settings` is empty, else one draw per row and key."""
    if not settings:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    filtered_BV = filter_logits(
        logits_BV, settings["temperature"], settings.get("top_k"), settings.get("top_p")
    )
    return jax.vmap(jax.random.categorical)(keys_B, filtered_BV).astype(jnp.int32)
