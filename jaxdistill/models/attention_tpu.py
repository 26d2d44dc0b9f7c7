"""Attention by JAX's own Pallas kernel for TPUs, splash attention: scores are never written out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from jaxdistill.errors import ConfigError
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.sharding import by_device, current_mesh

LANES = 128  # blocks of tokens are multiples of it
_BLOCKS = (512, 256, 128)


def check(config: DecoderConfig, length: int, tensor: int = 1, context: int = 1) -> None:
    """Whether the kernel can compute this.

    Args:
      config: of the model.
      length: tokens of a row.
      tensor: devices that share heads.
      context: devices that share a row.

    Raises:
      ConfigError: naming what it cannot.
    """
    reason = problem(config, length, tensor, context)
    if reason:
        raise ConfigError(f"attention = 'splash': {reason}: change it, or take xla")


def problem(config: DecoderConfig, length: int, tensor: int = 1, context: int = 1) -> str | None:
    """What the kernel cannot compute of this, or None; arguments as in `check`."""
    if length % LANES:
        return f"rows of {length} tokens are no multiple of {LANES}"
    if context > 1:
        return f"mesh.context = {context} divides rows"
    if config.kv_heads % tensor and tensor % config.kv_heads:
        return f"{config.kv_heads} key heads do not divide over mesh.tensor = {tensor}"
    return None


def attention(
    config: DecoderConfig, length: int, scale: float, interpret: bool = False
) -> Callable[..., Array]:
    """mixed(layer index, query [B, L, H, E], key, value [B, L, G, E], segment_ids [B, L]).

    The kernel's mask is static: one kernel for each window among the layers, and a layer takes its
    own by its index. On a mesh each device runs it on its rows and heads.

    Args:
      config: of the model.
      length: L.
      scale: of query times key.
      interpret: run as plain JAX, on any device: for tests.
    """
    windows = [min(window or length, length) for window in config.windows or (length,)]
    kinds = sorted(set(windows))
    number = np.asarray([kinds.index(window) for window in windows], np.int32)

    def local(query_BLHE, key_BLGE, value_BLGE, segment_ids_BL, kind):
        heads = query_BLHE.shape[2]
        by_window = [
            kernel(_mask(length, window), heads, config.attention_softcap, interpret)
            for window in kinds
        ]
        head_first = lambda x: x.swapaxes(1, 2)
        segments = kernels.SegmentIds(q=segment_ids_BL, kv=segment_ids_BL)
        inputs = (head_first(query_BLHE * scale), head_first(key_BLGE), head_first(value_BLGE))
        branches = [lambda q, k, v, s, run=run: jax.vmap(run)(q, k, v, segment_ids=s)
                    for run in by_window]  # fmt: skip
        return head_first(jax.lax.switch(kind, branches, *inputs, segments))

    def mixed(index, query_BLHE, key_BLGE, value_BLGE, segment_ids_BL):
        if segment_ids_BL is None:
            segment_ids_BL = jnp.ones(query_BLHE.shape[:2], jnp.int32)
        arrays = (query_BLHE, key_BLGE, value_BLGE, segment_ids_BL)
        kind = jnp.asarray(number)[index] if config.windows else jnp.int32(0)
        mesh = current_mesh()
        if mesh is not None:
            check(config, length, mesh.shape["tensor"], mesh.shape["context"])
        return by_device(local)(*arrays, kind)

    return mixed


def _mask(length: int, window: int) -> Any:
    shape = (length, length)
    if window < length:
        return kernels.LocalMask(shape, (window - 1, 0), 0)
    return kernels.CausalMask(shape)


def kernel(
    mask: Any, heads: int, cap: float | None, interpret: bool, *, residuals: bool = False
) -> Any:
    """The kernel of one row: mixed values [H, L, E] of (query, key [G, M, E], value, segments).

    Args:
      mask: which queries see which keys, [L, M], the same for all heads.
      heads: H.
      cap: soft cap of the scores, or None.
      interpret: run as plain JAX.
      residuals: give (mixed values, (log-sum-exp of the scores [H, L],)), without a gradient.
    """
    size = next(block for block in _BLOCKS if all(side % block == 0 for side in mask.shape))
    blocks = kernels.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    return kernels.make_splash_mha(
        mask=kernels.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        save_residuals=residuals,
        attn_logits_soft_cap=cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
