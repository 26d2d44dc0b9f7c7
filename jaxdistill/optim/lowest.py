"""Which numbers of arrays are the lowest, so many and no more, without sorting: on any sharding.

A threshold is found by bisection over the 32 bits of a number: every step is a sum over the arrays,
which devices that share them add up, and no array is gathered, sorted or copied.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

MOST = 2**32  # numbers that are counted together, in 32 bits


def order(numbers: Array) -> Array:
    """uint32 in the order of the float32 numbers, all of them above 0."""
    bits = jax.lax.bitcast_convert_type(numbers.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))


def lowest(keys: Sequence[Array], count: Array, axes: tuple[int, ...] | None) -> list[Array]:
    """Which `count` keys are the lowest; of equal ones those that come first.

    Args:
      keys: uint32 arrays; fewer than `MOST` are counted together.
      count: uint32, how many.
      axes: those over which keys are counted together, each array by itself; None: all arrays are
        counted together.

    Returns:
      bool arrays, True for the lowest.
    """

    def counted(inside: Sequence[Array]) -> Array:
        sums = [
            jnp.sum(one, axis=axes, keepdims=axes is not None, dtype=jnp.uint32) for one in inside
        ]
        return sum(sums[1:], sums[0])

    places, offset = [], 0
    for one in keys:
        places.append(_places(one.shape, axes) + jnp.uint32(offset))
        offset += one.size if axes is None else 0
    level = _least(lambda at: counted([one <= at for one in keys]) >= count, keys[0], axes)
    left = count - counted([one < level for one in keys])
    equal = [one == level for one in keys]
    last = _least(
        lambda at: counted([e & (p <= at) for e, p in zip(equal, places, strict=True)]) >= left,
        keys[0],
        axes,
    )
    return [
        (one < level) | (e & (p <= last) & (left > 0))
        for one, e, p in zip(keys, equal, places, strict=True)
    ]


def _places(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> Array:
    """uint32, the number of each element among those that are counted with it."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        if axes is None or axis - len(shape) in axes:
            index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            place, stride = place + index * jnp.uint32(stride), stride * shape[axis]
    return place


def _least(holds: Callable[[Array], Array], like: Array, axes: tuple[int, ...] | None) -> Array:
    """The least uint32 for which a condition holds that holds from there on, or the greatest."""

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        found = holds(middle)
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    shape = ()
    if axes is not None:
        shape = tuple(
            1 if axis - like.ndim in axes else size for axis, size in enumerate(like.shape)
        )
    ends = jnp.zeros(shape, jnp.uint32), jnp.full(shape, 2**32 - 1, jnp.uint32)
    return jax.lax.fori_loop(0, 32, halve, ends)[1]
