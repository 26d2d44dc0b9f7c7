"""Keys and values of rows of unequal length in a ring: one write place for all, float or int8.

Every row's tokens lie just before the common place, whatever their number, so that one step writes
one slice for all rows, and a new row can be put into a free slot at any time. Places wrap around;
how old a place is, not where it lies, decides who sees it.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.errors import ModelError
from jaxdistill.kernels.softcap import soft_cap
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.attention import Attend, score_scale
from jaxdistill.sharding import constrain

DTYPES = ("float32", "bfloat16", "int8")
_AXES = ("batch", "act_heads", None, None)
Prefilled = tuple[tuple[Array, Array], ...]  # per layer keys and values [P, G, W, E] of P prompts


# `no_type_check`: jit rebuilds the carriers with shapes or placeholders in place of arrays.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheArray:
    """Keys or values of one layer: [B, G, C, E], and a scale [B, G, C] where they are int8."""

    values: Array
    scale: Array | None = None


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """The cache.

    Attributes:
      layers: per layer (keys, values).
      place: int32 [], where the next token of every row goes.
    """

    layers: tuple[tuple[CacheArray, CacheArray], ...]
    place: Array

    @property
    def size(self) -> int:
        """C, how many tokens a row can have."""
        return self.layers[0][0].values.shape[2]


def empty(config: DecoderConfig, rows: int, size: int, dtype: str) -> Ring:
    """A ring of zeros for `rows` rows of up to `size` tokens.

    Raises:
      ModelError: for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ModelError(f"cache dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    shape = (rows, config.kv_heads, size, config.head_dim)

    def one() -> CacheArray:
        values = constrain(jnp.zeros(shape, dtype), _AXES)
        if dtype != "int8":
            return CacheArray(values)
        return CacheArray(values, constrain(jnp.zeros(shape[:3], jnp.float32), _AXES[:3]))

    return Ring(tuple((one(), one()) for _ in range(config.layers)), jnp.zeros((), jnp.int32))


def insert(ring: Ring, prefilled: Prefilled, source_B: Array, count_B: Array) -> Ring:
    """Puts prefilled prompts into slots, so that they end just before the common place.

    Args:
      ring: the cache.
      prefilled: keys and values of P prompts, each from place 0.
      source_B: int32 [B], which prompt goes into a slot; -1 leaves the slot as it is.
      count_B: int32 [B], tokens of that prompt.
    """
    width = prefilled[0][0].shape[2]
    number_BC = (jnp.arange(ring.size)[None, :] - ring.place + count_B[:, None]) % ring.size
    taken_BC = (source_B >= 0)[:, None] & (number_BC < count_B[:, None])
    from_B = jnp.maximum(source_B, 0)
    index_BGCE = jnp.minimum(number_BC, width - 1)[:, None, :, None]

    def put(stored: CacheArray, prompts_PGWE: Array) -> CacheArray:
        rows_BGCE = jnp.take_along_axis(prompts_PGWE[from_B], index_BGCE, axis=2)
        new = _pack(rows_BGCE, stored)
        fill = lambda value, old: constrain(
            jnp.where(taken_BC.reshape(_between(taken_BC, old)), value, old), _AXES[: old.ndim]
        )
        return jax.tree.map(fill, new, stored)

    layers = tuple(
        (put(keys, new_keys), put(values, new_values))
        for (keys, values), (new_keys, new_values) in zip(ring.layers, prefilled, strict=True)
    )
    return Ring(layers, ring.place)


def _between(mask_BC: Array, like: Array) -> tuple[int, ...]:
    batch, size = mask_BC.shape
    return (batch, 1, size, 1)[: like.ndim]


def _pack(values: Array, like: CacheArray) -> CacheArray:
    """Values [..., E] as the cache keeps them: cast, or whole numbers with a scale per vector."""
    if like.scale is None:
        return CacheArray(values.astype(like.values.dtype))
    wide = values.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127.0
    whole = jnp.round(wide / jnp.where(scale > 0, scale, 1.0)[..., None])
    return CacheArray(whole.astype(jnp.int8), scale)


def attention(config: DecoderConfig, ring: Ring, length_B: Array) -> Attend:
    """Attention of one new token per row to itself and to the row's `length_B` tokens before.

    The state is one layer's (keys, values). The cache lies head by head, so that both products read
    it in place, and int8 scales are applied to scores and shares instead of keys and values: that
    is why this is not `jax.nn.dot_product_attention`, which takes [B, C, G, E] in floats.

    What a small cache costs: a number is stored to within r times the largest of its vector, r =
    1 / 254 for int8 and 2 ** -9 for bfloat16. A score then moves by at most
    d = r |query|_1 max |key| / sqrt(E), and the mixed values by (exp(2 d) - 1 + r) max |value|.
    """
    age_C = (ring.place - jnp.arange(ring.size)) % ring.size
    limits = np.asarray([window or np.iinfo(np.int32).max for window in config.windows or ()])
    scale, cap = score_scale(config), config.attention_softcap
    seen_BC = age_C[None, :] <= length_B[:, None]

    def attend(state, layer, query_B1HE, key_B1GE, value_B1GE):
        keys, values = (
            _write(stored, new.swapaxes(1, 2), ring.place)
            for stored, new in zip(state, (key_B1GE, value_B1GE), strict=True)
        )
        batch, _, _, size = query_B1HE.shape
        groups = key_B1GE.shape[2]
        query_BGRE = query_B1HE.reshape(batch, groups, -1, size)
        dtype = query_BGRE.dtype
        score_BGRC = (
            jnp.einsum(
                "BGRE,BGCE->BGRC",
                query_BGRE,
                keys.values.astype(dtype),
                preferred_element_type=jnp.float32,
            )
            * scale
        )
        if keys.scale is not None:
            score_BGRC *= keys.scale[:, :, None, :]
        score_BGRC = soft_cap(score_BGRC, cap)
        mask_BC = seen_BC & (age_C < limits[layer])[None, :] if len(limits) else seen_BC
        share_BGRC = jax.nn.softmax(jnp.where(mask_BC[:, None, None], score_BGRC, -jnp.inf))
        if values.scale is not None:
            share_BGRC *= values.scale[:, :, None, :]
        mixed = jnp.einsum("BGRC,BGCE->BGRE", share_BGRC.astype(dtype), values.values.astype(dtype))
        return (keys, values), mixed.reshape(query_B1HE.shape)

    return attend


def _write(stored: CacheArray, new_BG1E: Array, place: Array) -> CacheArray:
    """One token of every row at the common place."""

    def put(old: Array, new: Array) -> Array:
        start = (0, 0, place, 0)[: old.ndim]
        return constrain(jax.lax.dynamic_update_slice(old, new, start), _AXES[: old.ndim])

    return jax.tree.map(put, stored, _pack(new_BG1E, stored))
