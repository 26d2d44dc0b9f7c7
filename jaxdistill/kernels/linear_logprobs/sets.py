"""Sets of tokens as columns of the vocabulary, and the checks of lists of columns."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks

# Each the ids of its tokens or a mask [V], or all as masks [M, V].
Sets = Array | np.ndarray | Sequence[ArrayLike | Sequence[int]]


def columns_of(sets: Sets, vocab: int, shared: bool) -> Array:
    """The sets as columns, bool [V, M].

    Args:
      sets: as `linear_logprobs` takes them.
      vocab: V, rows of the head here.
      shared: whether other devices hold other rows, which lists of ids cannot say.

    Raises:
      ConfigError: for a set that is no set.
    """
    try:
        masks = [one if isinstance(one, jax.Array) else np.asarray(one) for one in sets]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "sets: must be a list of sets, each the ids of its tokens or a bool [V], or bool [M, V]"
        ) from error
    if not masks:
        raise ConfigError("sets is empty: leave it out, or give at least one set")
    return jnp.stack([_column(m, one, vocab, shared) for m, one in enumerate(masks)], axis=1)


def _column(m: int, one: Array | np.ndarray, vocab: int, shared: bool) -> Array:
    """One set as bool [V]."""
    known = not isinstance(one, jax.core.Tracer)
    if one.dtype == bool:
        if one.shape != (vocab,):
            raise ConfigError(f"sets[{m}] {list(one.shape)}: a mask must be [V] = [{vocab}]")
        if known and not shared and not np.asarray(one).any():
            raise ConfigError(f"sets[{m}] is empty: its mass is 0 and its log is not finite")
        return jnp.asarray(one)
    if shared:
        raise ConfigError(
            f"sets[{m}]: with vocab_axes a set is a mask of the rows that this device holds"
        )
    if one.ndim != 1 or not jnp.issubdtype(one.dtype, jnp.integer) or not one.size:
        raise ConfigError(
            f"sets[{m}] {one.dtype} {list(one.shape)}: must be the ids of its tokens, one or more, "
            f"or a bool [V] = [{vocab}]"
        )
    one = checks.indices(f"sets[{m}]", one)
    if known:
        check_columns(f"sets[{m}]", np.asarray(one), vocab)
    # Of a traced list: what is no token is left out; a negative index would count from the end.
    return jnp.zeros(vocab, bool).at[jnp.where(one < 0, vocab, one)].set(True, mode="drop")


def check_columns(name: str, ids: np.ndarray, vocab: int) -> None:
    """Raises for a list of columns that is not ascending, not unique, or leaves the vocabulary.

    Raises:
      ConfigError: naming the id and the rule.
    """
    if ids[0] < 0 or ids[-1] >= vocab or (np.diff(ids.astype(np.int64)) <= 0).any():
        wrong = np.flatnonzero(np.diff(ids.astype(np.int64)) <= 0)
        at = f"{ids[wrong[0]]} is followed by {ids[wrong[0] + 1]}" if wrong.size else "as they are"
        raise ConfigError(
            f"{name}, {ids[0]} to {ids[-1]}, {at}: ids must ascend, each once, within 0 to V - 1 = "
            f"{vocab - 1}; sort them, and remove what stands twice"
        )
