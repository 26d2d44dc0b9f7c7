"""Where the assistant speaks in a rendered conversation: what it writes, up to where it stops.

a turn begins    behind what the template prints to ask for it (its generation prompt)
a turn ends      behind the token that closes it, or the next role's marker where none does
"""

import dataclasses
import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdistill.data.chat_template import Messages, RenderError
from jaxdistill.data.turns import Place, Tracer

# Characters: a conversation is rendered up to some of its turns, which can grow as their square.
MAX_PREFIXES = 200_000_000

CharSpan = tuple[int, int]  # first character, and the one behind the last
# (messages, whether a generation prompt follows) -> text.
Render = Callable[[Messages, bool], str]


@dataclasses.dataclass(frozen=True)
class Speech:
    """What the template makes of the assistant's turns.

    Attributes:
      spans: [start, end) of the turns asked for, by message; None: nothing of it is printed.
      said: characters of these messages, white space left out.
      dropped: how many of them the template leaves out.
      stops: whether every turn ends by a special token.
    """

    spans: dict[int, CharSpan | None]
    said: int
    dropped: int
    stops: bool


class SpeechFinder:
    """Finds the assistant's turns in one rendered conversation.

    Args:
      tracer: of the template.
      control: matches the string of any special token.
      render: the template, with the conversation's tools and variables.
      messages: the conversation, special tokens hidden.
      text: as it is rendered.
      owners: of every hidden special token, the message it stands in, or -1.
    """

    def __init__(
        self,
        tracer: Tracer,
        control: re.Pattern[str],
        render: Render,
        messages: Messages,
        text: str,
        owners: Sequence[int],
    ):
        self._tracer, self._control, self._render = tracer, control, render
        self._messages, self._text, self._owners = messages, text, owners
        self._rendered = 0
        self._tails: dict[str, str] = {}
        self._closing: str | None = None
        self._stops = True

    def find(self, turns: Sequence[int]) -> Speech:
        """Turns of the assistant, by the numbers of their messages, ascending.

        Raises:
          RenderError: if the template does not let them be told apart.
        """
        plain = self._last_alone(turns)
        if plain is not None:
            return plain
        self._traced, sent = self._tracer.traced(self._messages)
        self._places = self._locate(self._text, len(self._messages), False)
        spans = {turn: self._span(turn) for turn in turns}
        ordered = [span for span in spans.values() if span is not None]
        if any(first[1] > second[0] for first, second in zip(ordered, ordered[1:], strict=False)):
            raise RenderError("chat template: prints the assistant's messages in another order")
        printed = [place.printed if place else 0 for place in self._places]
        dropped = sum(max(0, sent[turn] - printed[turn]) for turn in turns)
        return Speech(spans, sum(sent[turn] for turn in turns), dropped, self._stops)

    def _last_alone(self, turns: Sequence[int]) -> Speech | None:
        """The turn that ends the conversation, where it alone is asked for and printed whole."""
        if list(turns) != [len(self._messages) - 1]:
            return None
        if not printed_whole(self._messages[-1], self._text):
            return None
        before = self._render(self._messages[:-1], True)
        if not self._text.startswith(before):
            return None
        span = len(before), self._end_of_text(len(before))
        content = self._messages[-1].get("content") or ""
        return Speech({turns[0]: span}, letters(content), 0, True)

    def _end_of_text(self, start: int) -> int:
        """Behind the last special token, without white space; else the end of the text."""
        return last_control(self._control, self._text, start, len(self._text)) or len(self._text)

    def _locate(self, text: str, count: int, prompt: bool) -> list[Place | None]:
        """The places of the first `count` messages in a text that they are rendered to."""
        traced = self._bounded(self._traced[:count], prompt)
        return self._tracer.places(text, traced, self._messages[:count], self._owners)

    def _bounded(self, messages: Messages, prompt: bool) -> str:
        text = self._render(messages, prompt)
        self._rendered += len(text)
        if self._rendered > MAX_PREFIXES:
            raise RenderError(
                f"too many of the assistant's messages ({len(self._messages)} in all) for the "
                "conversation's length: split it, or use a template with {% generation %} marks"
            )
        return text

    def _span(self, turn: int) -> CharSpan | None:
        place = self._places[turn]
        return None if place is None else (self._start(turn, place), self._end(turn, place))

    def _start(self, turn: int, place: Place) -> int:
        """Behind what asks for a turn: as much of it as the whole conversation prints there too."""
        before = [i for i in range(turn) if self._places[i] is not None]
        role = self._messages[turn - 1]["role"] if before[-1:] == [turn - 1] else ""
        tail = self._tails.get(role)
        since = self._places[before[-1]].last if before else 0  # pyrefly: ignore
        if tail is None:
            text = self._bounded(self._messages[:turn], True)
            places = self._locate(text, turn, True)
            here = places[before[-1]] if before else None
            if before and here is None:
                raise RenderError(_CANNOT_TELL.format(number=turn + 1))
            tail = text[here.last if here else 0 :]
            if role:
                self._tails[role] = tail
        alike = _alike(tail, self._text[since : since + len(tail)])
        start = since + alike
        if alike == len(tail) or start == place.first:
            return start
        # The template asks in another way than it prints: what they share, in whole pieces.
        shared = tail[:alike]
        pieces = [match.end() for match in self._control.finditer(shared)]
        pieces += [match.end() for match in re.finditer(r"\n+", shared)]
        if not pieces or since + max(pieces) > place.first:
            raise RenderError(_CANNOT_TELL.format(number=turn + 1))
        return since + max(pieces)

    def _end(self, turn: int, place: Place) -> int:
        """Behind the token that closes a turn, or the marker of the next one."""
        if turn == len(self._messages) - 1:
            return self._end_of_text(place.last)
        following = [one.first for one in self._places[turn + 1 :] if one is not None]
        gap = self._text[place.last : min(following, default=len(self._text))]
        closing = self._closed(turn)
        alike = _alike(closing, gap)
        end = last_control(self._control, closing, 0, len(closing))
        if end is not None and end <= alike:
            return place.last + end
        # Where another token closes the last turn than the others, or none does.
        since = alike if alike == len(closing) else 0
        marker = self._control.search(gap, since)
        if marker and not gap[since : marker.start()].strip():
            return place.last + marker.end()
        self._stops = False
        return place.last + alike

    def _closed(self, turn: int) -> str:
        """What the template prints behind a turn when the conversation ends with it."""
        calls = "tool_calls" in self._messages[turn]
        if self._closing is not None and not calls:
            return self._closing
        text = self._bounded(self._messages[: turn + 1], False)
        here = self._locate(text, turn + 1, False)[turn]
        if here is None:
            raise RenderError(_CANNOT_TELL.format(number=turn + 1))
        closing = text[here.last :]
        if not calls:
            self._closing = closing
        return closing


_CANNOT_TELL = (
    "chat template: cannot tell where the assistant's message {number} lies: use a template with "
    "{{% generation %}} marks, or loss_on: all"
)


def _alike(left: str, right: str) -> int:
    """How many characters two texts begin with that are the same."""
    return len(os.path.commonprefix([left, right]))


def letters(text: str) -> int:
    """How many characters of a text are no spaces and line ends."""
    return len(text) - text.count(" ") - text.count("\n")


def last_control(control: re.Pattern[str], text: str, start: int, end: int) -> int | None:
    """Where the last special token in [start, end) ends, if only white space follows it."""
    ends = [match.end() for match in control.finditer(text, start, end)]
    return ends[-1] if ends and not text[ends[-1] : end].strip() else None


def printed_whole(message: Mapping[str, Any], text: str) -> bool:
    """Whether all that a message says surely stands in a text."""
    said = [message.get(name) for name in ("content", "reasoning_content", "reasoning", "thinking")]
    whole = all(part.strip() in text for part in said if isinstance(part, str))
    calls = message.get("tool_calls", ())
    return whole and not calls
