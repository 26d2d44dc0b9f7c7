"""What two rows of logits say of the tokens that both have, and of all others together."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.kernels.statistics import LOWEST

OTHERS = ("mask", "bucket")


class Columns(NamedTuple):
    """Entry i of both lists is the same token, -1 in both for none: int [C] each."""

    student: Array
    teacher: Array


def shared_columns(
    logits: ArrayLike, columns: ArrayLike | Sequence[int], *, others: str = "mask"
) -> Array:
    """The logits of listed columns, and of all others as one more.

        mask:     (z_c1, ..., z_cC)                               the others are impossible
        bucket:   (z_c1, ..., z_cC, log sum_{v not listed} e^z_v)  the others are one entry

    The softmax of the first is the row's, normalised over the listed columns; that of the second
    is the row's, with the mass of the others in its last entry. Divide by a temperature before.

    Args:
      logits: [..., V].
      columns: int [C], different columns.
      others: "mask" or "bucket".

    Returns:
      [..., C] or [..., C + 1], float32 (float64 for float64 logits).

    Raises:
      ConfigError: for another word, or columns that are none of the row's or stand twice; where the
        list is traced, such a column is impossible, and the row's own stays with the others.

    >>> import jax, jax.numpy as jnp
    >>> z = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    >>> print(jax.nn.softmax(shared_columns(z, jnp.array([0, 2]), others="bucket")).round(4))
    [0.4 0.2 0.4]
    """
    logits = checks.array("logits", logits)
    if logits.ndim == 0:
        raise ConfigError("logits []: must be [..., V]")
    columns = check("columns", columns, logits.shape[-1], others)
    wide = jnp.maximum(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), LOWEST)
    picked = pick(wide, columns)
    if others == "mask":
        return picked
    rest = jnp.where(listed(columns, wide.shape[-1]), LOWEST, wide)
    return jnp.concatenate([picked, jax.nn.logsumexp(rest, axis=-1, keepdims=True)], axis=-1)


def pick(z: Array, columns: Array) -> Array:
    """The entries [..., C] of listed columns; one of no column, -1, is impossible."""
    return jnp.where(columns < 0, LOWEST, z[..., columns])


def listed(columns: Array, width: int) -> Array:
    """Which of `width` columns are in a list, where -1 is none: bool [width]."""
    at = jnp.where(columns < 0, width, columns)
    return jnp.zeros(width, bool).at[at].set(True, mode="drop")


def check(name: str, columns: ArrayLike | Sequence[int], vocab: int, others: str) -> Array:
    """A list of columns as an array; its numbers are looked at where they are no tracers.

    In a traced list what is no column, or stood before, becomes -1, which is none.

    Raises:
      ConfigError: naming the list, the column and the rule.
    """
    if others not in OTHERS:
        raise ConfigError(f"others = {others!r}: must be one of {', '.join(OTHERS)}")
    array = checks.indices(name, columns)
    if array.ndim != 1 or not array.size or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ConfigError(
            f"{name} {array.dtype} {list(array.shape)}: must be int [C], one or more columns"
        )
    if isinstance(array, jax.core.Tracer):
        return jnp.where((array < 0) | (array >= vocab) | _again(array), -1, array)
    numbers = np.sort(np.asarray(array))
    if numbers[0] < 0 or numbers[-1] >= vocab:
        wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
        raise ConfigError(f"{name}: {wrong} is no column of a vocabulary of {vocab}")
    twice = numbers[1:][numbers[1:] == numbers[:-1]]
    if twice.size:
        raise ConfigError(f"{name}: {twice[0]} stands twice; a column has one partner")
    return array


def _again(array: Array) -> Array:
    """Which entries of a list stood before in it, bool [C]."""
    order = jnp.argsort(array, stable=True)
    ordered = array[order]
    again = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] == ordered[:-1]])
    return jnp.zeros(len(array), bool).at[order].set(again)


def pair(
    student: ArrayLike | None,
    teacher: ArrayLike | None,
    vocabularies: tuple[int, int],
    others: str,
) -> Columns:
    """Both lists, whose lengths agree and of which the student's ascends.

    Raises:
      ConfigError: naming what does not fit.
    """
    if student is None or teacher is None:
        raise ConfigError("student_columns and teacher_columns go together: give both")
    columns = Columns(
        check("student_columns", student, vocabularies[0], others),
        check("teacher_columns", teacher, vocabularies[1], others),
    )
    if columns.student.shape != columns.teacher.shape:
        raise ConfigError(
            f"student_columns {list(columns.student.shape)} and teacher_columns "
            f"{list(columns.teacher.shape)}: entry i of both is one token, so their lengths agree"
        )
    if columns.student.size == 1 and others == "mask":
        raise ConfigError(
            "student_columns [1] with other_columns = mask: one column alone has all of the mass, "
            "so its divergence is 0 for any student; list more, or bucket"
        )
    traced = [isinstance(one, jax.core.Tracer) for one in columns]
    if not traced[0] and (np.diff(np.asarray(columns.student)) <= 0).any():
        raise ConfigError("student_columns must ascend; sort both lists by the student's")
    if not any(traced):
        return columns
    none = (columns.student < 0) | (columns.teacher < 0)  # in either list: its partner is none too
    return Columns(*(jnp.where(none, -1, one) for one in columns))
