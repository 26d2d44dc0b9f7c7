"""A chat template, a stranger's program kept at a distance, makes one text of a conversation."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.data import chat_render
from jaxdistill.data.chat_render import GENERATION_ENDS, GENERATION_STARTS
from jaxdistill.errors import ModelError
from jaxdistill.safe.guarded import Guarded, TimedOut

MAX_SOURCE = 1_000_000  # characters
MAX_SECONDS = 20.0
MAX_TIMEOUTS = 3
MEMORY = 2 << 30  # bytes; a text of the largest size is held some times over
_CHILD = "jaxdistill.data.chat_render:call"
_CALLS = 1_000_000  # the process need not be replaced: rendering leaks nothing

Messages = Sequence[Mapping[str, Any]]


class RenderError(Exception):
    """The template refuses one conversation; the message is the reason."""


class VariableError(RenderError):
    """A variable is not for the one who sets it to set, or not known to the template."""


class Stalled(RenderError):
    """The template did not end for one conversation."""


def mentions(source: str, name: str) -> bool:
    """Whether a name stands in a template: what it does not name, it cannot print."""
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


class ChatTemplate:
    """A chat template, compiled and rendered in a process of its own.

    It renders what `tokenizer.apply_chat_template(..., tokenize=False)` renders, with two
    differences: the date a template may ask for is fixed (`chat_render.DATE`), and size, time and
    memory are bounded.

    Attributes:
      marks_generation: whether the template says itself, by `{% generation %}`, which text is the
        assistant's.
    """

    def __init__(self, source: Any, variables: Mapping[str, Any]):
        """Checks the template.

        Args:
          source: Jinja text; out of a stranger's file, so of any type.
          variables: what the template may use besides the messages, the special tokens' names.

        Raises:
          ModelError: if the template has a syntax error, or cannot be compiled within the bounds.
        """
        if not isinstance(source, str) or len(source) > MAX_SOURCE:
            raise ModelError(f"chat template: must be a text of at most {MAX_SOURCE} characters")
        self._source = source
        self._variables = json.loads(json.dumps(dict(variables), default=str))
        self._call = Guarded(_CHILD, seconds=MAX_SECONDS, memory=MEMORY, calls=_CALLS)
        self._timeouts = 0
        self.marks_generation = bool(re.search(r"\{%-?\s*generation\s*-?%\}", source))
        try:
            problem = self._call("check", source)
        except (RuntimeError, TimedOut) as error:
            problem = _words(error)
        if problem:
            raise ModelError(f"chat template: {problem}")

    def mentions(self, name: str) -> bool:
        """Whether a name stands in the template: what it does not name, it cannot print."""
        return mentions(self._source, name)

    @functools.cached_property
    def literals(self) -> list[str]:
        """The strings in the template's code."""
        try:
            return self._call("literals", self._source)
        except (RuntimeError, TimedOut) as error:
            raise ModelError(f"chat template: {_words(error)}") from error

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as one string, generation marks included.

        Args:
          messages: objects with `role`, `content` and whatever the template prints besides.
          add_generation_prompt: end with what the assistant's turn begins with.
          tools: the functions that the assistant may call.
          variables: in place of, or besides, those of the constructor.

        Raises:
          RenderError: if the template refuses the messages, or prints too much or too long.
          ModelError: if it did not end for several conversations: it would not for the others.
        """
        turns = [dict(message) for message in messages]
        given = {**self._variables, **(variables or {})}
        asked = (turns, list(tools) or None, add_generation_prompt, chat_render.MAX_RENDERED)
        try:
            return self._call("render", self._source, given, *asked)
        except RuntimeError as error:
            # The template is foreign text: whatever it trips over is the conversation's reason.
            raise RenderError(f"chat template: {_words(error)}") from error
        except TimedOut as error:
            self._timeouts += 1
            check_stalled(self._timeouts)
            raise Stalled(_stalled()) from error

    def spans(self, rendered: str) -> tuple[str, list[tuple[int, int]]]:
        """Takes the generation marks out: the text, and [start, end) of what lay between them."""
        if GENERATION_STARTS not in rendered:
            return rendered, []
        parts, found, size, start = [], [], 0, None
        for piece in re.split(f"([{GENERATION_STARTS}{GENERATION_ENDS}])", rendered):
            if piece == GENERATION_STARTS:
                start = size
            elif piece == GENERATION_ENDS:
                if start is not None:
                    found.append((start, size))
                start = None
            else:
                parts.append(piece)
                size += len(piece)
        return "".join(parts), found


def _stalled() -> str:
    return f"chat template: did not end within {MAX_SECONDS:g} s and {MEMORY >> 30} GiB"


def check_stalled(times: int) -> None:
    """Refuses a template that did not end for several conversations: it would not for the others.

    Raises:
      ModelError: if they are so many.
    """
    if times >= MAX_TIMEOUTS:
        raise ModelError(f"{_stalled()}, {MAX_TIMEOUTS} times: give another one")


def _words(error: Exception) -> str:
    """What went wrong, without the name of our own function."""
    return str(error).partition(": ")[2][:250]
