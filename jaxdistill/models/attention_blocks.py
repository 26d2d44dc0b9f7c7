"""Attention in blocks of queries and keys, in plain JAX: memory grows with the row, not its square.

    for every block of queries: for every block of keys that it sees: scores, shares, mixed values

A running maximum and sum make the shares of a row exact although its scores never exist together;
the way back makes them again from what the way forward kept, the mixed values and log-sum-exp of
each query (Rabe and Staats, arXiv:2112.05682; Dao et al., arXiv:2205.14135). Blocks that no query
sees, behind the diagonal or outside of a window, are no part of the program.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.kernels.softcap import soft_cap, soft_cap_slope

SHORT = 512  # rows of up to so many tokens have all their scores at once: few enough, one program
BLOCK = 256
_LOWEST = -0.7 * float(np.finfo(np.float32).max)  # finite: a maximum of masked scores is subtracted


class BlockSettings(NamedTuple):
    """What is known when the program is made.

    Attributes:
      scale: of query times key.
      cap: soft cap of the scores, or None.
      window: tokens that a query sees, itself included.
      block: tokens of a block.
    """

    scale: float
    cap: float | None
    window: int | Array
    block: int = BLOCK


class Blocks(NamedTuple):
    """Queries, keys, values and segments, cut into n blocks of C tokens.

    Attributes:
      query: [n, B, G, R, C, E], R queries for each key head.
      key: [n, B, G, C, E].
      value: [n, B, G, C, E].
      segments: int32 [n, B, C].
    """

    query: Array
    key: Array
    value: Array
    segments: Array


class Keys(NamedTuple):
    """What queries meet, as in `Blocks`."""

    key: Array
    value: Array
    segments: Array


def attention(
    static: BlockSettings, query_BLHE: Array, key_BLGE: Array, value_BLGE: Array, segments_BL: Array
) -> Array:
    """Mixed values [B, L, H, E] of queries that see earlier tokens of their segment and window.

    Args:
      static: scale, cap, window, block.
      query_BLHE: [B, L, H, E].
      key_BLGE: [B, L, G, E]; G divides H.
      value_BLGE: [B, L, G, E].
      segments_BL: int32 [B, L].
    """
    length = query_BLHE.shape[1]
    # What is added behind a row is later than all of it, so that no query sees it.
    missing = -length % static.block
    fill = lambda x: jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
    arrays = map(fill, (query_BLHE, key_BLGE, value_BLGE, segments_BL))
    return joined(_attend(static, cut(static.block, *arrays)))[:, :length]


def joined(mixed: Array) -> Array:
    """[B, L, H, E] of mixed values in blocks [n, B, G, R, C, E]."""
    blocks, batch, groups, per_group, size, width = mixed.shape
    rows = mixed.transpose(1, 0, 4, 2, 3, 5)
    return rows.reshape(batch, blocks * size, groups * per_group, width)


def cut(block: int, query: Array, key: Array, value: Array, segments: Array) -> Blocks:
    """Arrays [B, L, ...] in blocks of so many tokens."""
    batch, length, heads, size = query.shape
    blocks, groups = length // block, key.shape[2]
    grouped = query.reshape(batch, blocks, block, groups, heads // groups, size)
    narrow = lambda x: x.reshape(batch, blocks, block, groups, size).transpose(1, 0, 3, 2, 4)
    return Blocks(
        query=grouped.transpose(1, 0, 3, 4, 2, 5),
        key=narrow(key),
        value=narrow(value),
        segments=segments.reshape(batch, blocks, block).swapaxes(0, 1),
    )


def pairs(blocks: int, block: int, window: int) -> np.ndarray:
    """(block of queries, block of keys) of every two that see each other, int32 [P, 2].

    >>> pairs(3, 4, 5).tolist()  # the first query of block 2 sees 4 keys before it
    [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2]]
    """
    reach = math.ceil((window - 1) / block)
    seen = [(i, j) for i in range(blocks) for j in range(max(0, i - reach), i + 1)]
    return np.asarray(seen, np.int32)


def _scores(
    static: BlockSettings, query, key, segments_q, segments_k, distance
) -> tuple[Array, Array]:
    """(capped scores, whether they count), float32 and bool [B, G, R, C, C].

    `distance` is by how many tokens the block of queries begins behind that of keys.
    """
    scores = jnp.einsum("bgrqe,bgke->bgrqk", query, key, preferred_element_type=jnp.float32)
    scores = soft_cap(scores, static.cap, static.scale)
    place = jnp.arange(static.block)
    age = distance + place[:, None] - place[None, :]
    seen = ((age >= 0) & (age < static.window))[None]
    seen = seen & (segments_q[:, :, None] == segments_k[:, None, :])
    return scores, seen[:, None, None]


def _take(array: Array, number: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(array, number, keepdims=False)


def _put(array: Array, new: Array, number: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(array, new, number, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: BlockSettings, blocks: Blocks) -> Array:
    return _forward(static, blocks)[0]


def _forward(static: BlockSettings, blocks: Blocks) -> tuple[Array, Array]:
    """(mixed values [n, B, G, R, C, E], log-sum-exp of the scores [n, B, G, R, C])."""

    def one(carry, pair):
        i, j = pair
        return forward_pair(static, blocks, blocks, carry, i, j, (i - j) * static.block), None

    carry, _ = jax.lax.scan(
        one, forward_start(blocks.query), _pair_list(static, blocks.query.shape[0])
    )
    return forward_end(carry, blocks.value.dtype)


def forward_start(query: Array) -> tuple[Array, Array, Array]:
    """Of no key yet: the highest score, the sum of shares, and the mixed values."""
    shape = query.shape
    highest = jnp.full(shape[:-1], _LOWEST, jnp.float32)
    return highest, jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape, jnp.float32)


def forward_pair(
    static: BlockSettings,
    own: Blocks,
    others: Blocks | Keys,
    carry: Any,
    i: Array,
    j: Array,
    distance: Array,
) -> Any:
    """The carry of `forward_start` after block i of `own` queries has met block j of `others` keys.

    `distance` is by how many tokens that block of queries begins behind that of keys.
    """
    query, segments = _take(own.query, i), _take(own.segments, i)
    key, value, beside = (_take(x, j) for x in (others.key, others.value, others.segments))
    scores, seen = _scores(static, query, key, segments, beside, distance)
    scores = jnp.where(seen, scores, _LOWEST)
    highest, total, mixed = (_take(x, i) for x in carry)
    new = jnp.maximum(highest, scores.max(-1))
    shares, kept = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
    total = total * kept + shares.sum(-1)
    added = jnp.einsum(
        "bgrqk,bgke->bgrqe",
        shares.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    mixed = mixed * kept[..., None] + added
    return tuple(_put(x, y, i) for x, y in zip(carry, (new, total, mixed), strict=True))


def forward_end(carry: Any, dtype: Any) -> tuple[Array, Array]:
    """(mixed values, log-sum-exp of the scores) once all keys have been met."""
    highest, total, mixed = carry
    return (mixed / total[..., None]).astype(dtype), highest + jnp.log(total)


def _pair_list(static: BlockSettings, blocks: int) -> tuple[Array, Array]:
    assert isinstance(static.window, int), "the list of pairs is part of the program"
    found = pairs(blocks, static.block, static.window)
    return jnp.asarray(found[:, 0]), jnp.asarray(found[:, 1])


def _attend_fwd(static: BlockSettings, blocks: Blocks):
    mixed, lse = _forward(static, blocks)
    return mixed, (blocks, mixed, lse)


def _attend_bwd(static: BlockSettings, kept: Any, slope: Array):
    blocks, mixed, lse = kept
    above = Above(slope, lse, inner_product(slope, mixed))
    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in blocks[:3])

    def one(carry, pair):
        i, j = pair
        distance = (i - j) * static.block
        return backward_pair(static, blocks, blocks, above, carry, i, j, distance), None

    sums, _ = jax.lax.scan(one, start, _pair_list(static, blocks.query.shape[0]))
    query, key, value = (x.astype(y.dtype) for x, y in zip(sums, blocks[:3], strict=True))
    none: Any = np.zeros(blocks.segments.shape, jax.dtypes.float0)  # of whole numbers
    return (Blocks(query, key, value, none),)


class Above(NamedTuple):
    """What the way back knows of queries.

    Attributes:
      slope: of the mixed values [n, B, G, R, C, E].
      lse: log-sum-exp of their scores [n, B, G, R, C].
      inner: slope times mixed values [n, B, G, R, C].
    """

    slope: Array
    lse: Array
    inner: Array


def inner_product(slope: Array, mixed: Array) -> Array:
    """Of the last dims, in float32."""
    return jnp.sum(slope.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)


def backward_pair(
    static: BlockSettings,
    own: Blocks,
    others: Blocks | Keys,
    above: Above,
    carry: Any,
    i: Array,
    j: Array,
    distance: Array,
) -> Any:
    """Gradients of query, key and value after block i of queries has met block j of keys."""
    query, segments = _take(own.query, i), _take(own.segments, i)
    key, value, beside = (_take(x, j) for x in (others.key, others.value, others.segments))
    slope, norm, inner = (_take(x, i) for x in above)
    parts = by_pair(static, query, key, value, segments, beside, distance, slope, norm, inner)
    at = (i, j, j)
    return tuple(_put(x, _take(x, n) + y, n) for x, y, n in zip(carry, parts, at, strict=True))


def by_pair(
    static: BlockSettings, query, key, value, segments_q, segments_k, distance, slope, lse, inner
) -> tuple[Array, Array, Array]:
    """What a block of queries and one of keys add to the gradients of query, key and value.

    shares = exp(scores - lse),  d scores = shares (slope value^T - inner)
    """
    scores, seen = _scores(static, query, key, segments_q, segments_k, distance)
    shares = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0.0)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    by_value = product("bgrqk,bgrqe->bgke", shares.astype(slope.dtype), slope)
    by_score = shares * (product("bgrqe,bgke->bgrqk", slope, value) - inner[..., None])
    if static.cap:
        by_score = by_score * soft_cap_slope(scores, static.cap)
    by_score = (by_score * static.scale).astype(query.dtype)
    by_query = product("bgrqk,bgke->bgrqe", by_score, key)
    by_key = product("bgrqk,bgrqe->bgke", by_score, query)
    return by_query, by_key, by_value


_attend.defvjp(_attend_fwd, _attend_bwd)
