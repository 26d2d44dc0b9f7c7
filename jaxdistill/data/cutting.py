"""What of documents rows take: all of it, its beginning, or nothing, and why."""

import dataclasses
from typing import Any

import numpy as np

from jaxdistill.data import packing
from jaxdistill.data.rules import TooLong

WHOLE, LONG, BEHIND, NOTHING, LONG_PAIR = range(5)  # why a document, or a record, is left out
_AT_ONCE = 1 << 22  # tokens whose mask is looked at together


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is kept of documents.

    Attributes:
      kept: int64 [D], the first so many tokens of each.
      counted: int64 [D], how many of them are targets that count.
      why: int8 [D], why one cannot be used, or WHOLE.
    """

    kept: np.ndarray
    counted: np.ndarray
    why: np.ndarray


def cut(ends: np.ndarray, loss: Any, policy: str, seq_len: int) -> Cut:
    """Cuts documents for rows of `seq_len` tokens.

    Args:
      ends: int64 [D + 1], where each begins, the last one's end behind.
      loss: bool [N], which tokens count as targets; [0]: all of them.
      policy: what becomes of long ones, see `Settings.policy`.
      seq_len: tokens in a row.
    """
    size_D = np.diff(ends)
    kept_D = np.minimum(size_D, seq_len) if policy == "truncate" else size_D
    if len(loss):
        counted_D, all_D = _counted(ends, kept_D, loss, seq_len)
    else:  # all but the first token of each window
        counted_D = kept_D - -(-kept_D // seq_len)
        all_D = size_D - 1
    behind_D = (kept_D < size_D) & (all_D > 0)
    why_D = np.where(counted_D > 0, WHOLE, np.where(behind_D, BEHIND, NOTHING))
    if policy == "reject":
        why_D = np.where(size_D > seq_len, LONG, why_D)
    return Cut(kept_D, counted_D, why_D.astype(np.int8))


def _counted(
    ends: np.ndarray, kept_D: np.ndarray, loss: Any, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [D], [D]: targets that count within what is kept, in windows, and in the whole.

    The first token of a window is no target.
    """
    counted_D, all_D = np.zeros_like(kept_D), np.zeros_like(kept_D)
    first = 0
    while first < len(kept_D):
        last = max(int(np.searchsorted(ends, ends[first] + _AT_ONCE, "right")) - 1, first + 1)
        begin = int(ends[first])
        mask = np.asarray(loss[begin : int(ends[last])])
        sums = np.concatenate([[0], np.cumsum(mask)])
        start, here = ends[first:last] - begin, slice(first, last)
        heads, own = packing.windows(start, kept_D[here], seq_len)
        lost = np.bincount(own, mask[heads[:, 0]], minlength=last - first).astype(np.int64)
        counted_D[here] = sums[start + kept_D[here]] - sums[start] - lost
        all_D[here] = sums[ends[first + 1 : last + 1] - begin] - sums[start] - mask[start]
        first = last
    return counted_D, all_D


def reason(why: int, size: int, seq_len: int) -> str:
    """Why a document of so many tokens, or a pair, is left out, in words."""
    if why == LONG:
        return TooLong(f"too long: {size} tokens, seq_len is {seq_len}")
    if why == LONG_PAIR:
        return TooLong(f"too long: the pair has {size} tokens, seq_len is {seq_len}")
    if why == BEHIND:
        told = f"no token counts in the loss within the first {seq_len} tokens (seq_len)"
        return TooLong(f"too long: {told}")
    return "no token counts in the loss"
