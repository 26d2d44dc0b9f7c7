"""Which documents share a row: windows of long documents, and best-fit packing."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

PACKINGS = ("best_fit", "none")
_OPEN_ROWS = 1024  # that a piece of several views is tried in


def windows(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts every document into windows of seq_len tokens, the last one shorter.

    Args:
      starts: int64 [D], the first token of each document.
      lengths: int64 [D], how many follow, none of them 0.
      seq_len: the longest window.

    Returns:
      int64 [S, 2], start and length of every window, document by document; and int64 [S], the
      document that each is of.
    """
    count_D = -(-lengths // seq_len)
    first_D = np.cumsum(count_D) - count_D
    of_S = np.repeat(np.arange(len(count_D)), count_D)
    # The number of each window within its document.
    before_S = (np.arange(len(of_S)) - first_D[of_S]) * seq_len
    length_S = np.minimum(seq_len, lengths[of_S] - before_S)
    return np.stack([starts[of_S] + before_S, length_S], axis=1), of_S


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: the longest piece first, each into the fullest row that still takes it.

    At most 11/9 of the rows of the best packing, plus four. Ties go to the row used last; equal
    lengths keep their order: the result depends on the lengths alone. O(S log S).

    Args:
      lengths: int [S], each from 1 to capacity.
      capacity: the size of a row.

    Returns:
      int64 [S], the row of every piece; rows are numbered by the first piece they hold.

    Reference: Johnson, Demers, Ullman, Garey, Graham 1974, Worst-case performance bounds for simple
    one-dimensional packing algorithms.
    """
    row_S = np.empty(len(lengths), np.int64)
    rows = 0
    open_rows: dict[int, list[int]] = defaultdict(list)  # free space -> rows that have it
    # Bit s is set when some row has s tokens free: the smallest that suffices is found at once.
    free_bits = 0
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        enough = free_bits >> length
        if enough:
            free = length + (enough & -enough).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                free_bits ^= 1 << free
        else:
            free, row = capacity, rows
            rows += 1
        row_S[piece] = row
        if free > length:
            open_rows[free - length].append(row)
            free_bits |= 1 << (free - length)
    return _by_first_piece(row_S)


def best_fit_both(lengths: np.ndarray, capacities: Sequence[int]) -> np.ndarray:
    """`best_fit` of pieces that take room in several views of a row at once.

    The piece that fills most of its fullest view comes first, each into the row that is left with
    the least room, views added up as shares, among the rows that still take it and were opened
    last. Ties go to the older row. The result depends on the lengths alone.

    Args:
      lengths: int [S, views], each from 1 to the capacity of its view.
      capacities: the size of a row in each view.

    Returns:
      int64 [S], the row of every piece; rows are numbered by the first piece they hold.
    """
    sizes = np.asarray(capacities, np.int64)
    row_S = np.empty(len(lengths), np.int64)
    free = np.zeros((0, len(sizes)), np.int64)  # of the open rows
    names = np.zeros(0, np.int64)
    rows = 0
    order = np.argsort(-(lengths / sizes).max(1), kind="stable")
    for piece in order.tolist():
        length = lengths[piece]
        fits = np.flatnonzero((free >= length).all(1))
        if len(fits):
            place = fits[np.argmin((free[fits] / sizes).sum(1))]
        else:
            free = np.concatenate([free[-_OPEN_ROWS + 1 :], sizes[None]])
            names = np.concatenate([names[-_OPEN_ROWS + 1 :], [rows]])
            place, rows = len(names) - 1, rows + 1
        free[place] -= length
        row_S[piece] = names[place]
    return _by_first_piece(row_S)


def _by_first_piece(row_S: np.ndarray) -> np.ndarray:
    """Rows renumbered, so that they stand in the order of the text they begin with."""
    _, first, inverse = np.unique(row_S, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[inverse]


def plan(
    pieces: np.ndarray, capacities: Sequence[int], packing: str
) -> tuple[np.ndarray, np.ndarray]:
    """Lays pieces out in rows.

    Args:
      pieces: int64 [S, 2 * views], start and length in each view.
      capacities: the size of a row in each view.
      packing: `best_fit`, or `none`: every piece has a row of its own.

    Returns:
      The pieces sorted by row, int64 [S, 2 * views], in a row in their own order; and
      int64 [R + 1]: row r holds pieces rows[r] to rows[r + 1].
    """
    if packing == "none":
        return pieces, np.arange(len(pieces) + 1)
    if len(capacities) == 1:
        row_S = best_fit(pieces[:, 1], capacities[0])
    else:
        row_S = best_fit_both(pieces[:, 1::2], capacities)
    counts_R = np.bincount(row_S)
    rows = np.concatenate([[0], np.cumsum(counts_R)])
    return pieces[np.argsort(row_S, kind="stable")], rows
