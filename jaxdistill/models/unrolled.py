"""The decoder with its layers side by side: one array per layer and weight, as decoding reads them.

A scan over stacked weights copies each layer's weights out of the stack in every step. Where a step
is one token per row, those copies cost more than the products; apart, weights are read in place.

    weights(config, params, dtype)   a second copy, kept while the first lives
    take(model)                      instead of the first: for whoever only generates
"""

import dataclasses
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
from jaxdistill.models.model import Model, on_mesh
from jaxdistill.models.quantized import is_kernel
from jaxdistill.sharding import RULES
from jaxdistill.types import Outputs

# The weights of the model used last; they go when its own parameters go.
_kept: dict[tuple, tuple[list[weakref.ref], Any]] = {}


def weights(config: DecoderConfig, params: Any, dtype: Any) -> dict:
    """The parameters with `layers` as a tuple of one tree per layer, cast to `dtype` once.

    Norms and routers keep their dtype. The result is kept while `params` lives and no other model
    asks; parameters that `take` has made are returned as they are, if they have this dtype.
    """
    dtype = np.dtype(dtype)
    if decoder.is_apart(params) and params["embedding"].dtype == dtype:
        return params
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


def take(model: Model) -> Model:
    """The model with its layers side by side, made of the given one, whose parameters are used up.

    It generates without a second copy of its weights. Weight after weight is taken: what is held
    at a time is the model and, once more, the largest of its weights with all its layers.
    """
    stacked, tree = jax.tree.flatten(model.params["layers"])
    apart = []
    with on_mesh(model.params):
        for leaf in stacked:
            apart.append(jax.block_until_ready(_slices(leaf)))
            leaf.delete()
    layers = tuple(tree.unflatten(leaves) for leaves in zip(*apart, strict=True))
    return dataclasses.replace(model, params=model.params | {"layers": layers})


@jax.jit
def _slices(stacked: Array) -> tuple[Array, ...]:
    return tuple(stacked[number] for number in range(stacked.shape[0]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _split(config, dtype, params):
    cast = functools.partial(jax.tree_util.tree_map_with_path, _cast(dtype), is_leaf=is_kernel)
    layers = params["layers"]
    if not decoder.is_apart(params):
        one = lambda number: jax.tree.map(lambda leaf: leaf[number], layers)
        layers = tuple(one(number) for number in range(config.layers))
    return cast(params | {"layers": layers})


def _cast(dtype):
    def cast(path, weight):
        return weight if decoder.kept_wide(path) else weight.astype(dtype)

    return cast


@functools.lru_cache(maxsize=256)
def graphdef(config: DecoderConfig) -> nnx.GraphDef:
    """The structure of one layer: `nnx.merge(graphdef, params)`."""
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
    # Behind a barrier, or XLA would compute the cosines again in every layer.
    turn, table_VD = rope.per_layer(config, positions_BL, shared=True), weights["embedding"]
    x_BLD = decoder.embed(
        config, table_VD, weights.get("positions"), tokens_BL, positions_BL, table_VD.dtype
    )
    new = []
    for number, (params, state) in enumerate(zip(weights["layers"], states, strict=True)):
        layer = nnx.merge(graphdef(config), params)
        x_BLD, state = layer(x_BLD, turn(number), attend, state, number, RULES)
        new.append(state)
    return outputs(config, rest(weights), x_BLD), tuple(new)


def rest(weights: dict) -> dict:
    """What is not of a layer."""
    return {name: leaf for name, leaf in weights.items() if name != "layers"}


def outputs(config: DecoderConfig, rest: dict, x_BLD: Array) -> Outputs:
    """What a model returns, from what comes out of its last layer."""
    norm = blocks.Norm(config, rest["final_norm"])
    head = rest["embedding"] if config.tied_head else rest["head"]
    return Outputs(norm(x_BLD), head, softcap=config.logits_softcap)
