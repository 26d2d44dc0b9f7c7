"""How queries meet keys where all of them are at hand: causal, in documents, windows, with caps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.models.architecture import DecoderConfig

# attend(state, layer index, query [B, L, H, E], key [B, L, G, E], value [B, L, G, E])
#   -> (state, mixed values [B, L, H, E]); training has no state, generation keeps its cache there.
Attend = Callable[[Any, Array, Array, Array, Array], tuple[Any, Array]]


def causal(
    config: DecoderConfig, length: int, segment_ids: Array | None, implementation: Any
) -> Attend:
    """Attention within a row: causal, within segments, within each layer's window.

    Layers with and without a window are one scanned body: a layer's window is a number that it
    reads by its index. A scan over groups of layers would tie the number of layers to the pattern
    (which pruning breaks) and compile every kind of layer once more, for a mask that costs one
    comparison.
    """
    mask_B1LL = None
    if segment_ids is not None:
        mask_B1LL = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    windows = tuple(min(window or length, length) for window in config.windows or (length,))
    age_LL = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    scale, cap = score_scale(config), config.attention_softcap

    def attend(state, index, query, key, value):
        mask = mask_B1LL
        if min(windows) < length:
            inside = (age_LL < jnp.asarray(np.asarray(windows))[index])[None, None]
            mask = inside if mask is None else mask & inside
        if cap is not None:
            before = (age_LL >= 0)[None, None]
            mask = before if mask is None else mask & before
            return state, _capped(query, key, value, mask, scale, cap)
        mixed = jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, is_causal=True, implementation=implementation
        )
        return state, mixed

    return attend


def score_scale(config: DecoderConfig) -> float:
    """What query times key is multiplied with."""
    return float((config.query_scalar or config.head_dim) ** -0.5)


def _capped(
    query_BLHE: Array, key_BLGE: Array, value_BLGE: Array, mask: Array, scale: float, cap: float
) -> Array:
    """softmax(cap tanh(scale q k / cap)) v: `jax.nn.dot_product_attention` has no soft cap."""
    batch, length, heads, size = query_BLHE.shape
    query_BLGRE = query_BLHE.reshape(batch, length, key_BLGE.shape[2], -1, size)
    score_BGRLM = jnp.einsum(
        "BLGRE,BMGE->BGRLM", query_BLGRE, key_BLGE, preferred_element_type=jnp.float32
    )
    score_BGRLM = cap * jnp.tanh(score_BGRLM * (scale / cap))
    lowest = jnp.finfo(jnp.float32).min
    share_BGRLM = jax.nn.softmax(jnp.where(mask[:, :, None], score_BGRLM, lowest))
    mixed = jnp.einsum("BGRLM,BMGE->BLGRE", share_BGRLM.astype(value_BLGE.dtype), value_BLGE)
    return mixed.reshape(query_BLHE.shape)
