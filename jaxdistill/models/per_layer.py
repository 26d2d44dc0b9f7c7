"""Parameters with one tree per layer in place of stacked layers: the form that generation reads.

A scan over stacked weights copies each layer's weights out of the stack in every step. Where a step
is one token per row, those copies cost more than the products; split, weights are read in place.

    split(config, params, dtype)   a second copy, beside the stacked one
    consume(params)                the only copy: for whoever only generates
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.kernel import is_kernel
from jaxdistill.sharding import on_mesh


def is_split(params: Mapping[str, Any]) -> bool:
    """Whether `layers` is a tuple of one tree per layer."""
    return isinstance(params["layers"], tuple)


def keeps_dtype(path: tuple) -> bool:
    """Whether a layer reads a weight in the dtype it is held in: those of norms and routers."""
    name = path[-2].key if len(path) > 1 else ""
    return name == "router" or name.endswith("norm")


def split(config: DecoderConfig, params: Mapping[str, Any], dtype: DTypeLike) -> dict:
    """The parameters with one tree per layer, cast to `dtype`; norms and routers keep theirs.

    Parameters that are split and have this dtype are returned as they are.
    """
    dtype = jnp.dtype(dtype)
    if is_split(params) and params["embedding"].dtype == dtype:
        return dict(params)
    return _split(config, dtype, params)


def stack(params: Mapping[str, Any]) -> dict:
    """The parameters with their layers stacked; the inverse of `split`."""
    return {**params, "layers": jax.tree.map(lambda *one: jnp.stack(one), *params["layers"])}


def consume(params: Mapping[str, Any]) -> dict:
    """The parameters with one tree per layer; the given stacks are deleted.

    One weight after the other is split: what is held at a time is the parameters and, once more,
    the largest weight with all its layers.
    """
    stacks, tree = jax.tree.flatten(params["layers"])
    slices = []
    with on_mesh(params):
        for leaf in stacks:
            slices.append(jax.block_until_ready(_slices(leaf)))
            leaf.delete()
    layers = tuple(tree.unflatten(leaves) for leaves in zip(*slices, strict=True))
    return {**params, "layers": layers}


@jax.jit
def _slices(stacked: Array) -> tuple[Array, ...]:
    return tuple(stacked[number] for number in range(stacked.shape[0]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _split(config, dtype, params):
    layers = params["layers"]
    if not is_split(params):
        one = lambda number: jax.tree.map(lambda leaf: leaf[number], layers)
        layers = tuple(one(number) for number in range(config.layers))
    cast = lambda path, weight: weight if keeps_dtype(path) else weight.astype(dtype)
    split = {**params, "layers": layers}
    return jax.tree_util.tree_map_with_path(cast, split, is_leaf=is_kernel)
