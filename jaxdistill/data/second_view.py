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

from jaxdistill.data import alignment, rendering
from jaxdistill.data.codec import Codec, prepare, tokenizer_fingerprint
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.documents import Documents, Encoder
from jaxdistill.data.encode import Beside, Document
from jaxdistill.data.records import PAIRS, Record
from jaxdistill.data.rules import TooLong, Unaligned
from jaxdistill.data.settings import Settings
from jaxdistill.data.tally import Tally
from jaxdistill.data.token_bytes import TokenBytes, token_bytes
from jaxdistill.errors import ConfigError, DataError, MismatchError

Run = tuple[int, int]  # first token, and the one behind the last


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
        if not self._whole:
            templates = view.templates(codec, settings.chat_template)
            words = rendering.divided(settings.template_kwargs, templates)
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
        both = zip(records, self._ours(records), self._theirs(records), strict=True)
        return [self._pair(*one) for one in both]

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
                groups = matched((one, other), self._bytes, text)
            except MismatchError as error:
                return str(error)
            pieces = cut((one, other), groups, limits, self._settings.policy(record.kind))
            if isinstance(pieces, str):
                return pieces
            made += pieces
        return tuple(made) or Unaligned("nothing that both models predict ends at one place")


def bytes_of(who: str, codec: Codec) -> TokenBytes:
    """The bytes of a tokenizer's tokens, all of its special ones without.

    Raises:
      MismatchError: naming whose they are, if they stand for no fixed bytes.
    """
    try:
        table = token_bytes(codec.tokenizer)
    except MismatchError as error:
        raise MismatchError(f"{who}: {error}") from None
    inert = np.flatnonzero(codec.inert).tolist()
    return dataclasses.replace(table, special=table.special.union(inert))


def matched(
    sides: tuple[Document, Document], tables: tuple[TokenBytes, ...], text: bytes | None
) -> np.ndarray:
    """The groups of two documents of one record, those that end an answer among them.

    Args:
      sides: the student's document and the teacher's.
      tables: the bytes of their tokens.
      text: that both must spell; None where only what counts in the loss is compared.

    Returns:
      int32 [groups, 4], as `alignment.align` gives them.

    Raises:
      MismatchError: with the first difference, where the two do not spell the same.
    """
    if text is None:
        runs = [_runs(side.loss) for side in sides]
    else:
        runs = [[(0, len(side.ids))] for side in sides]
    if len(runs[0]) != len(runs[1]):
        raise MismatchError(
            f"the student's template shows {len(runs[0])} answers, the teacher's {len(runs[1])}"
        )
    found = [np.zeros((0, 4), np.int32)]
    for ours, theirs in zip(*runs, strict=True):
        spelled = _spelled(sides, (ours, theirs), tables, text)
        groups = alignment.align(*spelled)
        ends = [_end(pieces) for pieces in spelled]
        if None not in ends:
            groups = np.concatenate([groups, np.repeat(np.asarray([ends], np.int32), 2, axis=1)])
        found.append(groups + np.repeat([ours[0], theirs[0]], 2).astype(np.int32))
    return np.concatenate(found)


def _runs(loss: np.ndarray) -> list[Run]:
    """The stretches of tokens that count."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _spelled(
    sides: tuple[Document, Document],
    runs: tuple[Run, Run],
    tables: tuple[TokenBytes, ...],
    text: bytes | None,
) -> list[list[bytes]]:
    """The bytes of the tokens of a stretch on both sides, once they are the same."""
    ids = [side.ids[first:last].tolist() for side, (first, last) in zip(sides, runs, strict=True)]
    if text is None:
        text = b"".join(tables[0].pieces(ids[0]))
        theirs = b"".join(tables[1].pieces(ids[1]))
        if tables[0].dummy_prefix and text == b" " + theirs:
            text = theirs
    spelled = []
    for who, table, own in zip(("student", "teacher"), tables, ids, strict=True):
        try:
            spelled.append(table.spell(own, text))
        except MismatchError as error:
            raise MismatchError(f"the {who}'s {error}") from None
    return spelled


def _end(pieces: list[bytes]) -> int | None:
    """The special token behind the last one that spells something; None where there is none."""
    behind = 1 + max((i for i, piece in enumerate(pieces) if piece), default=-1)
    return behind if behind < len(pieces) else None


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
