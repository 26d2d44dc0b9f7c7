"""How many ids of a tokenizer count, and rows of a head that are no tokens."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import errors, rules

IMPOSSIBLE = -1e30  # a logit that leaves its token no probability
BIAS = "head_bias"  # of the parameters: what is added to the logits

_log = logging.getLogger(__name__)


def vocabulary_size(tokenizer: Any) -> int:
    """Rows of a head that are tokens: one more than the highest token id."""
    return max(tokenizer.get_vocab().values()) + 1


def check_rows(who: str, rows: int, vocab: int) -> None:
    """A model's head has a row for every token.

    Raises:
      ModelError: if the tokenizer can produce ids that the model has no row for.
    """
    errors.check(rules.head_rows(who, rows, vocab))


def beside(table: Array, values: np.ndarray) -> Array:
    """An array in a table's dtype that all of its devices hold."""
    values = values.astype(table.dtype)
    place = table.sharding
    if isinstance(place, NamedSharding):
        return jax.device_put(values, NamedSharding(place.mesh, PartitionSpec()))
    return jax.device_put(values, place)


def only_tokens(params: Mapping[str, Any], tokenizer: Any) -> Mapping[str, Any]:
    """The parameters, with rows of the head that are no tokens never chosen.

    Args:
      params: of a model; with a bias of its head already they stay as they are.
      tokenizer: of the model; None: every row may be one.
    """
    rows = params["embedding"].shape[0]
    if tokenizer is None or BIAS in params:
        return params
    tokens = [index for index in tokenizer.get_vocab().values() if index < rows]
    if not tokens or len(set(tokens)) == rows:
        return params
    values = np.full(rows, IMPOSSIBLE)
    values[tokens] = 0.0
    return {**params, BIAS: beside(params["embedding"], values)}
