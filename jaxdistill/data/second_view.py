"""Documents in the tokens of two models: aligned by bytes, and cut where both have room.

student   <s> un|believ|able     groups of tokens   0 1 1 2     that spell the same bytes;
teacher   unbel|iev|able </s>                       1 1 2 0     0: compared with nothing

Of a text or a completion all is aligned. Of a conversation, which each model's own template
renders, what the assistant says is. A token that ends it is the other model's that does.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdistill.data import alignment, matching, rendering
from jaxdistill.data.codec import Codec, prepare, tokenizer_fingerprint
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.documents import Encoder
from jaxdistill.data.encode import Beside, Document, Documents
from jaxdistill.data.matching import Around, around, bytes_of, matched
from jaxdistill.data.records import PAIRS, Record
from jaxdistill.data.rules import TooLong, Unaligned
from jaxdistill.data.settings import Settings
from jaxdistill.data.tally import Tally
from jaxdistill.errors import ConfigError, DataError, MismatchError


@dataclasses.dataclass(frozen=True, eq=False)
class SecondView:
    """The tokens of another model, the teacher, in which the same documents are given too.

    Attributes:
      tokenizer: of that model, with the chat template that renders its conversations.
      seq_len: tokens in a row of that view.
    """

    tokenizer: Any
    seq_len: int

    @functools.cached_property
    def codec(self) -> Codec:
        """Of the tokenizer.

        Raises:
          ModelError: if it is not a fast one.
        """
        return prepare(self.tokenizer)

    def templates(self, codec: Codec, chat_template: str | None) -> tuple[str | None, str]:
        """The chat templates of the student, whose codec and own text are given, and of this model.

        Raises:
          DataError: if this model has none.
        """
        theirs = rendering.template_of(self.codec.tokenizer)
        if theirs is None:
            raise DataError(
                "the records hold conversations, and the teacher's tokenizer has no chat template "
                "that renders them: take a teacher that has one, or write prompt and completion"
            )
        return rendering.template_of(codec.tokenizer, chat_template), theirs

    def identity(self) -> dict[str, Any]:
        """What decides its tokens and where documents are cut, as JSON."""
        return {
            "matching": matching.VERSION,
            "tokenizer": tokenizer_fingerprint(self.codec.tokenizer),
            "prefix": self.codec.prefix,
            "template": rendering.template_of(self.codec.tokenizer, None),
            "seq_len": self.seq_len,
        }

    def encoder(
        self, codec: Codec, settings: Settings, kind: str, tally: Tally, *, source: str
    ) -> "ViewsEncoder":
        """What makes documents with this view of records of a kind."""
        return ViewsEncoder(codec, settings, self, kind, tally, source=source)


def sided(record: Record, templates: Sequence[str | None]) -> tuple[Record, ...]:
    """A conversation for each of several templates, with those of its variables that it knows."""
    more = record.conversation
    if more is None or not more.variables:
        return (record,) * len(templates)
    return tuple(
        dataclasses.replace(record, conversation=dataclasses.replace(more, variables=own))
        for own in rendering.divided(more.variables, templates)
    )


class ViewsEncoder:
    """Encodes records for both models: documents that carry their second view.

    Args:
      codec: of the student's tokenizer.
      settings: of the data set; a chat template that is given is the student's.
      view: of the teacher.
      kind: of the records.
      tally: as `documents.Encoder` takes them, which raises the same errors.
      source: likewise.

    Raises:
      MismatchError: for a tokenizer whose tokens stand for no fixed bytes.
      ConfigError: for settings under which two templates cannot be aligned.
    """

    def __init__(
        self,
        codec: Codec,
        settings: Settings,
        view: SecondView,
        kind: str,
        tally: Tally,
        *,
        source: str,
    ):
        if kind in ("messages", "dialogue") and settings.loss_on == "all":
            raise ConfigError(
                "data.loss_on = all: each model renders a conversation by its own template, and "
                "only answers can be aligned: use assistant or completion"
            )
        if kind in PAIRS:
            raise ConfigError(
                "data: pairs of answers are compared in the student's tokens alone, and the method "
                "needs the teacher's too: use records of text, completions or messages"
            )
        if settings.special_tokens == "parse":
            raise ConfigError(
                "data.special_tokens = parse: special tokens are written for one model, and there "
                "are two tokenizers: use text"
            )
        self._settings, self._view = settings, view
        self._whole = kind in ("text", "completion")
        ours, theirs = settings, dataclasses.replace(settings, chat_template=None)
        self._templates: tuple[str | None, ...] = ()
        if not self._whole:
            self._templates = view.templates(codec, settings.chat_template)
            words = rendering.divided(settings.template_kwargs, self._templates)
            ours, theirs = (
                dataclasses.replace(one, template_kwargs=own)
                for one, own in zip((ours, theirs), words, strict=True)
            )
        self._ours = Encoder(codec, ours, kind, tally, source=source)
        self._theirs = Encoder(view.codec, theirs, kind, Tally(), source=source)
        self._bytes = bytes_of("student", codec), bytes_of("teacher", view.codec)
        self.chat = self._ours.chat

    def __call__(self, records: Sequence[Record]) -> list[Documents]:
        """What becomes of each record."""
        ours = theirs = records
        if self._templates:
            ours, theirs = zip(*(sided(one, self._templates) for one in records), strict=True)
        both = zip(records, self._ours(ours), self._theirs(theirs), strict=True)
        return [self._pair(*one) for one in both]

    @functools.cached_property
    def _around(self) -> tuple[Around, ...]:
        """What each template puts around answers; nothing where it does not show it."""
        ours, theirs = self._ours.chat, self._theirs.chat
        if ours is None or theirs is None:
            return Around(), Around()
        each = around(ours, self._bytes[0]), around(theirs, self._bytes[1])
        return tuple(Around() if isinstance(one, str) else one for one in each)

    def _pair(self, record: Record, ours: Documents, theirs: Documents) -> Documents:
        if isinstance(ours, str):
            return ours
        if isinstance(theirs, str):
            return theirs if type(theirs) is not str else f"of the teacher's tokens: {theirs}"
        if len(ours) != len(theirs):
            return (
                f"the student's template shows {len(ours)} answers of the assistant, the "
                f"teacher's {len(theirs)}"
            )
        text = "".join(record.texts).encode() if self._whole else None
        limits = self._settings.seq_len, self._view.seq_len
        made: list[Document] = []
        for one, other in zip(ours, theirs, strict=True):
            try:
                groups = matched((one, other), self._bytes, text, self._around)
            except MismatchError as error:
                return str(error)
            pieces = cut((one, other), groups, limits, self._settings.policy(record.kind))
            if isinstance(pieces, str):
                return pieces
            made += pieces
        return tuple(made) or Unaligned("nothing that both models predict ends at one place")


def cut(
    sides: tuple[Document, Document], groups: np.ndarray, limits: tuple[int, int], policy: str
) -> list[Document] | str:
    """A document in pieces that fit into a row of both views, cut between two groups.

    Args:
      sides: the student's document and the teacher's.
      groups: of `matched`.
      limits: tokens in a row of the student's view, and of the teacher's.
      policy: split: all pieces; truncate: the first; reject: one that has all, or a reason.

    Returns:
      The pieces in which something can be compared, or why there are none.
    """
    sizes = len(sides[0].ids), len(sides[1].ids)
    ends = np.concatenate([groups[:, [1, 3]] + 1, [sizes]]).astype(np.int64)
    pieces: list[Document] = []
    start, done = np.zeros(2, np.int64), 0
    while done < len(ends):
        room = (np.searchsorted(ends[:, i], start[i] + limits[i], "right") for i in (0, 1))
        until = int(min(room))
        if until <= done and done == len(groups):
            break  # what is left behind the last group
        if until <= done:
            return TooLong(
                f"too long: tokens that have to stay together do not fit into rows of {limits[0]} "
                f"tokens of the student and {limits[1]} of the teacher"
            )
        if policy == "reject" and until < len(ends):
            return TooLong(
                f"too long: {sizes[0]} tokens of the student and {sizes[1]} of the teacher, rows "
                f"have {limits[0]} and {limits[1]}"
            )
        end = ends[until - 1]
        piece = _piece(sides, groups[done:until], start, end)
        if policy == "truncate":
            shortened = until < len(ends)
            return [] if piece is None else [dataclasses.replace(piece, shortened=shortened)]
        pieces += [] if piece is None else [piece]
        start, done = end, until
    return pieces


def _piece(
    sides: tuple[Document, Document], groups: np.ndarray, start: np.ndarray, end: np.ndarray
) -> Document | None:
    """Tokens [start, end) of both sides, which hold `groups`; None where none can be compared.

    A group counts where the loss counts all of its tokens; the first token of a piece is predicted
    by nothing.
    """
    ours, theirs = (slice(a, b) for a, b in zip(start, end, strict=True))
    ids, loss, second = sides[0].ids[ours], sides[0].loss[ours], sides[1].ids[theirs]
    own = groups - np.repeat(start, 2)
    counted = np.concatenate([[0], np.cumsum(loss)])
    whole = counted[own[:, 1] + 1] - counted[own[:, 0]] == own[:, 1] - own[:, 0] + 1
    own = own[whole & (own[:, 0] > 0) & (own[:, 2] > 0)]
    if not len(own):
        return None
    mine, other = alignment.numbered(own, len(ids), len(second))
    return Document(ids, loss, Beside(mine, second, other))


class _Aligned:
    """Which tokens of the second view lie in a group, as an array of a data set."""

    def __init__(self, groups: Any):
        self._groups, self.shape = groups, groups.shape

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: slice) -> np.ndarray:
        return self._groups[index] > 0


def second_rows(dataset: Dataset) -> Dataset:
    """The same rows in the tokens of the second model alone; what is aligned counts in the loss."""
    assert dataset.second is not None, "only asked for where there is one"
    (seq_len, pad), arrays = dataset.second, dataset.arrays
    own = {name: arrays[f"second_{name}"] for name in ("tokens", "segments")}
    groups = arrays["second_groups"]
    own |= {"loss": _Aligned(groups), "aligned": groups, "rows": arrays["rows"]}
    tokens = len(own["tokens"])
    return dataclasses.replace(
        dataset, seq_len=seq_len, pad=pad, num_tokens=tokens, second=None, origins=(), arrays=own
    )
