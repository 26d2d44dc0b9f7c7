"""What of a rendered conversation is learned, and how much of it the template leaves out."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data.chat_template import RenderError
from jaxdistill.data.codec import Codec
from jaxdistill.data.conversations import Conversation
from jaxdistill.data.records import Record
from jaxdistill.data.rendering import SENTINEL, ChatRenderer, Shielded
from jaxdistill.data.spans import MAX_PREFIXES, CharSpan, SpeechFinder, letters, printed_whole
from jaxdistill.data.tally import Tally
from jaxdistill.data.turns import Tracer

LOSS_ON = ("all", "assistant", "completion")


class Learned:
    """Decides what counts in the loss, conversation by conversation, and counts what is lost.

    Args:
      renderer: of the conversations.
      codec: from `codec.prepare`.
      loss_on: a value of LOSS_ON.
      tally: where it counts.
    """

    def __init__(self, renderer: ChatRenderer, codec: Codec, loss_on: str, tally: Tally):
        self._renderer, self._control, self._loss_on = renderer, codec.control_pattern, loss_on
        self._tally = tally

    def spans(
        self, record: Record, shielded: Shielded, text: str, generated: list[CharSpan]
    ) -> tuple[list[CharSpan] | None, list[CharSpan]]:
        """(what counts, or None for all; what does not), in a rendered conversation.

        Args:
          record: the conversation.
          shielded: what the template was given of it.
          text: what it made of it.
          generated: what it marks as the assistant's itself.

        Raises:
          RenderError: if marks and settings do not go together, or turns cannot be told apart.
        """
        template = self._renderer.template
        finder = SpeechFinder(
            self._tracer,
            self._control,
            lambda messages, prompt: template.spans(
                self._renderer.text(shielded, messages, prompt)
            )[0],
            shielded.messages,
            text,
            shielded.owners,
        )
        self._check_marks(record)
        off, wanted = sorted(_off(record)), self._wanted(record)
        theirs = [i for i, role in enumerate(record.roles) if role == "assistant"]
        whole = self._loss_on == "all" and not off
        if whole or (wanted == theirs and template.marks_generation):
            self._measure(finder, theirs, shielded.messages, text)
            return (None if whole else generated), []
        if self._loss_on == "all":
            return None, _spans(self._found(finder, off))
        if not template.marks_generation:
            return _spans(self._found(finder, wanted)), []
        speech = finder.find(theirs)
        good = _spans({turn: speech.spans[turn] for turn in wanted})
        bad = _spans({turn: speech.spans[turn] for turn in theirs if turn not in wanted})
        kept = [span for span in generated if _meets(span, good)]
        if any(_meets(span, bad) for span in kept):
            raise RenderError(
                "chat template: one {% generation %} block holds a turn that is learned and one "
                "that is not: mark all of them, or none"
            )
        return kept, []

    def _check_marks(self, record: Record) -> None:
        """Refuses marks of others than the assistant that would have to change what is learned.

        Raises:
          RenderError: naming the message.
        """
        marks = record.conversation.marks if record.conversation else ()
        for number, (role, mark) in enumerate(zip(record.roles, marks, strict=False), start=1):
            if role == "assistant" or mark is None or mark is (self._loss_on == "all"):
                continue
            if mark:
                raise RenderError(
                    f"message {number} ({role}) is marked as learned, but loss_on: "
                    f"{self._loss_on} learns the assistant's alone: remove the mark"
                )
            raise RenderError(
                f"message {number} ({role}) is marked as not learned, but loss_on: all learns it: "
                "use loss_on: assistant"
            )

    def _found(self, finder: SpeechFinder, turns: Sequence[int]) -> dict[int, CharSpan | None]:
        """The spans of turns, while what the template leaves out of them is counted."""
        speech = finder.find(turns)
        self._count(speech.said, speech.dropped)
        self._tally.ends_turns &= speech.stops
        return speech.spans

    def _measure(
        self, finder: SpeechFinder, turns: list[int], messages: Sequence[Any], text: str
    ) -> None:
        """Counts what the template leaves out, where not all is seen to be there."""
        if all(printed_whole(messages[turn], text) for turn in turns):
            said = (str(messages[turn].get("content") or "") for turn in turns)
            return self._count(sum(map(letters, said)), 0)
        try:
            speech = finder.find(turns)
        except RenderError:
            self._tally.altered += 1
            return None
        return self._count(speech.said, speech.dropped)

    def _count(self, said: int, dropped: int) -> None:
        self._tally.said += said
        self._tally.dropped += dropped
        self._tally.shortened += dropped > 0

    @functools.cached_property
    def _tracer(self) -> Tracer:
        return Tracer(self._renderer.template.literals, SENTINEL)

    def learns_end(self, record: Record) -> bool:
        """Whether a token that ends the conversation counts."""
        last = len(record.roles) - 1
        if self._loss_on == "all":
            return last not in _off(record)
        return last in self._wanted(record)

    def _wanted(self, record: Record) -> list[int]:
        """The messages of the assistant that are learned where not all is."""
        off, more = _off(record), record.conversation
        first = more.prompt if more and self._loss_on == "completion" else 0
        return [
            i
            for i, role in enumerate(record.roles)
            if role == "assistant" and i >= first and i not in off
        ]


def each_turn(record: Record, loss_on: str) -> list[Record]:
    """One conversation for every turn of the assistant that is learned: it ends with that turn.

    Args:
      record: the conversation.
      loss_on: `assistant`, or `completion`: none of a dialogue's prompt.

    Raises:
      RenderError: if they would be too long together.
    """
    more = record.conversation
    marks = more.marks if more else (None,) * len(record.roles)
    first = more.prompt if more and loss_on == "completion" else 0
    turns = [
        i
        for i, role in enumerate(record.roles)
        if role == "assistant" and marks[i] is not False and i >= first
    ]
    sizes = np.cumsum([len(text) for text in record.texts])
    if turns and int(sizes[turns].sum()) > MAX_PREFIXES:
        raise RenderError(f"too many turns for turns: each ({len(turns)}): split the conversation")
    made = []
    for turn in turns:
        off = [False if role == "assistant" else None for role in record.roles[:turn]]
        conversation = Conversation(
            more.fields[: turn + 1] if more else ({},) * (turn + 1),
            (*off, None),
            more.tools if more else (),
            more.variables if more else {},
        )
        made.append(
            dataclasses.replace(
                record,
                texts=record.texts[: turn + 1],
                roles=record.roles[: turn + 1],
                conversation=conversation,
            )
        )
    return made


def _off(record: Record) -> set[int]:
    """The messages that are marked as not learned."""
    marks = record.conversation.marks if record.conversation else ()
    return {i for i, mark in enumerate(marks) if mark is False}


def _spans(found: Mapping[int, CharSpan | None]) -> list[CharSpan]:
    return [span for span in found.values() if span is not None]


def _meets(span: CharSpan, others: Sequence[CharSpan]) -> bool:
    """Whether a span shares a character with one of the others."""
    return any(span[0] < end and start < span[1] for start, end in others)
