"""A student out of a teacher: keep some of its layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdistill.errors import ConfigError
from jaxdistill.models import DecoderConfig


def keep_layers(
    config: DecoderConfig, params: Any, layers: Sequence[int], dtype: DTypeLike | None = None
) -> tuple[DecoderConfig, Any]:
    """The model with only these layers, as new arrays on the same devices.

    Args:
      config: of the large model.
      params: its parameters, which stay as they are.
      layers: which to keep, counted from 0, in rising order.
      dtype: of the new parameters; None keeps each one's.

    Returns:
      (config, params) of the small model; embedding, head and final norm are copies.

    Raises:
      ConfigError: for a layer that does not exist, or layers that are not in rising order.
    """
    kept = check_layers(config.layers, layers)
    windows = config.windows and tuple(config.windows[layer] for layer in kept)
    small = dataclasses.replace(config, layers=len(kept), windows=windows)

    def copy(path, leaf):
        if path[0].key == "layers":
            leaf = leaf[jnp.asarray(kept)]
        # An explicit copy: a result that shared its buffer with the large model would take the
        # buffer along when training donates it.
        return jnp.copy(leaf.astype(dtype or leaf.dtype))

    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    copied = jax.jit(
        lambda params: jax.tree_util.tree_map_with_path(copy, params), out_shardings=places
    )
    return small, copied(params)


def check_layers(count: int, layers: Sequence[int]) -> list[int]:
    """The layers as a list, if a model of `count` layers has them.

    Raises:
      ConfigError: for none at all, one that does not exist, or an order that does not rise.
    """
    kept = list(layers)
    missing = [layer for layer in kept if not 0 <= layer < count]
    if missing or not kept or kept != sorted(set(kept)):
        raise ConfigError(
            f"student.layers = {kept}: the teacher's layers are 0 to {count - 1}; name at least "
            "one, each once, in rising order"
        )
    return kept
