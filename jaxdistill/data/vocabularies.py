"""Which tokens two vocabularies share: ids that mean the same bytes, wherever they stand.

same        every id means the same in both; rows that are no tokens do not count
shared      at most one of the two has ordinary tokens that the other lacks
different   both have: they cut text into different tokens

Control tokens that one side lacks, or names otherwise, are never shared; what is not shared is
masked in both models, and data that hold it are refused.
"""

import collections
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxdistill.data.token_bytes import is_byte, speller

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the ids of a tokenizer mean.

    Attributes:
      table: id -> (the bytes of its token, whether it stands for a byte alone); an id without a
        token is missing.
      added: ids of tokens that are found in text as wholes: control tokens and their like.
    """

    table: Mapping[int, tuple[bytes, bool]]
    added: frozenset[int]

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self.table, default=-1) + 1


def vocabulary(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a transformers tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return described(json.loads(backend.to_str()))
    added = frozenset(tokenizer.added_tokens_decoder)
    table = {index: (token.encode(), False) for token, index in tokenizer.get_vocab().items()}
    return Vocabulary(table, added)


def described(content: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of the content of a tokenizer.json.

    Tokens that stand for no fixed bytes, as WordPiece's, mean how they are written.

    Raises:
      KeyError, TypeError, ValueError, AttributeError: if it is none.
    """
    words = content["model"]["vocab"]
    pairs = words.items() if isinstance(words, dict) else [(w[0], i) for i, w in enumerate(words)]
    spell = speller(content) or str.encode
    table = {int(index): (spell(token), is_byte(token)) for token, index in pairs}
    added = {int(one["id"]): str(one["content"]) for one in content["added_tokens"]}
    table |= {
        index: (token.encode(), False) for index, token in added.items() if not is_byte(token)
    }
    return Vocabulary(table, frozenset(added))


@dataclasses.dataclass(frozen=True)
class Unshared:
    """What one vocabulary has alone: ordinary tokens, and added ones."""

    ordinary: tuple[int, ...]
    added: tuple[int, ...]
    tokens: int

    def __str__(self) -> str:
        return f"{len(self.ordinary)} ordinary and {len(self.added)} control tokens"


@dataclasses.dataclass(frozen=True)
class Pair:
    """What the vocabulary of a run shares with that of a model.

    Attributes:
      ids: for each id of the run's, the model's id of the same token, or -1. An id that means
        nothing in either counts as the same.
      renamed: ids of control tokens in both, whose names differ; of `ids` -1.
      ours: what the run's has alone.
      theirs: what the model's has alone.
      moved: tokens that have another id in the model.
    """

    ids: tuple[int, ...]
    renamed: tuple[int, ...]
    ours: Unshared
    theirs: Unshared
    moved: int

    @property
    def kind(self) -> str:
        """same, shared or different."""
        if self.ours.ordinary and self.theirs.ordinary:
            return "different"
        sides = (self.ours, self.theirs)
        whole = not self.moved and not any(side.ordinary or side.added for side in sides)
        return "same" if whole else "shared"

    @property
    def in_place(self) -> bool:
        """Whether every id of the run's means the same in the model, which may have more."""
        return all(other == index for index, other in enumerate(self.ids))

    @property
    def columns(self) -> tuple[int, ...] | None:
        """The run's ids that the model has too, in rising order; None where it has all."""
        if -1 not in self.ids:
            return None
        return tuple(index for index, other in enumerate(self.ids) if other >= 0)

    @property
    def read(self) -> tuple[int, ...]:
        """The model's rows for the run's ids, -1 for none: renamed ones are read by their id."""
        aside = frozenset(self.renamed)
        return tuple(i if i in aside else other for i, other in enumerate(self.ids))

    @property
    def unreadable(self) -> tuple[int, ...]:
        """The tokens of the run's that the model has no row for."""
        aside = frozenset(self.renamed)
        return tuple(i for i in self.ours.ordinary + self.ours.added if i not in aside)

    @property
    def misplaced(self) -> tuple[int, ...]:
        """The ordinary tokens of the run's that mean something else, or nothing, in the model."""
        aside = frozenset(self.ours.added)
        return tuple(i for i, o in enumerate(self.ids) if o != i and i not in aside)

    def __str__(self) -> str:
        alone = len(self.ours.ordinary) + len(self.ours.added)
        text = f"{self.kind}: {self.ours.tokens - alone} of {self.ours.tokens} tokens are shared"
        if self.moved:
            text += f", {self.moved} of them under another id"
        if self.ours.ordinary or self.ours.added:
            text += f"; the tokenizer's alone, masked: {self.ours}"
        if self.theirs.ordinary or self.theirs.added:
            text += f"; the model's alone, masked: {self.theirs}"
        return text


def compare(ours: Vocabulary, theirs: Vocabulary, rows: int | None = None) -> Pair:
    """The pair of the vocabulary that cuts a run's text, and that of a model.

    Args:
      ours: of the run's tokenizer.
      theirs: of the model's own.
      rows: of the model's embedding; ids behind them are no tokens of its.
    """
    known = {i: meaning for i, meaning in theirs.table.items() if rows is None or i < rows}
    size = max(known, default=-1) + 1
    same = {index for index, meaning in ours.table.items() if known.get(index) == meaning}
    elsewhere = collections.defaultdict(collections.deque)
    for index, meaning in sorted(known.items()):
        if index not in same:
            elsewhere[meaning].append(index)
    ids, used, renamed = [], set(same), []
    for index in range(ours.size):
        meaning = ours.table.get(index)
        if meaning is None:
            ids.append(index if index not in known and index < size else -1)
        elif index in same:
            ids.append(index)
        else:
            other = elsewhere.get(meaning)
            ids.append(other.popleft() if other else -1)
            used.add(ids[-1])
            if ids[-1] < 0 and index in ours.added and index in theirs.added and index in known:
                renamed.append(index)
    renamed = [index for index in renamed if index not in used]
    alone = [index for index in ours.table if ids[index] < 0]
    rest = [index for index in known if index not in used]
    moved = sum(ids[index] not in (index, -1) for index in ours.table)
    sides = _side(ours, alone), _side(theirs, rest)
    return Pair(tuple(ids), tuple(renamed), *sides, moved)


def _side(whole: Vocabulary, alone: list[int]) -> Unshared:
    ordinary = tuple(sorted(index for index in alone if index not in whole.added))
    added = tuple(sorted(index for index in alone if index in whole.added))
    return Unshared(ordinary, added, len(whole.table))


def named(whole: Vocabulary, ids: tuple[int, ...]) -> str:
    """The first of some tokens, for messages: 7 'a', 9 '<think>'."""
    shown = ", ".join(f"{i} {whole.table[i][0].decode('utf-8', 'replace')!r}" for i in ids[:_SHOWN])
    return shown + (", ..." if len(ids) > _SHOWN else "")
