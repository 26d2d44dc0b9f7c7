"""Layers whose parameters wait in the memory of the host, and come to the device one at a time."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxdistill.sharding import HOST


def waits(name: str) -> bool:
    """Whether a weight, by its dotted name, is one of the layers, which are read one by one."""
    return name.startswith("layers.")


def moved(tree: Any) -> Any:
    """Arrays in the memory of their devices' host, each laid out over these as it was."""
    place = lambda leaf: leaf.sharding.with_memory_kind(HOST)
    return jax.block_until_ready(jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf)), tree))


def waiting(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with all layers in the host's memory; their arrays on the device are deleted.

    One weight after the other goes: those that wait already stay.
    """

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.sharding.memory_kind == HOST:
            return leaf
        away = moved(leaf)
        leaf.delete()
        return away

    return {**params, "layers": jax.tree.map(one, params["layers"])}


def abstract(params: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes and places of `waiting`, from those of the parameters."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        place = leaf.sharding.with_memory_kind(HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return {**params, "layers": jax.tree.map(one, params["layers"])}


def brought(tree: Any) -> Any:
    """Parameters on the device, inside a program: those that wait on the host are copied."""

    def one(leaf: Any) -> Any:
        if jax.typeof(leaf).memory_space != jax.memory.Space.Host:
            return leaf
        return jax.device_put(leaf, jax.memory.Space.Device)

    return jax.tree.map(one, tree)
