"""Which tokens of an old vocabulary spell each token of a new one: what new rows are made of."""

from collections.abc import Mapping
from typing import Any

from jaxdistill.data.vocabularies import Vocabulary, compare, vocabulary

_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def spelled(new: Any, old: Any, rows: int) -> list[list[int]]:
    """For each id of a tokenizer the old ids that spell it, in order.

    The same token where the old one has it; a token of the same role (beginning, end, padding,
    unknown) where it is a special one; else the longest tokens that spell its bytes from the left.
    An id without a token, and bytes that nothing spells, have none.

    Args:
      new: tokenizer of the rows to be made.
      old: tokenizer of the rows there are.
      rows: of the old embedding; ids behind them are left out.
    """
    ours, theirs = vocabulary(new), vocabulary(old)
    pair = compare(ours, theirs, rows)
    by_role = _roles(new, old, rows)
    pieces = _pieces(theirs, rows)
    longest = max(map(len, pieces), default=0)
    spellings: list[list[int]] = []
    for index, other in enumerate(pair.ids):
        if index not in ours.table:
            spellings.append([])
        elif other >= 0:
            spellings.append([other])
        elif index in by_role:
            spellings.append([by_role[index]])
        else:
            spellings.append(_cut(ours.table[index][0], pieces, longest))
    return spellings


def _roles(new: Any, old: Any, rows: int) -> dict[int, int]:
    pairs = ((getattr(new, role), getattr(old, role)) for role in reversed(_ROLES))
    return {a: b for a, b in pairs if a is not None and b is not None and b < rows}


def _pieces(whole: Vocabulary, rows: int) -> Mapping[bytes, int]:
    """Bytes -> id of ordinary tokens, the first of several."""
    ids = sorted(i for i in whole.table if i not in whole.added and i < rows)
    return {whole.table[i][0]: i for i in reversed(ids) if whole.table[i][0]}


def _cut(text: bytes, pieces: Mapping[bytes, int], longest: int) -> list[int]:
    found, place = [], 0
    while place < len(text):
        sizes = range(min(longest, len(text) - place), 0, -1)
        size = next((n for n in sizes if text[place : place + n] in pieces), 0)
        if size:
            found.append(pieces[text[place : place + size]])
        place += size or 1
    return found
