"""Ring attention: each device of `context` has a part of every row, and keys and values travel.

    chunks of a row   0 1 2 3 4 5 6 7       device   0    1    2    3
                                            has      0 7  1 6  2 5  3 4     the balanced order

Queries stay. Keys, values and segments go round the ring, a device further in every step, and meet
the queries block by block (`attention_blocks`), so that no device ever has a row's keys together.
In the balanced order each device sees as many earlier tokens as any other: in every step either all
its queries meet the other's early chunk, or its late chunk meets both.

Reference: Liu, Zaharia, Abbeel 2023, arXiv 2310.01889; the order as in Brandon et al. 2023, arXiv
2311.09431, by chunks from both ends.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jaxdistill.models import attention_blocks as blocks
from jaxdistill.sharding import AXES, BATCH_AXES, current_mesh, present, row_parts
from jaxdistill.types import Outputs

AXIS = "context"
BLOCK = 1024  # tokens: what is carried from block to block is read and written with each
_PADDING = -1  # segment of what fills a chunk up: no token sees it


def devices(length: int) -> int:
    """Devices that share rows of so many tokens as a ring; 1 where none of these is at hand."""
    count = sizes()[AXIS]
    return count if length % (2 * count) == 0 else 1


def sizes() -> Mapping[str, int]:
    """The axes of the mesh in context, all 1 where there is none."""
    mesh = current_mesh()
    return dict.fromkeys(AXES, 1) if mesh is None else mesh.shape


class _RingSettings(NamedTuple):
    """What is known when the program is made.

    Attributes:
      scale: of query times key.
      cap: soft cap of the scores, or None.
      count: devices of the ring.
      chunk: blocks of a chunk.
      tokens: of a chunk, without what fills its last block.
      block: tokens of a block.
      windowed: whether there may be a window.
    """

    scale: float
    cap: float | None
    count: int
    chunk: int
    tokens: int
    block: int
    windowed: bool


def attention(
    scale: float, cap: float | None, windowed: bool
) -> Callable[[Array, Array, Array, Array, Array], Array]:
    """mixed(query [B, L, H, E], key, value [B, L, G, E], segments [B, L], window): the ring.

    Rows are in the balanced order.

    Args:
      scale: of query times key.
      cap: soft cap of the scores, or None.
      windowed: whether `window`, the tokens that a query sees with itself, may be less than L.
    """
    return spread(functools.partial(_local, scale, cap, windowed))


def spread(local: Callable[..., Array]) -> Callable[..., Array]:
    """A ring's attention, run by each device on its part of rows and heads.

    mixed(query [B, L, H, E], key, value [B, L, G, E], segments [B, L], *rest) of
    local(devices of the ring, ...): rest is the same on every device.
    """

    def mixed(query, key, value, segments, *rest):
        mesh = current_mesh()
        assert mesh is not None, "`devices` says so"
        place = _places(query, 1)
        divides = key.shape[2] % mesh.shape["tensor"] == 0
        heads = PartitionSpec(*place, "tensor" if divides else None, None)
        whole = (PartitionSpec(),) * len(rest)
        return jax.shard_map(
            functools.partial(local, mesh.shape[AXIS]),
            mesh=mesh,
            in_specs=(heads, heads, heads, place, *whole),
            out_specs=heads,
            check_vma=False,
        )(query, key, value, segments, *rest)

    return mixed


def _places(array: Array, dim: int) -> PartitionSpec:
    """Rows over the mesh where they divide, and their length, which is `dim`, over the ring."""
    mesh = current_mesh()
    assert mesh is not None
    whole = array.shape[dim - 1] % row_parts(mesh) != 0
    rows = None if whole else present(BATCH_AXES, mesh)
    return PartitionSpec(*(None,) * (dim - 1), rows, AXIS)


def _local(scale, cap, windowed, count, query, key, value, segments, window) -> Array:
    tokens = query.shape[1] // 2
    block = min(BLOCK, tokens)
    missing = -tokens % block

    def filled(array: Array, fill: int = 0) -> Array:
        """[B, 2 chunks, ...] with chunks of whole blocks."""
        halves = array.reshape(array.shape[0], 2, tokens, *array.shape[2:])
        widths = ((0, 0), (0, 0), (0, missing)) + ((0, 0),) * (array.ndim - 2)
        halves = jnp.pad(halves, widths, constant_values=fill)
        return halves.reshape(array.shape[0], -1, *array.shape[2:])

    arrays = *map(filled, (query, key, value)), filled(segments, _PADDING)
    cut = blocks.cut(block, *arrays)
    chunk = (tokens + missing) // block
    static = _RingSettings(scale, cap, count, chunk, tokens, block, windowed)
    mixed = blocks.joined(_attend(static, cut, window))
    halves = mixed.reshape(mixed.shape[0], 2, tokens + missing, *mixed.shape[2:])[:, :, :tokens]
    return halves.reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _RingSettings, own: blocks.Blocks, window: Array) -> Array:
    return _forward(static, own, window)[0]


def _forward(static: _RingSettings, own: blocks.Blocks, window: Array) -> tuple[Array, Array]:
    """(mixed values, log-sum-exp of the scores), of this device's queries."""

    def meet(carry: Any, others: blocks.Keys, step: Any) -> Any:
        pair = functools.partial(blocks.forward_pair, _of_pair(static, window), own, others)
        return _meet(static, pair, carry, step, window)

    travelling = blocks.Keys(own.key, own.value, own.segments)
    further = sent(static.count, travelling)  # sent while the own ones are met
    carry = meet(blocks.forward_start(own.query), travelling, 0)

    def one(carried, step):
        carry, others = carried
        return (meet(carry, others, step), sent(static.count, others)), None

    steps = jnp.arange(1, static.count - 1)
    (carry, last), _ = jax.lax.scan(one, (carry, further), steps)
    carry = meet(carry, last, static.count - 1)
    return blocks.forward_end(carry, own.value.dtype)


def _attend_fwd(static: _RingSettings, own: blocks.Blocks, window: Array):
    mixed, lse = _forward(static, own, window)
    return mixed, (own, window, mixed, lse)


def _attend_bwd(static: _RingSettings, kept: Any, slope: Array):
    """Gradients of keys and values travel with them, and arrive at home after a whole turn."""
    own, window, mixed, lse = kept
    above = blocks.Above(slope, lse, blocks.inner_product(slope, mixed))
    zeros = lambda like: jnp.zeros(like.shape, jnp.float32)
    nothing = zeros(own.key), zeros(own.value)

    def meet(by_query: Array, others: blocks.Keys, step: Any) -> Any:
        one = functools.partial(blocks.backward_pair, _of_pair(static, window), own, others, above)
        return _meet(static, one, (by_query, *nothing), step, window)

    travelling = blocks.Keys(own.key, own.value, own.segments)
    by_query, *sums = meet(zeros(own.query), travelling, 0)

    def one(carried, step):
        by_query, others, sums = carried
        others, sums = sent(static.count, (others, sums))
        by_query, *more = meet(by_query, others, step)
        return (by_query, others, [old + new for old, new in zip(sums, more, strict=True)]), None

    steps = jnp.arange(1, static.count)
    (by_query, _, sums), _ = jax.lax.scan(one, (by_query, travelling, sums), steps)
    by_key, by_value = sent(static.count, sums)
    parts = zip((by_query, by_key, by_value), own[:3], strict=True)
    query, key, value = (slope.astype(like.dtype) for slope, like in parts)
    none = lambda array: np.zeros(array.shape, jax.dtypes.float0)  # of whole numbers
    segments: Any = none(own.segments)
    return blocks.Blocks(query, key, value, segments), none(window)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _of_pair(static: _RingSettings, window: Array) -> blocks.BlockSettings:
    return blocks.BlockSettings(static.scale, static.cap, window, static.block)


def sent(count: int, arrays: Any) -> Any:
    """What the device before had, in a ring of so many."""
    ring = [(n, (n + 1) % count) for n in range(count)]
    return jax.tree.map(lambda array: jax.lax.ppermute(array, AXIS, ring), arrays)


def _meet(
    static: _RingSettings, pair: Callable[..., Any], carry: Any, step: Any, window: Array
) -> Any:
    """The carry after the keys that came in `step` have met this device's queries.

    Args:
      static: see there.
      pair: carry, block of queries, block of keys, distance of both in tokens -> carry.
      carry: of `pair`.
      step: 0: the device's own; an int where it is, else traced.
      window: tokens that a query sees.
    """
    here = jax.lax.axis_index(AXIS)
    there = (here - step) % static.count
    own_step = isinstance(step, int) and step == 0
    listed = map(jnp.asarray, _own_pairs(static) if own_step else _pairs(static))

    def one(carry, listed):
        early, late = listed
        i, j = early if own_step else jnp.where(there < here, early, late)
        distance = _start(static, here, i) - _start(static, there, j)
        met = lambda carry: pair(carry, i, j, distance)
        if not static.windowed:
            return met(carry), None
        return jax.lax.cond(distance - static.block < window, met, lambda x: x, carry), None

    return jax.lax.scan(one, carry, tuple(listed))[0]


def _start(static: _RingSettings, device: Array, block: Array) -> Array:
    """The first token of a device's block, in the row."""
    is_late = block >= static.chunk
    chunk = jnp.where(is_late, 2 * static.count - 1 - device, device)
    return chunk * static.tokens + jnp.where(is_late, block - static.chunk, block) * static.block


def _own_pairs(static: _RingSettings) -> tuple[np.ndarray, np.ndarray]:
    """(block of queries, block of keys) of a device's own that see each other, [P, 2]; twice."""
    every = range(2 * static.chunk)
    found = np.asarray([(i, j) for i in every for j in every if j <= i], np.int32)
    return found, found


def _pairs(static: _RingSettings) -> tuple[np.ndarray, np.ndarray]:
    """The same of what comes from devices with earlier first chunks, and with later ones."""
    chunk = static.chunk
    grid = lambda queries, keys: [(i, j) for i in queries for j in keys]
    first, second, both = range(chunk), range(chunk, 2 * chunk), range(2 * chunk)
    earlier, later = grid(both, first), grid(second, both)
    return np.asarray(earlier, np.int32), np.asarray(later, np.int32)


def order(length: int) -> tuple[Callable[[Any], Any], Callable[[Outputs], Outputs]]:
    """(arrays [B, L, ...] or None in the balanced order, outputs in the row's own): of a ring.

    Everything between the two is of one token at a time, or is told its position.
    """
    count = devices(length)
    if count == 1:
        return lambda tree: tree, lambda outputs: outputs

    def back(outputs: Outputs) -> Outputs:
        own = lambda tree, dim: jax.tree.map(lambda x: _moved(count, x, dim, _in_order), tree)
        return dataclasses.replace(
            outputs,
            hidden=own(outputs.hidden, 1),
            taps=own(outputs.taps, 2),
            routing=own(outputs.routing, 2),
            relations=own(outputs.relations, 1),
        )

    return lambda tree: jax.tree.map(lambda x: _moved(count, x, 1, _balanced), tree), back


def _moved(count: int, array: Array, dim: int, local: Callable) -> Array:
    place = _places(array, dim)
    return jax.shard_map(
        functools.partial(local, count, dim),
        mesh=current_mesh(),
        in_specs=place,
        out_specs=place,
        check_vma=False,
    )(array)


def _routes(count: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where chunks go that stand first on their device in the row's order, and those that do not.

    >>> _routes(2)  # chunks 0 1 | 2 3 become 0 3 | 1 2
    ([(0, 0), (1, 1)], [(0, 1), (1, 0)])
    """
    home = lambda chunk: min(chunk, 2 * count - 1 - chunk)
    return [(n, home(2 * n)) for n in range(count)], [(n, home(2 * n + 1)) for n in range(count)]


def _balanced(count: int, dim: int, array: Array) -> Array:
    even, odd = (
        jax.lax.ppermute(half, AXIS, route)
        for half, route in zip(jnp.split(array, 2, axis=dim), _routes(count), strict=True)
    )
    return jnp.concatenate(_by_parity(even, odd), axis=dim)


def _in_order(count: int, dim: int, array: Array) -> Array:
    halves = _by_parity(*jnp.split(array, 2, axis=dim))
    home = ([(there, here) for here, there in route] for route in _routes(count))
    found = (jax.lax.ppermute(half, AXIS, way) for half, way in zip(halves, home, strict=True))
    return jnp.concatenate([*found], axis=dim)


def _by_parity(one: Array, other: Array) -> tuple[Array, Array]:
    """Device n has chunks n and 2 * count - 1 - n: the even one of them first, or back again."""
    even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.where(even, one, other), jnp.where(even, other, one)
