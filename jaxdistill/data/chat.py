"""Conversations to tokens: special tokens from the template, none from the data; exact masks."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data.chat_template import ChatTemplate, RenderError
from jaxdistill.data.encode import (
    Codec,
    Document,
    encode_batch,
    encode_middle,
)
from jaxdistill.data.records import Record
from jaxdistill.errors import DataError

_OPEN, _CLOSE = "\ue000", "\ue001"
# Characters: a conversation is rendered up to each of its turns, which grows as their square.
_MAX_PREFIXES = 200_000_000
_PRIVATE = "\ue000-\ue003"
_SENTINEL = re.compile(f"{_OPEN}([0-9]{{1,9}}){_CLOSE}")

Span = tuple[int, int]


def template_of(tokenizer: Any, chat_template: str | None = None) -> str | None:
    """The template in use: the one given, else the tokenizer's own (its default), else None."""
    if chat_template is not None:
        return chat_template
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


class ChatEncoder:
    """Turns `messages` records into documents.

    Strings of special tokens that stand in a message are taken out before the template sees it,
    each replaced by a numbered sentinel, and put back as plain text when the result is tokenised;
    special tokens in the result are therefore the template's own. A conversation that holds none
    is tokenised in one piece, exactly as `tokenizer.apply_chat_template` does.

    Attributes:
      ends_turns: False once an assistant's counted text was seen that ends without a special token.
    """

    def __init__(self, codec: Codec, source: str | None, loss_on: str):
        """Compiles the template.

        Args:
          codec: from `encode.prepare`.
          source: the template, see `template_of`.
          loss_on: `all` or `assistant`.

        Raises:
          DataError: if there is no template.
          ModelError: if the template has a syntax error.
        """
        if source is None:
            raise DataError(
                "the records hold `messages`, but the tokenizer has no chat template: use the "
                "tokenizer of a chat model, give a chat_template, or write prompt and completion"
            )
        self._codec = codec
        self._template = ChatTemplate(source, codec.tokenizer.special_tokens_map)
        self._assistant = loss_on == "assistant"
        # Added tokens that are not special, such as <think>, are the assistant's to write.
        self._control = codec.control_pattern
        self._shield = re.compile(f"{self._control.pattern}|[{_PRIVATE}]")
        # Only a normaliser can turn other characters into a special token's string.
        self._check = codec.tokenizer.backend_tokenizer.normalizer is not None
        self.ends_turns = True

    def encode(self, records: Sequence[Record]) -> list[Document | str]:
        """A Document, or the reason why there is none, for every record."""
        rendered = [self._render(record) for record in records]
        jobs = [
            (text[start:end], start)
            for item in rendered
            if not isinstance(item, str)
            for text, _, cuts in [item[:3]]
            for start, end in _between(cuts, len(text))
        ]
        offsets = self._assistant or self._check
        encoded = iter(
            encode_batch(
                self._codec, [job[0] for job in jobs], split_special=False, offsets=offsets
            )
        )
        return [
            item if isinstance(item, str) else self._assemble(record, *item, encoded)
            for record, item in zip(records, rendered, strict=True)
        ]

    def encode_prompt(self, turns: Record, variables: Mapping[str, Any]) -> list[int]:
        """A conversation that the assistant is to go on with: in its last turn, or in a new one.

        Args:
          turns: the conversation.
          variables: further variables for the template, without strings of special tokens.

        Raises:
          RenderError: if the template refuses it, or the tokenizer does.
        """
        messages, stash = self._shielded(turns)
        goes_on, mark = turns.roles[-1] == "assistant", f"{_OPEN}{len(stash)}{_CLOSE}"
        if goes_on:
            messages[-1]["content"] += mark
        marked = self._template.render(
            messages, add_generation_prompt=not goes_on, variables=variables
        )
        text = self._template.spans(marked)[0]
        if goes_on and mark not in text:
            raise RenderError("chat template: does not print the end of the assistant's last turn")
        text = text[: text.rindex(mark)] if goes_on else text
        cuts = _cuts(text, len(stash))
        pieces = [text[start:end] for start, end in _between(cuts, len(text))]
        encoded = encode_batch(self._codec, pieces, split_special=False, offsets=self._check)
        joined = self._join(text, cuts, stash, iter(encoded))
        if isinstance(joined, str):
            raise RenderError(joined)
        return joined[0]

    def _render(self, record: Record) -> tuple[str, list[Span], list[Span], list[str]] | str:
        """(text with sentinels, assistant spans, their spans, their strings), or the reason."""
        messages, stash = self._shielded(record)
        try:
            marked = self._template.render(messages)
            text, spans = self._template.spans(marked)
            if self._assistant and not self._template.marks_generation:
                spans = self._prefix_spans(messages, text)
            cuts = _cuts(text, len(stash))
        except RenderError as error:
            return str(error)
        return text, spans, cuts, stash

    def _shielded(self, record: Record) -> tuple[list[dict[str, str]], list[str]]:
        """Messages with sentinels in place of the strings of special tokens, and those strings."""
        stash: list[str] = []

        def hide(match: re.Match[str]) -> str:
            stash.append(match[0])
            return f"{_OPEN}{len(stash) - 1}{_CLOSE}"

        messages = [
            {"role": role, "content": self._shield.sub(hide, content)}
            for role, content in zip(record.roles, record.texts, strict=True)
        ]
        return messages, stash

    def _prefix_spans(self, messages: list[dict[str, str]], text: str) -> list[Span]:
        """Where the assistant speaks: the conversation is rendered up to each of its turns."""
        spans = []
        rendered = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            rendered += len(text)
            if rendered > _MAX_PREFIXES:
                raise RenderError(
                    f"too many of the assistant's messages ({len(messages)} in all) for the "
                    "conversation's length: split it, or use a template with {% generation %} marks"
                )
            before = self._template.render(messages[:index], add_generation_prompt=True)
            last = index + 1 == len(messages)
            after = text if last else self._template.render(messages[: index + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise RenderError(
                    f"chat template: cannot tell where the assistant's message {index + 1} lies: "
                    "the conversation rendered up to it is not the beginning of the whole; use a "
                    "template with {% generation %} marks, or loss_on: all"
                )
            spans.append((len(before), self._trim(text, len(before), len(after))))
        return spans

    def _trim(self, text: str, start: int, end: int) -> int:
        """The end of a turn: behind its end token, without the white space that follows it."""
        return self._last_control(text, start, end) or end

    def _assemble(
        self,
        record: Record,
        text: str,
        spans: list[Span],
        cuts: list[Span],
        stash: list[str],
        encoded: Any,
    ) -> Document | str:
        """The document of a rendered conversation, or the reason why there is none."""
        joined = self._join(text, cuts, stash, encoded)
        if isinstance(joined, str):
            return joined
        ids, starts, ends = joined
        loss = _inside(starts, ends, spans) if self._assistant else np.ones(len(ids), bool)
        return self._ended(record, text, np.asarray(ids, np.int32), loss)

    def _join(
        self, text: str, cuts: list[Span], stash: list[str], encoded: Any
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

    def _last_control(self, text: str, start: int, end: int) -> int | None:
        """Where the last special token in [start, end) ends, if only white space follows it."""
        found = [match.end() for match in self._control.finditer(text, start, end)]
        return found[-1] if found and not text[found[-1] : end].strip() else None

    def _forged(self, text: str, start: int, ids: list[int], offsets: list[Span]) -> str | None:
        """Finds a special token that a normaliser made from other characters; what to say of it."""
        for index in np.flatnonzero(self._codec.inert[ids]):
            first, last = offsets[index]
            if self._codec.controls.get(text[start + first : start + last].strip()) != ids[index]:
                written = text[start + first : start + last][:40]
                return f"the tokenizer turns the text {written!r} into a special token"
        return None

    def _ended(self, record: Record, text: str, ids: np.ndarray, loss: np.ndarray) -> Document:
        """Adds the end token where the template ends a conversation with no special token."""
        ends = self._last_control(text, 0, len(text)) is not None
        if not ends and self._codec.end is not None:
            ids = np.append(ids, np.int32(self._codec.end))
            loss = np.append(loss, not self._assistant or record.roles[-1] == "assistant")
        elif self._assistant and not self._codec.inert[ids[loss]].any():
            self.ends_turns = False
        return Document(ids, loss)


def _cuts(text: str, count: int) -> list[Span]:
    """Where the sentinels of a rendered text are, all of them whole and of those that were made."""
    found = list(_SENTINEL.finditer(text))
    cuts = [match.span() for match in found]
    outside = "".join(text[start:end] for start, end in _between(cuts, len(text)))
    whole = _OPEN not in outside and _CLOSE not in outside
    if not whole or not all(int(match[1]) < count for match in found):
        raise RenderError(
            "chat template: cuts through a special token that is written in a message"
        )
    return cuts


def _between(cuts: list[Span], size: int) -> list[Span]:
    """The non-empty stretches of [0, size) outside the cuts."""
    starts = [0, *(end for _, end in cuts)]
    ends = [*(start for start, _ in cuts), size]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def _inside(starts: list[int], ends: list[int], spans: list[Span]) -> np.ndarray:
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
