"""A model in the ids of another tokenizer: rows of its embedding and its head, moved or made."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.model import Model
from jaxdistill.models.vocabulary import BIAS, IMPOSSIBLE, beside
from jaxdistill.sharding import spec


def shape(config: DecoderConfig, ids: Sequence[int]) -> DecoderConfig:
    """The configuration of `reseated`: as many rows as there are ids, its end tokens among them."""
    place = {own: index for index, own in enumerate(ids) if own >= 0}
    moved = lambda own: None if own is None else place.get(own)
    ends = tuple(place[own] for own in config.eos_ids if own in place)
    return dataclasses.replace(
        config,
        vocab_size=len(ids),
        bos_id=moved(config.bos_id),
        pad_id=moved(config.pad_id),
        eos_ids=ends,
    )


def reseated(model: Model, ids: Sequence[int], masked: Sequence[int] = ()) -> Model:
    """The same model for other ids: its row `ids[i]` of embedding and head is row i.

    Args:
      model: of any tokenizer.
      ids: its own id for each new one, -1 where it has none: then the embedding is 0.
      masked: new ids that it never says, beside those it has none for.
    """
    at = np.asarray(ids, np.int32)
    params = dict(model.params)
    for name in ("embedding", "head"):
        if name in params:
            params[name] = _rows(params[name], at)
    impossible = at < 0
    impossible[list(masked)] = True
    if impossible.any():
        params[BIAS] = beside(params["embedding"], np.where(impossible, IMPOSSIBLE, 0.0))
    return dataclasses.replace(model, config=shape(model.config, ids), params=params)


def _rows(table: Array, at: np.ndarray) -> Array:
    """Rows of a table, 0 for -1."""
    take = lambda table, at: jnp.where(at[:, None] < 0, 0, table[jnp.maximum(at, 0)])
    return jax.jit(take, out_shardings=_place(table, len(at)))(table, at)


def _place(table: Array, rows: int) -> Any:
    """Where a table of other rows lies: as the given one does."""
    place = table.sharding
    if not isinstance(place, NamedSharding):
        return place
    size = (rows, table.shape[1])
    return NamedSharding(place.mesh, spec(("vocab", "embed"), size, place.mesh))


def respelled(
    model: Model, spelled: Sequence[Sequence[int]], config: DecoderConfig, key: Array | None = None
) -> Model:
    """The model with new rows of embedding and head, each the mean of old ones.

    Args:
      model: whose rows are read.
      spelled: for each new row the old ones that spell its token; none: the mean of all.
      config: of the result; its `vocab_size` is their number.
      key: draw all rows as a random model's instead, normal(0, initializer_range).
    """
    counts = np.asarray([len(ids) for ids in spelled], np.int32)
    flat = np.asarray([i for ids in spelled for i in ids], np.int32)
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    params = dict(model.params)
    for number, name in enumerate(("embedding", "head")):
        if name in params:
            own = None if key is None else jax.random.fold_in(key, number)
            params[name] = _made(params[name], (flat, rows, counts), config, own)
    return dataclasses.replace(model, config=config, params=params)


def _made(
    table: Array, spelled: tuple[np.ndarray, ...], config: DecoderConfig, key: Array | None
) -> Array:
    """A table of new rows in the dtype of the old one: drawn, or means of what spells them."""
    size = (config.vocab_size, table.shape[1])

    def make(table, spelled, key):
        if key is not None:
            rows = jax.random.normal(key, size) * config.initializer_range
        else:
            rows = _means(config.vocab_size, table, *spelled)
        return rows.astype(table.dtype)

    return jax.jit(make, out_shardings=_place(table, config.vocab_size))(table, spelled, key)


def _means(size: int, table: Array, flat: Array, rows: Array, counts: Array) -> Array:
    wide = table.astype(jnp.float32)
    sums = jax.ops.segment_sum(wide[flat], rows, size)
    means = sums / jnp.maximum(counts, 1)[:, None]
    return jnp.where(counts[:, None] > 0, means, jnp.mean(wide, axis=0))
