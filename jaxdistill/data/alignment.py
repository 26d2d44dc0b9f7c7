"""Where two tokenisations of one text have spelled the same bytes: groups of tokens, exact.

text      un believ able _12
student   un|believ|able|_12        groups (0-1, 0-1), (2, 2), (3, 3-4)
teacher   unbel|iev|able|_1|2
"""

from collections.abc import Sequence

import numpy as np


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> np.ndarray:
    """The smallest groups of tokens that spell the same bytes on both sides.

    A token without bytes (a special one) belongs to no group, and what follows the last place
    where both sides end together is left out. One pass over the bytes.

    Args:
      student: the bytes of each of the student's tokens, as `TokenBytes.spell` gives them.
      teacher: of the teacher's, of the same text or of a text that one of them continues.

    Returns:
      int32 [groups, 4]: first and last token of the student, first and last of the teacher.

    >>> print(align([b"un", b"believ", b"able", b" 12"], [b"unbel", b"iev", b"able", b" 1", b"2"]))
    [[0 1 0 1]
     [2 2 2 2]
     [3 3 3 4]]
    """
    sides = [np.asarray([len(token) for token in side], np.int64) for side in (student, teacher)]
    places = [np.flatnonzero(lengths) for lengths in sides]
    ends = [np.cumsum(lengths[place]) for lengths, place in zip(sides, places, strict=True)]
    if not all(len(end) for end in ends):
        return np.zeros((0, 4), np.int32)
    total = min(end[-1] for end in ends)
    marked = [np.zeros(total + 1, bool), np.zeros(total + 1, bool)]
    for mark, end in zip(marked, ends, strict=True):
        mark[end[end <= total]] = True
    common = np.flatnonzero(marked[0] & marked[1])
    columns = []
    for place, end in zip(places, ends, strict=True):
        last = np.searchsorted(end, common)
        first = np.concatenate([[0], last[:-1] + 1])[: len(last)]
        columns += [place[first], place[last]]
    return np.stack(columns, axis=1).astype(np.int32)


def numbered(groups: np.ndarray, student: int, teacher: int) -> tuple[np.ndarray, np.ndarray]:
    """The group of each token, counted from 1; 0 for tokens of none.

    Args:
      groups: of `align`.
      student: how many tokens the student has.
      teacher: how many the teacher has.

    Returns:
      (int32 [student], int32 [teacher]).
    """
    sides = []
    for column, length in ((0, student), (2, teacher)):
        edges = np.zeros(length + 1, np.int32)
        edges[groups[:, column]] += np.arange(1, len(groups) + 1, dtype=np.int32)
        edges[groups[:, column + 1] + 1] -= np.arange(1, len(groups) + 1, dtype=np.int32)
        sides.append(np.cumsum(edges[:-1], dtype=np.int32))
    return sides[0], sides[1]


def places(groups: np.ndarray) -> np.ndarray:
    """Where a model is read that groups of tokens are compared by: its predictions of their tokens,
    and what it says behind the last token of each.

    Args:
      groups: int [N], of a document, as `numbered` gives them.

    Returns:
      bool [N].
    """
    following = np.append(groups[1:], 0)
    return (following > 0) | ((groups > 0) & (groups != following))


def shown(student: Sequence[bytes], teacher: Sequence[bytes], groups: np.ndarray) -> list[str]:
    """A line for each group, for people: the student's tokens, the teacher's tokens."""

    def side(tokens: Sequence[bytes], first: int, last: int) -> str:
        pieces = (token.decode("utf-8", "backslashreplace") for token in tokens[first : last + 1])
        seen = lambda sign: sign if sign.isprintable() else repr(sign)[1:-1]
        return "|".join("".join(map(seen, piece)).replace(" ", "_") for piece in pieces)

    return [f"{side(student, a, b)}    {side(teacher, c, d)}" for a, b, c, d in groups.tolist()]
