"""Attention by JAX's own Pallas kernel for TPUs, splash attention: scores are never written out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import PartitionSpec

from jaxdistill.errors import ConfigError
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.sharding import BATCH_AXES, current_mesh

_LANES = 128  # blocks of tokens are multiples of it
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
    problem = None
    if length % _LANES:
        problem = f"rows of {length} tokens are no multiple of {_LANES}"
    elif context > 1:
        problem = f"mesh.context = {context} divides rows"
    elif config.kv_heads % tensor:
        problem = f"{config.kv_heads} key heads do not divide over mesh.tensor = {tensor}"
    if problem:
        raise ConfigError(f"attention = 'splash': {problem}: change it, or take xla")


def attention(
    config: DecoderConfig, length: int, scale: float, interpret: bool = False
) -> Callable[[Array, Array, Array, Array, Array], Array]:
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
        kernels = [_kernel(config, length, window, heads, interpret) for window in kinds]
        head_first = lambda x: x.swapaxes(1, 2)
        segments = kernels.SegmentIds(q=segment_ids_BL, kv=segment_ids_BL)
        inputs = (head_first(query_BLHE * scale), head_first(key_BLGE), head_first(value_BLGE))
        branches = [lambda q, k, v, s, run=run: jax.vmap(run)(q, k, v, segment_ids=s)
                    for run in kernels]  # fmt: skip
        return head_first(jax.lax.switch(kind, branches, *inputs, segments))

    def mixed(index, query_BLHE, key_BLGE, value_BLGE, segment_ids_BL):
        arrays = (query_BLHE, key_BLGE, value_BLGE, segment_ids_BL)
        kind = jnp.asarray(number)[index] if config.windows else jnp.int32(0)
        mesh = current_mesh()
        if mesh is None:
            return local(*arrays, kind)
        check(config, length, mesh.shape["tensor"], mesh.shape["context"])
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        batch = BATCH_AXES if query_BLHE.shape[0] % rows == 0 else None
        heads = PartitionSpec(batch, None, "tensor", None)
        specs = (heads, heads, heads, PartitionSpec(batch, None), PartitionSpec())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
            *arrays, kind
        )

    return mixed


def _kernel(config: DecoderConfig, length: int, window: int, heads: int, interpret: bool):
    shape = (length, length)
    one = kernels.CausalMask(shape)
    if window < length:
        one = kernels.LocalMask(shape, (window - 1, 0), 0)
    size = next(block for block in _BLOCKS if length % block == 0)
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
        mask=kernels.MultiHeadMask([one] * heads),
        block_sizes=blocks,
        attn_logits_soft_cap=config.attention_softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
