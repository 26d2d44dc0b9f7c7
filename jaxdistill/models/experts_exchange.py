"""Rows go to the devices of their experts and come back: all-to-all, in rounds, none dropped.

    device 0:  rows for 0 0 0 0 1 1   round 1 sends room = 3 rows to each:  0 0 0 | 1 1 .
    device 1:  rows for 0 0 1 1 1 1                                         0 0 . | 1 1 1
                                      round 2:                              0 . . | . . .  and so on

What is sent has a size that is known when the program is made, how many rows go where is not: the
rounds go on until no device has a row left. Memory is that of one round, forward and back.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# What a round has room for, in parts of what each device gets where all get as much. Routers are
# trained to balance: mostly one round is enough.
ROOM = 1.5

# (rows [Q, D], numbers [Q], *kernels) -> what a device makes of rows of its experts, [Q, D]; its
# numbers count from 0, and a number that is no expert of its gives 0.
Apply = Callable[..., Array]


class Devices(NamedTuple):
    """The devices that share experts.

    Attributes:
      axis: of the mesh.
      count: devices along it.
      everywhere: all axes of the mesh: all devices have as many rounds.
    """

    axis: str
    count: int
    everywhere: tuple[str, ...]


class _ExchangeSettings(NamedTuple):
    devices: Devices
    apply: Apply
    room: int


class _Route(NamedTuple):
    """Which rows go where: those of a device stand together, in the order of devices.

    Attributes:
      starts_E: the first row of each device.
      counts_E: how many it gets.
      number_P: of each row's expert on its device.
      rounds: how many there are.
    """

    starts_E: Array
    counts_E: Array
    number_P: Array
    rounds: Array


def exchanged(
    devices: Devices,
    apply: Apply,
    rows_PD: Array,
    device_P: Array,
    number_P: Array,
    kernels: tuple[Array, ...],
) -> Array:
    """What the devices of their experts make of rows, [P, D]; inside of a shard_map.

    Args:
      devices: that share the experts.
      apply: what a device does with rows of its experts.
      rows_PD: this device's, sorted by device.
      device_P: int32 [P], which device has a row's expert, rising.
      number_P: int32 [P], the expert's number there.
      kernels: of this device's experts.
    """
    count = devices.count
    room = min(len(device_P), max(8, math.ceil(ROOM * len(device_P) / count)))
    counts_E = jnp.zeros(count, jnp.int32).at[device_P].add(1)
    starts_E = jnp.cumsum(counts_E) - counts_E
    rounds = jax.lax.pmax(-(-jnp.max(counts_E) // room), devices.everywhere)
    route = _Route(starts_E, counts_E, number_P, rounds)
    return _made(_ExchangeSettings(devices, apply, room), rows_PD, route, kernels)


def _places(static: _ExchangeSettings, route: _Route, number: Array) -> Array:
    """Which rows a round sends to each device, [E, room]; behind the last row: none."""
    nth_C = number * static.room + jnp.arange(static.room)
    there = nth_C[None, :] < route.counts_E[:, None]
    none_EC = len(route.number_P) + jnp.arange(there.size).reshape(there.shape)
    return jnp.where(there, route.starts_E[:, None] + nth_C[None, :], none_EC)


def _send(static: _ExchangeSettings, array: Array, places_EC: Array, fill: int = 0) -> Array:
    """The rows of these places, each to its device: [E * room, ...], those of device 0 first."""
    sent = jnp.take(array, places_EC, axis=0, mode="fill", fill_value=fill)
    return _across(static, sent).reshape(-1, *array.shape[1:])


def _back(static: _ExchangeSettings, rows: Array, like: Array, places_EC: Array) -> Array:
    """`like` with the rows that came by `_send`, sent back to where they were."""
    back = _across(static, rows.reshape(*places_EC.shape, *rows.shape[1:]))
    return like.at[places_EC].set(back.astype(like.dtype), mode="drop", unique_indices=True)


def _across(static: _ExchangeSettings, array_EC: Array) -> Array:
    return jax.lax.all_to_all(array_EC, static.devices.axis, 0, 0, tiled=True)


def _in_rounds(route: _Route, one: Callable[[Array, Any], Any], start: Any) -> Any:
    def step(carry):
        number, value = carry
        return number + 1, one(number, value)

    return jax.lax.while_loop(lambda carry: carry[0] < route.rounds, step, (jnp.int32(0), start))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _made(
    static: _ExchangeSettings, rows_PD: Array, route: _Route, kernels: tuple[Array, ...]
) -> Array:
    def one(number, made_PD):
        places = _places(static, route, number)
        came = _send(static, rows_PD, places)
        numbers = _send(static, route.number_P, places, fill=-1)
        return _back(static, static.apply(came, numbers, *kernels), made_PD, places)

    return _in_rounds(route, one, jnp.zeros_like(rows_PD))


def _made_fwd(static: _ExchangeSettings, rows_PD: Array, route: _Route, kernels: tuple[Array, ...]):
    return _made(static, rows_PD, route, kernels), (rows_PD, route, kernels)


def _made_bwd(static: _ExchangeSettings, kept: Any, slope_PD: Array):
    rows_PD, route, kernels = kept

    def one(number, sums):
        by_rows, by_kernels = sums
        places = _places(static, route, number)
        came, slopes = (_send(static, array, places) for array in (rows_PD, slope_PD))
        numbers = _send(static, route.number_P, places, fill=-1)
        apply = lambda came, *kernels: static.apply(came, numbers, *kernels)
        by_came, *more = jax.vjp(apply, came, *kernels)[1](slopes)
        added = [sum + new.astype(sum.dtype) for sum, new in zip(by_kernels, more, strict=True)]
        return _back(static, by_came, by_rows, places), added

    wide = [
        jnp.zeros(kernel.shape, jnp.promote_types(kernel.dtype, jnp.float32)) for kernel in kernels
    ]
    by_rows, by_kernels = _in_rounds(route, one, (jnp.zeros_like(rows_PD), wide))
    none = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), route)
    return (
        by_rows,
        none,
        tuple(sum.astype(kernel.dtype) for sum, kernel in zip(by_kernels, kernels, strict=True)),
    )


_made.defvjp(_made_fwd, _made_bwd)
