"""The decoder with its layers side by side: one array per layer and weight, as decoding reads them.

A scan over stacked weights copies each layer's weights out of the stack in every step. Where a step
is one token per row, those copies cost more than the products; apart, weights are read in place.
"""

import functools
import weakref
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from jaxdistill.models import blocks, decoder, rope
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.attention import Attend
from jaxdistill.models.quantized import is_kernel
from jaxdistill.sharding import RULES
from jaxdistill.types import Outputs

# The weights of the model used last; they go when its own parameters go.
_kept: dict[tuple, tuple[list[weakref.ref], Any]] = {}


def weights(config: DecoderConfig, params: Any, dtype: Any) -> dict:
    """The parameters with `layers` as a tuple of one tree per layer, cast to `dtype` once.

    Norms and routers keep their dtype. The result is kept while `params` lives and no other model
    asks.
    """
    dtype = np.dtype(dtype)
    # All of them: adapters of one model may change beside the same embedding.
    owners = jax.tree.leaves(params)
    key = (id(params["embedding"]), dtype, config)
    found = _kept.get(key)
    if found is not None and _same([ref() for ref in found[0]], owners):
        return found[1]
    made = _split(config, dtype, params)
    _kept.clear()
    _kept[key] = ([weakref.ref(owner, lambda _: _kept.pop(key, None)) for owner in owners], made)
    return made


def _same(kept: list, owners: list) -> bool:
    return len(kept) == len(owners) and all(a is b for a, b in zip(kept, owners, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _split(config, dtype, params):
    cast = functools.partial(jax.tree_util.tree_map_with_path, _cast(dtype), is_leaf=is_kernel)
    layers = params["layers"]
    one = lambda number: cast(jax.tree.map(lambda leaf: leaf[number], layers))
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    return cast(rest) | {"layers": tuple(one(number) for number in range(config.layers))}


def _cast(dtype):
    def cast(path, weight):
        return weight if decoder.kept_wide(path) else weight.astype(dtype)

    return cast


@functools.lru_cache(maxsize=256)
def _layer(config: DecoderConfig) -> nnx.GraphDef:
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
        decoder.shapes(config)["layers"],
    )
    return nnx.split(blocks.Layer(config, shapes))[0]


def apply(
    config: DecoderConfig,
    weights: dict,
    tokens_BL: Array,
    positions_BL: Array,
    attend: Attend,
    states: tuple,
) -> tuple[Outputs, tuple]:
    """Hidden states and head, and the new state of every layer; as `Decoder`, without a scan.

    Args:
      config: the model's configuration.
      weights: from `weights`.
      tokens_BL: int32 [B, L].
      positions_BL: int32 [B, L].
      attend: as in `decoder`, but with one layer's state.
      states: one per layer.
    """
    turn, table = rope.per_layer(config, positions_BL), weights["embedding"]
    x_BLD = decoder.embed(
        config, table, weights.get("positions"), tokens_BL, positions_BL, table.dtype
    )
    new = []
    for number, (params, state) in enumerate(zip(weights["layers"], states, strict=True)):
        layer = nnx.merge(_layer(config), params)
        x_BLD, state = layer(x_BLD, turn(number), attend, state, number, RULES)
        new.append(state)
    norm = blocks.Norm(config, weights["final_norm"])
    head = table if config.tied_head else weights["head"]
    return Outputs(norm(x_BLD), head, softcap=config.logits_softcap), tuple(new)
