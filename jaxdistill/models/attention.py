"""How queries meet keys where all of them are at hand: causal, in documents, windows, with caps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice
from jaxdistill.kernels.softcap import soft_cap
from jaxdistill.models import attention_tpu
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.sharding import constrain, current_mesh

# What a configuration may name. "auto" is "xla" wherever it runs: no kernel has been timed against
# it yet; a named one is taken or refused, and nothing takes its place.
IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")

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
    comparison. `implementation` is one of `IMPLEMENTATIONS`; None is "auto".

    Raises:
      ConfigError: where a named kernel cannot compute this.
    """
    named = implementation or "auto"
    check(named, config, length, choice.current_device().platform)
    if named == "splash":
        return _splash(config, length, segment_ids)
    implementation = None if named == "auto" else named
    mask_B1LL = None
    if segment_ids is not None:
        mask_B1LL = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    windows = tuple(min(window or length, length) for window in config.windows or (length,))
    age_LL = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    scale, cap = score_scale(config), config.attention_softcap

    def attend(state, index, query, key, value):
        key, value = repeated(query, key), repeated(query, value)
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


def check(name: str, config: DecoderConfig, length: int, platform: str) -> None:
    """Whether a named implementation can compute this.

    Args:
      name: of `IMPLEMENTATIONS`.
      config: of the model.
      length: tokens of a row.
      platform: "cpu", "gpu" or "tpu".

    Raises:
      ConfigError: naming what it cannot.
    """
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"attention = {name!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    home = {"cudnn": "gpu", "splash": "tpu"}.get(name, platform)
    if platform != home:
        raise ConfigError(f"attention = {name!r}: runs on a {home}, and this is a {platform}")
    if name == "splash":
        attention_tpu.check(config, length)
    if name == "cudnn" and config.attention_softcap is not None:
        raise ConfigError("attention = 'cudnn': has no soft cap, which this model has: take xla")


def repeated(query_BLHE: Array, x_BLGE: Array) -> Array:
    """Keys or values with a head for each device of `tensor`, where there are fewer heads.

    Each device then has the one that its queries meet, and none computes with all of them.
    """
    mesh = current_mesh()
    parts = 1 if mesh is None else mesh.shape["tensor"]
    heads, groups = query_BLHE.shape[2], x_BLGE.shape[2]
    if groups % parts == 0 or parts % groups or heads % parts:
        return x_BLGE
    whole = constrain(x_BLGE, ("batch", "length", None, None))
    return constrain(
        jnp.repeat(whole, parts // groups, axis=2), ("batch", "length", "act_heads", None)
    )


def _splash(config: DecoderConfig, length: int, segment_ids: Array | None) -> Attend:
    mixed = attention_tpu.attention(config, length, score_scale(config))

    def attend(state, index, query, key, value):
        key, value = repeated(query, key), repeated(query, value)
        segments = segment_ids
        if segments is None:
            segments = jnp.ones(query.shape[:2], jnp.int32)
        return state, mixed(index, query, key, value, segments)

    return attend


def score_scale(config: DecoderConfig) -> float:
    """What query times key is multiplied with."""
    if config.attention_multiplier is not None:
        return config.attention_multiplier
    return float((config.query_scalar or config.head_dim) ** -0.5)


def _capped(
    query_BLHE: Array, key_BLGE: Array, value_BLGE: Array, mask: Array, scale: float, cap: float
) -> Array:
    """softmax(soft_cap(scale q k)) v: `jax.nn.dot_product_attention` has no soft cap."""
    batch, length, heads, size = query_BLHE.shape
    query_BLGRE = query_BLHE.reshape(batch, length, key_BLGE.shape[2], -1, size)
    score_BGRLM = jnp.einsum(
        "BLGRE,BMGE->BGRLM", query_BLGRE, key_BLGE, preferred_element_type=jnp.float32
    )
    score_BGRLM = soft_cap(score_BGRLM, cap, scale)
    lowest = jnp.finfo(jnp.float32).min
    share_BGRLM = jax.nn.softmax(jnp.where(mask[:, :, None], score_BGRLM, lowest))
    mixed = jnp.einsum("BGRLM,BMGE->BLGRE", share_BGRLM.astype(value_BLGE.dtype), value_BLGE)
    return mixed.reshape(query_BLHE.shape)
