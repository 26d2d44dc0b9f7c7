"""Rows of a large array, one group after another: what a CPU reads again it finds in its cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# float32 logits of one model in a group of rows: both models' fit a core's second-level cache.
_BYTES_CPU = 2**19


def group_size(rows: int, vocab: int, platform: str) -> int:
    """Rows per group: on a CPU the largest divisor of `rows` within the cache's share.

    It is `rows` elsewhere, and where no divisor is near that share.
    """
    if platform != "cpu" or not rows:
        return rows
    most = min(max(1, _BYTES_CPU // (4 * vocab)), rows)
    size = max(size for size in range(1, most + 1) if rows % size == 0)
    return size if 2 * size >= most else rows


def in_groups(one: Callable[[Any], Any], group: int, per_row: Any) -> Any:
    """What `one` makes of groups of rows, one after another: arrays [n, ...] for its [group, ...].

    Args:
      one: a tree of arrays [group, ...] -> another.
      group: rows of a group; divides n.
      per_row: a tree of arrays [n, ...].
    """
    rows = len(jax.tree.leaves(per_row)[0])
    if group == rows:
        return one(per_row)
    return _joined(jax.lax.map(one, _split(group, per_row)))


def in_place(
    one: Callable[[Array, Any], tuple[Array, Any]], group: int, taken: Array, per_row: Any
) -> tuple[Array, Any]:
    """The same where an answer takes the place of rows that nothing reads afterwards.

    Args:
      one: (rows of `taken`, a tree of arrays [group, ...]) -> (what takes their place, a tree).
      group: rows of a group; divides n.
      taken: [n, ...].
      per_row: a tree of arrays [n, ...].
    """
    if group == len(taken):
        return one(taken, per_row)

    def body(held: Array, numbered: tuple[Array, Any]):
        number, rows = numbered
        # Apart from the buffer, so that what writes to it reads nothing of it.
        new, answer = one(jax.lax.optimization_barrier(held[number]), rows)
        return held.at[number].set(new), answer

    held = _split(group, taken)
    held, answers = jax.lax.scan(body, held, (jnp.arange(len(held)), _split(group, per_row)))
    return _joined(held), _joined(answers)


def _split(group: int, per_row: Any) -> Any:
    return jax.tree.map(lambda array: array.reshape(-1, group, *array.shape[1:]), per_row)


def _joined(parts: Any) -> Any:
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), parts)
