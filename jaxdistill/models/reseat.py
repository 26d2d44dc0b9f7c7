"""A model in the ids of another tokenizer: rows of its embedding and its head in that order."""

import dataclasses
from collections.abc import Sequence

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
    """Rows of a table, 0 for -1, lying as the table does."""
    place = table.sharding
    if isinstance(place, NamedSharding):
        size = (len(at), table.shape[1])
        place = NamedSharding(place.mesh, spec(("vocab", "embed"), size, place.mesh))
    take = lambda table, at: jnp.where(at[:, None] < 0, 0, table[jnp.maximum(at, 0)])
    return jax.jit(take, out_shardings=place)(table, at)
