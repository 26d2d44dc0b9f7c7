"""Ring attention on TPUs: queries and keys of each hop meet in splash attention, JAX's own kernel.

In the order of `attention_ring` a hop is one of three, each with a mask that no device changes:

    the device's own keys    causal: its two chunks are in the row's order
    an earlier device's      all queries see its early chunk
    a later device's         the late chunk's queries see both of its chunks

The kernel gives mixed values and the log-sum-exp of scores of each hop, which join exactly:

    lse = log(exp(lse_1) + exp(lse_2)),  mixed = exp(lse_1 - lse) mixed_1 + exp(lse_2 - lse) mixed_2

The way back is the kernel's own, given mixed values and log-sum-exp of the whole row. JAX has no
public name for it: `_splash_attention_bwd` takes the same in 0.10 and in 0.12. What a hop gives is
rounded to the type of the activations; sums over hops are float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from jaxdistill.errors import ConfigError
from jaxdistill.models import attention_ring, attention_tpu
from jaxdistill.models.architecture import DecoderConfig


def check(config: DecoderConfig, length: int, tensor: int, context: int) -> None:
    """Whether the kernel can compute the hops of a ring.

    Args:
      config: of the model.
      length: tokens of a row.
      tensor: devices that share heads.
      context: devices of the ring.

    Raises:
      ConfigError: naming what it cannot.
    """
    reason = problem(config, length, tensor, context)
    if reason:
        raise ConfigError(f"attention = 'splash': {reason}: change it, or take xla")


def problem(config: DecoderConfig, length: int, tensor: int, context: int) -> str | None:
    """What the kernel cannot compute of a ring, or None; arguments as in `check`."""
    unit = 2 * context * attention_tpu.LANES
    if length % unit:
        return (
            f"rows of {length} tokens are no multiple of {unit}, 2 * {attention_tpu.LANES} for "
            f"each of mesh.context = {context}"
        )
    if any(window and window < length for window in config.windows or ()):
        return f"mesh.context = {context} divides rows, and this model has windows"
    return attention_tpu.problem(config, length, tensor)


class _Hops(NamedTuple):
    """What is known when the program is made.

    Attributes:
      cap: soft cap of the scores, or None.
      count: devices of the ring.
      chunk: tokens of a chunk.
      interpret: run the kernel as plain JAX.
    """

    cap: float | None
    count: int
    chunk: int
    interpret: bool


class _Hop(NamedTuple):
    """Which of a device's queries meet which of the keys that came, and how."""

    mask: Any
    queries: slice
    keys: slice


class _Rows(NamedTuple):
    """A device's part: query [B, H, 2 T, E], key, value [B, G, 2 T, E], segments int32 [B, 2 T]."""

    query: Array
    key: Array
    value: Array
    segments: Array

    @property
    def travelling(self) -> tuple[Array, Array, Array]:
        """Keys, values and segments."""
        return self.key, self.value, self.segments


def attention(
    config: DecoderConfig, length: int, scale: float, interpret: bool = False
) -> Callable[..., Array]:
    """mixed(layer index, query [B, L, H, E], key, value [B, L, G, E], segment_ids [B, L]).

    Rows are in the balanced order of `attention_ring`, on the mesh in context.

    Args:
      config: of the model.
      length: L.
      scale: of query times key.
      interpret: run as plain JAX, on any device: for tests.

    Raises:
      ConfigError: for what the kernel cannot compute.
    """
    sizes = attention_ring.sizes()
    check(config, length, sizes["tensor"], sizes[attention_ring.AXIS])
    local = functools.partial(_local, config.attention_softcap, scale, interpret)
    ring = attention_ring.spread(local)

    def mixed(index, query, key, value, segments):
        segments = jnp.ones(query.shape[:2], jnp.int32) if segments is None else segments
        return ring(query, key, value, segments)

    return mixed


def on_one_device(
    config: DecoderConfig, length: int, scale: float, interpret: bool = False, count: int = 2
) -> Callable[..., Array]:
    """The same of rows in their own order, with the parts of all devices on one: for checks.

    Args:
      config: of the model.
      length: L, a multiple of 256 * count.
      scale: of query times key.
      interpret: as in `attention`.
      count: devices whose parts they are.
    """
    chunks = np.asarray([(n, 2 * count - 1 - n) for n in range(count)]).ravel()
    local = functools.partial(_local, config.attention_softcap, scale, interpret, count)

    def cut(array: Array) -> Array:
        """[count, B, 2 T, ...]."""
        rows = array.reshape(array.shape[0], 2 * count, length // (2 * count), *array.shape[2:])
        parts = rows[:, chunks].reshape(array.shape[0], count, length // count, *array.shape[2:])
        return parts.swapaxes(0, 1)

    together = functools.partial(jax.vmap, axis_name=attention_ring.AXIS)

    @jax.custom_vjp  # what travels back needs the axis, which a gradient of `vmap` has not
    def ring(*parts):
        return together(local)(*parts)

    def back(parts, slope):
        return together(lambda parts, slope: jax.vjp(local, *parts)[1](slope))(parts, slope)

    ring.defvjp(lambda *parts: (ring(*parts), parts), back)

    def mixed(index, query, key, value, segments):
        found = ring(*map(cut, (query, key, value, segments))).swapaxes(0, 1)
        rows = found.reshape(query.shape[0], 2 * count, -1, *query.shape[2:])
        return rows[:, np.argsort(chunks)].reshape(query.shape)

    return mixed


def _local(cap, scale, interpret, count, query, key, value, segments) -> Array:
    head_first = lambda x: x.swapaxes(1, 2)
    static = _Hops(cap, count, query.shape[1] // 2, interpret)
    rows = _Rows(head_first(query * scale), head_first(key), head_first(value), segments)
    return head_first(_attend(static, rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Hops, own: _Rows) -> Array:
    return _forward(static, own)[0]


def _forward(static: _Hops, own: _Rows) -> tuple[Array, Array]:
    """(mixed values, log-sum-exp of the scores), of this device's queries."""

    def meet(carry: Any, others: Any, number: Any) -> Any:
        mixed, lse = carry
        found, more = _meet(static, functools.partial(_values, static, own, others), number)
        # A query may see none of these keys; it has seen itself, so that one of both is a number.
        both = jnp.logaddexp(lse, more)
        share = lambda one: jnp.exp(one - both)[..., None]
        return mixed * share(lse) + found * share(more), both

    def step(carried, number):
        carry, others = carried
        further = attention_ring.sent(static.count, others)  # while these are met
        return (meet(carry, others, number), further), None

    mixed = jnp.zeros(own.query.shape, jnp.float32)
    start = mixed, jnp.full(mixed.shape[:-1], -jnp.inf)
    carried, _ = step((start, own.travelling), 0)
    (carry, last), _ = jax.lax.scan(step, carried, jnp.arange(1, static.count - 1))
    mixed, lse = meet(carry, last, static.count - 1)
    return mixed.astype(own.value.dtype), lse


def _attend_fwd(static: _Hops, own: _Rows):
    mixed, lse = _forward(static, own)
    return mixed, (own, mixed, lse)


def _attend_bwd(static: _Hops, kept: Any, slope: Array):
    """Gradients of keys and values travel with them, and arrive at home after a whole turn."""
    own, mixed, lse = kept
    sent = functools.partial(attention_ring.sent, static.count)

    def meet(totals: Any, others: Any, number: Any) -> Any:
        pair = functools.partial(_slopes, static, own, others, (mixed, lse, slope))
        return [old + new for old, new in zip(totals, _meet(static, pair, number), strict=True)]

    def step(carried, number):
        (by_query, *sums), others = carried
        further, sums = sent(others), sent(sums)  # both while these keys are met
        return (meet((by_query, *sums), others, number), further), None

    none = [jnp.zeros(array.shape, jnp.float32) for array in own[:3]]
    carried = meet(none, own.travelling, 0), sent(own.travelling)
    ((by_query, *sums), last), _ = jax.lax.scan(step, carried, jnp.arange(1, static.count - 1))
    by_query, *sums = meet((by_query, *sent(sums)), last, static.count - 1)
    parts = zip((by_query, *sent(sums)), own[:3], strict=True)
    query, key, value = (total.astype(like.dtype) for total, like in parts)
    segments: Any = np.zeros(own.segments.shape, jax.dtypes.float0)  # of whole numbers
    return (_Rows(query, key, value, segments),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _meet(static: _Hops, pair: Callable[[_Hop], Any], number: Any) -> Any:
    """`pair` of the hop that brings the keys of this number, 0 being one's own."""
    size = static.chunk
    every, early, late = slice(None), slice(0, size), slice(size, None)
    if isinstance(number, int) and number == 0:
        return pair(_Hop(kernels.CausalMask((2 * size, 2 * size)), every, every))
    here = jax.lax.axis_index(attention_ring.AXIS)
    found = jax.lax.cond(
        (here - number) % static.count < here,
        lambda: pair(_Hop(kernels.FullMask((2 * size, size)), every, early)),
        lambda: pair(_Hop(kernels.FullMask((size, 2 * size)), late, every)),
    )
    # Without it the float32 sums over hops move into both branches, and are there a second time.
    return jax.lax.optimization_barrier(found)


def _values(static: _Hops, own: _Rows, others: Any, hop: _Hop) -> tuple[Array, Array]:
    """Mixed values of a hop's keys, and the log-sum-exp of its scores, of all queries."""
    kernel = attention_tpu.kernel(
        hop.mask, own.query.shape[1], static.cap, static.interpret, residuals=True
    )
    mixed, (lse,) = jax.vmap(kernel)(*_operands(own, others, hop))
    placed = _placed(own.query, hop.queries, mixed)
    return placed, _placed(own.query[..., 0], hop.queries, lse, -jnp.inf)


def _slopes(static: _Hops, own: _Rows, others: Any, above: Any, hop: _Hop) -> tuple[Array, ...]:
    """What the pairs of a hop add to the gradients of all queries, keys and values."""
    kernel = attention_tpu.kernel(hop.mask, own.query.shape[1], static.cap, static.interpret)
    masks = kernel.dq_mask_info, kernel.dkv_mask_info

    def back(query, key, value, segments, mixed, lse, slope):
        kept = query, key, value, segments, None, mixed, lse, *masks
        found = splash_attention_kernel._splash_attention_bwd(**kernel.kwargs, res=kept, do=slope)
        return found[3:6]

    theirs = [array[:, :, hop.queries] for array in above]
    parts = jax.vmap(back)(*_operands(own, others, hop), *theirs)
    places = hop.queries, hop.keys, hop.keys
    return tuple(map(_placed, own[:3], places, parts))


def _placed(like: Array, place: slice, part: Array, fill: float = 0.0) -> Array:
    """A part of the tokens among all of them."""
    return jnp.full(like.shape, fill, part.dtype).at[:, :, place].set(part)


def _operands(own: _Rows, others: Any, hop: _Hop) -> tuple[Any, ...]:
    key, value, segments = others
    query = own.query[:, :, hop.queries]
    both = kernels.SegmentIds(q=own.segments[:, hop.queries], kv=segments[:, hop.keys])
    return query, key[:, :, hop.keys], value[:, :, hop.keys], both
