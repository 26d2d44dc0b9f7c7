"""Conversations to tokens: special tokens from the template, none from the data; exact masks."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxdistill.data.chat_template import RenderError, Stalled
from jaxdistill.data.encode import (
    Codec,
    Document,
    encode_batch,
    encode_middle,
)
from jaxdistill.data.learned import Learned
from jaxdistill.data.records import Record
from jaxdistill.data.rendering import CLOSE, OPEN, SENTINEL, ChatRenderer, mark
from jaxdistill.data.spans import CharSpan, last_control
from jaxdistill.data.tally import Tally
from jaxdistill.errors import ModelError


@dataclasses.dataclass(frozen=True)
class _Rendered:
    """A rendered conversation.

    Attributes:
      text: with sentinels.
      cuts: where they are.
      stash: what they stand for.
      learned: what counts in the loss; None: all but `left`.
      left: what does not.
      ends_learned: whether an end token that is added counts.
    """

    text: str
    cuts: list[CharSpan]
    stash: list[str]
    learned: list[CharSpan] | None
    left: list[CharSpan]
    ends_learned: bool


class ChatEncoder:
    """Turns conversations into documents.

    Strings of special tokens that stand in a message are taken out before the template sees it,
    each replaced by a numbered sentinel, and put back as plain text when the result is tokenised;
    special tokens in the result are therefore the template's own. A conversation that holds none
    is tokenised in one piece, exactly as `tokenizer.apply_chat_template` does.

    Attributes:
      tally: what was counted of the conversations so far.
    """

    def __init__(
        self,
        codec: Codec,
        source: str | None,
        loss_on: str,
        template_kwargs: Mapping[str, Any] | None = None,
        tally: Tally | None = None,
    ):
        """Compiles the template.

        Args:
          codec: from `codec.prepare`.
          source: the template, see `rendering.template_of`.
          loss_on: a value of `learned.LOSS_ON`.
          template_kwargs: what the template is given besides, such as `enable_thinking`.
          tally: where it is counted what the template makes of the conversations.

        Raises:
          DataError, ConfigError, ModelError: as `ChatRenderer`.
        """
        self._codec, self.tally = codec, tally or Tally()
        self._renderer = ChatRenderer(codec, source, template_kwargs or {}, self.tally)
        self._learned = Learned(self._renderer, codec, loss_on, self.tally)
        # Added tokens that are not special, such as <think>, are the assistant's to write.
        self._control = codec.control_pattern
        # Only a normaliser can turn other characters into a special token's string.
        self._check = codec.backend.normalizer is not None

    def encode(self, records: Sequence[Record]) -> list[Document | str]:
        """A Document, or the reason why there is none, for every record."""
        rendered = [self._render(record) for record in records]
        jobs = [
            (text[start:end], start)
            for item in rendered
            if not isinstance(item, str)
            for text, cuts in [(item.text, item.cuts)]
            for start, end in _between(cuts, len(text))
        ]
        masked = any(
            not isinstance(item, str) and (item.learned is not None or item.left)
            for item in rendered
        )
        offsets = masked or self._check
        encoded = iter(
            encode_batch(
                self._codec, [job[0] for job in jobs], split_special=False, offsets=offsets
            )
        )
        return [
            item if isinstance(item, str) else self._assemble(item, encoded) for item in rendered
        ]

    def encode_prompt(
        self, turns: Record, variables: Mapping[str, Any] = MappingProxyType({})
    ) -> list[int]:
        """A conversation that the assistant is to go on with: in its last turn, or in a new one.

        Args:
          turns: the conversation.
          variables: further variables for the template, without strings of special tokens.

        Raises:
          RenderError: if the template refuses it, or the tokenizer does.
        """
        goes_on = turns.roles[-1] == "assistant"
        shielded, marked = self._renderer.first(
            turns, add_generation_prompt=not goes_on, variables=variables, mark_end=goes_on
        )
        text, stash = self._renderer.template.spans(marked)[0], shielded.stash
        end = mark(len(stash))
        if goes_on and end not in text:
            raise RenderError("chat template: does not print the end of the assistant's last turn")
        text = text[: text.rindex(end)] if goes_on else text
        cuts = _cuts(text, len(stash))
        pieces = [text[start:end] for start, end in _between(cuts, len(text))]
        encoded = encode_batch(self._codec, pieces, split_special=False, offsets=self._check)
        joined = self._join(text, cuts, stash, iter(encoded))
        if isinstance(joined, str):
            raise RenderError(joined)
        return joined[0]

    def _render(self, record: Record) -> _Rendered | str:
        """The rendered conversation and what is learned of it, or the reason why there is none."""
        try:
            shielded, marked = self._renderer.first(record)
            text, generated = self._renderer.template.spans(marked)
            cuts = _cuts(text, len(shielded.stash))
            self._renderer.check(shielded, text)
            learned, left = self._learned.spans(record, shielded, text, generated)
        except RenderError as error:
            self.tally.stalled += isinstance(error, Stalled)
            return str(error)
        ends = self._learned.learns_end(record)
        return _Rendered(text, cuts, shielded.stash, learned, left, ends)

    def _assemble(self, item: _Rendered, encoded: Any) -> Document | str:
        """The document of a rendered conversation, or the reason why there is none."""
        joined = self._join(item.text, item.cuts, item.stash, encoded)
        if isinstance(joined, str):
            return joined
        ids, starts, ends = joined
        if item.learned is not None:
            loss = _inside(starts, ends, item.learned)
        elif item.left:
            loss = ~_inside(starts, ends, item.left)
        else:
            loss = np.ones(len(ids), bool)
        return self._ended(item, np.asarray(ids, np.int32), loss)

    def _join(
        self, text: str, cuts: list[CharSpan], stash: list[str], encoded: Any
    ) -> tuple[list[int], list[int], list[int]] | str:
        """(ids, starts, ends) of the tokenised pieces and the strings between them, kept as text.

        All pieces are taken from `encoded`, also where the result is a reason.
        """
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        problem = None
        pieces = [(start, end, None) for start, end in _between(cuts, len(text))]
        hidden = [(start, end, stash[int(text[start + 1 : end - 1])]) for start, end in cuts]
        for start, _end, literal in sorted([*pieces, *hidden], key=lambda piece: piece[:2]):
            piece = next(encoded) if literal is None else encode_middle(self._codec, literal)
            if isinstance(piece, str):
                problem = problem or piece
            elif literal is not None:
                ids += piece
                starts += [start] * len(piece)
                ends += [start + 1] * len(piece)
            elif isinstance(piece, tuple):
                problem = problem or self._forged(text, start, *piece)
                ids += piece[0]
                starts += [start + first for first, _ in piece[1]]
                ends += [start + last for _, last in piece[1]]
            else:
                ids += piece
        return problem or (ids, starts, ends)

    def _forged(self, text: str, start: int, ids: list[int], offsets: list[CharSpan]) -> str | None:
        """Finds a special token that a normaliser made from other characters; what to say of it."""
        for index in np.flatnonzero(self._codec.inert[ids]):
            first, last = offsets[index]
            if self._codec.controls.get(text[start + first : start + last].strip()) != ids[index]:
                written = text[start + first : start + last][:40]
                return f"the tokenizer turns the text {written!r} into a special token"
        return None

    def _ended(self, item: _Rendered, ids: np.ndarray, loss: np.ndarray) -> Document:
        """Adds the end token where the template ends a conversation with no special token."""
        ends = last_control(self._control, item.text, 0, len(item.text)) is not None
        if not ends and self._codec.end is not None:
            ids = np.append(ids, np.int32(self._codec.end))
            loss = np.append(loss, item.ends_learned)
        elif item.learned is not None and loss.any() and not self._codec.inert[ids[loss]].any():
            self.tally.ends_turns = False
        return Document(ids, loss)


def opening(codec: Codec, source: str | None, template_kwargs: Mapping[str, Any]) -> str:
    """What a template prints between a user's text and the first letter of the answer.

    Args:
      codec: from `codec.prepare`.
      source: the template, see `rendering.template_of`.
      template_kwargs: what it is given besides.

    Raises:
      DataError, ConfigError, ModelError: as `ChatRenderer`, and for a text that it does not print.
    """
    text, renderer = "a user's text", ChatRenderer(codec, source, template_kwargs)
    asked = [{"role": "user", "content": text}]
    try:
        printed = renderer.template.render(asked, add_generation_prompt=True)
    except RenderError as error:
        raise ModelError(str(error)) from error
    _, found, behind = renderer.template.spans(printed)[0].rpartition(text)
    if not found:
        raise ModelError("the chat template does not print a user's text")
    return behind


def _cuts(text: str, count: int) -> list[CharSpan]:
    """Where the sentinels of a rendered text are, all of them whole and of those that were made."""
    marks = list(SENTINEL.finditer(text))
    cuts = [match.span() for match in marks]
    outside = "".join(text[start:end] for start, end in _between(cuts, len(text)))
    whole = OPEN not in outside and CLOSE not in outside
    if not whole or not all(int(match[1]) < count for match in marks):
        raise RenderError(
            "chat template: cuts through a special token that is written in a message"
        )
    return cuts


def _between(cuts: list[CharSpan], size: int) -> list[CharSpan]:
    """The non-empty stretches of [0, size) outside the cuts."""
    starts = [0, *(end for _, end in cuts)]
    ends = [*(start for start, _ in cuts), size]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def _inside(starts: list[int], ends: list[int], spans: list[CharSpan]) -> np.ndarray:
    """bool [N]: which tokens, each at [start, end), lie in a span, wholly or in part.

    Some tokenizers leave spaces out of a token's place; a token of spaces only is then empty, and
    stands at the end of its own spaces.
    """
    start_N, end_N = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
    begin_N = np.where(start_N == end_N, start_N - 1, start_N)
    inside_N = np.zeros(len(start_N), bool)
    for first, last in spans:
        inside_N |= (begin_N < last) & (end_N > first)
    return inside_N
