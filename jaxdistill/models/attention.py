"""How queries meet keys where all of them are at hand: causal, in documents, windows, with caps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice
from jaxdistill.kernels.softcap import soft_cap
from jaxdistill.models import (
    attention_blocks,
    attention_ring,
    attention_ring_tpu,
    attention_tpu,
)
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.sharding import by_device, constrain, current_mesh

# What a configuration may name. "auto" is splash on a TPU and cuDNN on a GPU where they can compute
# it, else "xla"; a named one is taken or refused, and nothing takes its place.
IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
KERNELS = ("splash", "ring-splash", "cudnn")  # forms that are no plain JAX
_CUDNN_TYPES = ("bfloat16", "float16")
_CUDNN_MOST = 8192  # tokens of a row: its mask of segments is [B, 1, L, L]

# attend(state, layer index, query [B, L, H, E], key [B, L, G, E], value [B, L, G, E])
#   -> (state, mixed values [B, L, H, E]); training has no state, generation keeps its cache there.
Attend = Callable[[Any, Array, Array, Array, Array], tuple[Any, Array]]


def causal(
    config: DecoderConfig,
    length: int,
    segment_ids: Array | None,
    implementation: Any,
    balanced: bool = False,
) -> Attend:
    """Attention within a row: causal, within segments, within each layer's window.

    Layers with and without a window are one scanned body: a layer takes its window by its index. A
    scan over groups of layers would tie the number of layers to the pattern (which pruning breaks)
    and compile every kind of layer once more. `implementation` is one of `IMPLEMENTATIONS`; None is
    "auto". Rows that the mesh divides meet in a ring where they are `balanced`, in the order of
    `attention_ring.order`; others have their keys brought together.

    Raises:
      ConfigError: where a named kernel cannot compute this.
    """
    named = implementation or "auto"
    check("xla" if named == "blocks" else named, config, length, choice.current_device().platform)

    # Masks are made here, once for all layers; which form it is depends on the activations' type.
    def of(dtype: DTypeLike) -> str:
        form = chosen(named, config, length, dtype)
        if balanced or form not in ("ring", "ring-splash"):
            return form
        return "splash" if named == "splash" else "xla"  # splash refuses rows that are divided

    could_be = {of(dtype) for dtype in ("bfloat16", "float32")}
    made = {form: of_form(form, config, length, segment_ids) for form in could_be}

    def attend(state, index, query, key, value):
        mixed = made[of(query.dtype)]
        key, value = repeated(query, key), repeated(query, value)
        return state, mixed(index, query, key, value, segment_ids)

    return attend


def of_form(
    form: str,
    config: DecoderConfig,
    length: int,
    segment_ids: Array | None,
    interpret: bool = False,
) -> Callable[..., Array]:
    """mixed(layer index, query [B, L, H, E], key, value [B, L, G, E], segment_ids) by one form.

    Args:
      form: "splash", "cudnn", "blocks", "ring", "ring-splash", or "xla" for all scores at once.
      config: of the model.
      length: L.
      segment_ids: int32 [B, L], or None for one document a row.
      interpret: run splash as plain JAX, on any device.
    """
    if form in ("splash", "ring-splash"):
        splash = attention_tpu if form == "splash" else attention_ring_tpu
        return splash.attention(config, length, score_scale(config), interpret)
    if form == "blocks":
        return _in_blocks(config, length)
    if form == "ring":
        return _in_a_ring(config, length)
    return _at_once(config, length, segment_ids, "cudnn" if form == "cudnn" else None)


def chosen(name: str, config: DecoderConfig, length: int, dtype: DTypeLike) -> str:
    """What computes it on the device and mesh in context: a form of `of_form`.

    "xla" has all scores [B, H, L, L] at once: for rows of up to `attention_blocks.SHORT` tokens,
    and for rows that the mesh divides, but not into the two parts for each device that a ring
    needs. "blocks" is XLA's form for all others. "ring" is one of blocks, "ring-splash" of kernels.

    Args:
      name: one of `IMPLEMENTATIONS`.
      config: of the model.
      length: tokens of a row.
      dtype: of the activations.
    """
    context = attention_ring.sizes()["context"]
    if name == "auto":
        platform = choice.current_device().platform
        kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform)
        if kernel is None or lacks(kernel, config, length, np.dtype(dtype).name):
            kernel = "xla"
        name = kernel
    if name == "splash" and context > 1:
        return "ring-splash"
    if name == "xla" and attention_ring.devices(length) > 1:
        return "ring"
    if name == "xla" and length > attention_blocks.SHORT and context == 1:
        return "blocks"
    return name


def lacks(kernel: str, config: DecoderConfig, length: int, dtype: str) -> str | None:
    """Why "auto" passes a kernel by on the mesh in context, or None."""
    sizes = attention_ring.sizes()
    tensor, context = sizes["tensor"], sizes["context"]
    if kernel == "splash" and context > 1:
        return attention_ring_tpu.problem(config, length, tensor, context)
    if kernel == "splash":
        return attention_tpu.problem(config, length, tensor)
    reasons = {
        "it has no soft cap": config.attention_softcap is not None,
        f"it takes {' and '.join(_CUDNN_TYPES)}": dtype not in _CUDNN_TYPES,
        "heads are of at most 128 numbers, a multiple of 8": config.head_dim % 8 != 0
        or config.head_dim > 128,
        f"rows have at most {_CUDNN_MOST} tokens": length > _CUDNN_MOST,
        "rows are whole": context > 1,
    }
    return next((reason for reason, here in reasons.items() if here), None)


def _window_kinds(config: DecoderConfig, length: int) -> tuple[list[int], np.ndarray]:
    """(windows that differ, which of them each layer has)."""
    windows = [min(window or length, length) for window in config.windows or (length,)]
    kinds = sorted(set(windows))
    return kinds, np.asarray([kinds.index(window) for window in windows], np.int32)


def _in_blocks(config: DecoderConfig, length: int) -> Callable[..., Array]:
    """`attention_blocks` for each window among the layers; each device has its rows and heads."""
    kinds, number = _window_kinds(config, length)
    scale, cap = score_scale(config), config.attention_softcap
    branches = [
        functools.partial(
            attention_blocks.attention, attention_blocks.BlockSettings(scale, cap, window)
        )
        for window in kinds
    ]

    def local(query, key, value, segments, kind):
        if len(branches) == 1:
            return branches[0](query, key, value, segments)
        return jax.lax.switch(kind, branches, query, key, value, segments)

    def mixed(index, query, key, value, segments):
        kind = jnp.asarray(number)[index] if config.windows else jnp.int32(0)
        segments = jnp.ones(query.shape[:2], jnp.int32) if segments is None else segments
        return by_device(local)(query, key, value, segments, kind)

    return mixed


def _in_a_ring(config: DecoderConfig, length: int) -> Callable[..., Array]:
    """`attention_ring` of rows in the balanced order."""
    windows = np.asarray([min(window or length, length) for window in config.windows or (length,)])
    ring = attention_ring.attention(
        score_scale(config), config.attention_softcap, bool(windows.min() < length)
    )

    def mixed(index, query, key, value, segments):
        window = jnp.asarray(windows, jnp.int32)[index if config.windows else 0]
        segments = jnp.ones(query.shape[:2], jnp.int32) if segments is None else segments
        return ring(query, key, value, segments, window)

    return mixed


def _at_once(
    config: DecoderConfig, length: int, segment_ids: Array | None, implementation: Any
) -> Callable[..., Array]:
    """All scores [B, H, L, L] at once, or cuDNN's kernel, which takes the same mask."""
    mask_B1LL = None
    if segment_ids is not None:
        mask_B1LL = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    windows = tuple(min(window or length, length) for window in config.windows or (length,))
    age_LL = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    scale, cap = score_scale(config), config.attention_softcap
    on_cpu = choice.current_device().platform == "cpu"

    def mixed(index, query, key, value, _):
        mask = mask_B1LL
        if min(windows) < length:
            inside = (age_LL < jnp.asarray(np.asarray(windows))[index])[None, None]
            mask = inside if mask is None else mask & inside
        if cap is not None or on_cpu:
            before = (age_LL >= 0)[None, None]
            mask = before if mask is None else mask & before
            return _plain(query, key, value, mask, scale, cap)
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, is_causal=True, implementation=implementation
        )

    return mixed


def check(name: str, config: DecoderConfig, length: int, platform: str) -> None:
    """Whether a named implementation can compute this on the mesh in context.

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
    sizes = attention_ring.sizes()
    if name == "splash" and sizes["context"] > 1:
        attention_ring_tpu.check(config, length, sizes["tensor"], sizes["context"])
    elif name == "splash":
        attention_tpu.check(config, length, sizes["tensor"])
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


def score_scale(config: DecoderConfig) -> float:
    """What query times key is multiplied with."""
    if config.attention_multiplier is not None:
        return config.attention_multiplier
    return float((config.query_scalar or config.head_dim) ** -0.5)


def _plain(
    query_BLHE: Array,
    key_BLGE: Array,
    value_BLGE: Array,
    mask: Array,
    scale: float,
    cap: float | None,
) -> Array:
    """softmax(soft_cap(scale q k)) v, with N = R L queries of each of G key heads.

    `jax.nn.dot_product_attention` has no soft cap, and on a CPU it turns the shares of all pairs
    over before they meet the values.
    """
    batch, length, heads, size = query_BLHE.shape
    groups = key_BLGE.shape[2]
    query_BLGRE = query_BLHE.reshape(batch, length, groups, heads // groups, size)
    query_BGNE = query_BLGRE.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, size)
    score_BGNM = jnp.einsum(
        "BGNE,BMGE->BGNM", query_BGNE, key_BLGE, preferred_element_type=jnp.float32
    )
    score_BGRLM = score_BGNM.reshape(batch, groups, -1, length, length)
    score_BGRLM = soft_cap(score_BGRLM, cap, scale)
    lowest = jnp.finfo(jnp.float32).min
    share_BGRLM = jax.nn.softmax(jnp.where(mask[:, :, None], score_BGRLM, lowest))
    share_BGNM = share_BGRLM.astype(value_BLGE.dtype).reshape(score_BGNM.shape)
    mixed_BGNE = jnp.einsum("BGNM,BMGE->BGNE", share_BGNM, value_BLGE)  # the shares as they lie
    mixed_BGRLE = mixed_BGNE.reshape(batch, groups, -1, length, size)
    return mixed_BGRLE.transpose(0, 3, 1, 2, 4).reshape(query_BLHE.shape)
