"""Finds where each message stands in a rendered conversation, whatever the template leaves out.

The conversation is rendered a second time with the letters of every message replaced by a character
that names the message. A template treats both alike, so that the two renderings agree character by
character, and every replaced one shows whose text the real one is. Nothing is searched for.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data.chat_template import Messages, RenderError
from jaxdistill.data.conversations import REASONING

# One character for each message: the private planes 15 and 16 of Unicode.
_FIRST, MAX_MESSAGES = 0xF0000, 0x1FFFE
_WHITE = np.array([0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F,
                   0x3000])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a message stands in a text.

    Attributes:
      first, last: of its first and behind its last character.
      printed: how many of its replaced characters the template prints.
    """

    first: int
    last: int
    printed: int


class Tracer:
    """Replaces what messages say, and finds it again.

    Args:
      literals: strings that the template may look for in a text.
      hidden: matches what stands for a special token in a message; its first group is its number.
    """

    def __init__(self, literals: Sequence[str], hidden: re.Pattern[str]):
        # Words alone would be found in any text; a template looks for them in roles and names.
        self._marks = [
            text for text in literals if re.search(r"\w", text) and re.search(r"[^\w\s]", text)
        ]
        self._hidden = hidden

    def traced(self, messages: Messages) -> tuple[list[dict[str, Any]], list[int]]:
        """The messages with their letters replaced, and how many were in each.

        Raises:
          RenderError: if there are more messages than characters to name them.
        """
        if len(messages) > MAX_MESSAGES:
            raise RenderError(f"more than {MAX_MESSAGES} messages: split the conversation")
        made, sent = [], []
        for index, message in enumerate(messages):
            count = 0

            def replaced(value: Any, name: int = _FIRST + index) -> Any:
                nonlocal count
                if isinstance(value, str):
                    codes, stays = self._stays(value)
                    count += len(stays) - int(stays.sum())
                    return np.where(stays, codes, name).astype("<u4").tobytes().decode("utf-32-le")
                if isinstance(value, Mapping):
                    return {key: replaced(item) for key, item in value.items()}
                return [replaced(item) for item in value] if isinstance(value, list) else value

            spoken = {key: replaced(message[key]) for key in ("content", *REASONING)
                      if key in message}  # fmt: skip
            if "tool_calls" in message:
                spoken["tool_calls"] = [_call(call, replaced) for call in message["tool_calls"]]
            made.append({**message, **spoken})
            sent.append(count)
        return made, sent

    def _stays(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(codes, bool) of a text's characters: white space, what JSON escapes, what is looked for.

        Where that is all of the text, only its white space stays.
        """
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        white = (codes <= 32) | np.isin(codes, _WHITE)
        stays = white | (codes == ord('"')) | (codes == ord("\\"))
        for mark in self._marks:
            start = text.find(mark)
            while start >= 0:
                stays[start : start + len(mark)] = True
                start = text.find(mark, start + len(mark))
        hidden = np.zeros(len(codes), bool)
        for match in self._hidden.finditer(text):
            hidden[match.start() : match.end()] = True
        return codes, (white if stays.all() else stays) | hidden

    def places(
        self, text: str, traced: str, messages: Messages, owners: Sequence[int]
    ) -> list[Place | None]:
        """Where every message stands in a text; None: nothing of it is printed.

        Args:
          text: as it was rendered from `messages`.
          traced: as it was rendered from what `traced` made of them.
          messages: the conversation.
          owners: of every hidden special token, the message it stands in, or -1.

        Raises:
          RenderError: if the template does not treat both alike.
        """
        if len(text) != len(traced):
            raise RenderError(_UNLIKE)
        real, seen = (np.frombuffer(part.encode("utf-32-le"), "<u4") for part in (text, traced))
        theirs = (seen >= _FIRST) & (seen < _FIRST + len(messages)) & (seen != real)
        if not (theirs | (seen == real)).all():
            raise RenderError(_UNLIKE)
        whose = np.where(theirs, seen.astype(np.int64) - _FIRST, -1)
        for match in self._hidden.finditer(text):
            whose[match.start() : match.end()] = owners[int(match[1])]
        turns: list[Place | None] = [None] * len(messages)
        at = np.flatnonzero(whose >= 0)
        names, first = np.unique(whose[at], return_index=True)
        behind = len(at) - np.unique(whose[at][::-1], return_index=True)[1]
        counts = np.bincount(whose[theirs], minlength=len(messages))
        for name, start, end in zip(names.tolist(), first, behind, strict=True):
            last = int(at[end - 1]) + 1
            last += self._unmarked(text, last, messages[name])
            turns[name] = Place(int(at[start]), last, int(counts[name]))
        return turns

    def _unmarked(self, text: str, place: int, message: Mapping[str, Any]) -> int:
        """How many characters of a message that stay as they are follow its last replaced one."""
        content = message.get("content")
        if not isinstance(content, str) or "tool_calls" in message:
            return 0
        replaced = np.flatnonzero(~self._stays(content)[1])
        start = int(replaced[-1]) + 1 if len(replaced) else 0
        for match in self._hidden.finditer(content, start):
            start = match.end()
        for end in (content[start:], content[start:].rstrip(), content[start:].strip()):
            if end and text.startswith(end, place):
                return len(end)
        return 0


_UNLIKE = (
    "chat template: cannot tell which of its text is the assistant's, because it depends on the "
    "letters of the messages: use a template with {% generation %} marks, or loss_on: all"
)


def _call(call: Mapping[str, Any], replaced: Callable[[Any], Any]) -> dict[str, Any]:
    """A tool call whose name and arguments are replaced."""
    function = call["function"]
    inner = {
        **function,
        "name": replaced(function["name"]),
        "arguments": replaced(function["arguments"]),
    }
    return {**call, "function": inner}
