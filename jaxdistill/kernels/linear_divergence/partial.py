"""What is known of a teacher in part: some of its tokens, or some of its head's rows."""

import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels.columns.definition import Columns, pair
from jaxdistill.kernels.operands import DivergenceFunction
from jaxdistill.kernels.sparse.checks import known_teacher
from jaxdistill.kernels.sparse.definition import SparseTeacher


def known_part(
    kind: str | DivergenceFunction,
    whole_rows: bool,
    teacher_head: Array | None,
    dims: tuple[int, ...],
    vocab: int,
    tokens: dict[str, ArrayLike | None],
    some: np.ndarray | None,
) -> SparseTeacher | None:
    """The teacher's known tokens, None where none are given.

    Args:
      kind: of the divergence.
      whole_rows: whether something else in the call needs the teacher's whole rows.
      teacher_head: which must then be None.
      dims: of the tokens.
      vocab: V of the student, of all devices together.
      tokens: by name, as `sparse.checks.known_teacher` takes them.
      some: which tokens have a weight, of `checks.counted`.

    Raises:
      ConfigError: for what does not go together, and for numbers that break a rule.
    """
    if all(array is None for array in tokens.values()):
        return None
    if whole_rows or teacher_head is not None:
        raise ConfigError(
            "teacher_ids stand in place of the teacher's hidden states and head, and go with "
            "neither taid_t nor parameters: these need the teacher's whole rows"
        )
    return known_teacher(kind, dims, vocab, tokens, some)


def shared_part(
    kind: str | DivergenceFunction,
    whole_rows: bool,
    teacher_head: Array | None,
    vocabularies: tuple[int, int],
    columns: tuple[ArrayLike | None, ArrayLike | None],
    others: str,
) -> Columns | None:
    """The columns that both heads have, None where no lists are given.

    Args:
      kind: of the divergence.
      whole_rows: whether something else in the call needs rows of one width.
      teacher_head: which must be given.
      vocabularies: V of student and teacher, of all devices together.
      columns: of student and teacher.
      others: what becomes of other columns.

    Raises:
      ConfigError: for what does not go together, and for lists that break a rule.
    """
    if all(one is None for one in columns):
        return None
    if whole_rows or teacher_head is None or not isinstance(kind, str):
        raise ConfigError(
            "student_columns go with a teacher's head and a named kind, without taid_t: a function "
            "and TAID's mixture need rows of one width"
        )
    return pair(*columns, vocabularies, others)
