"""One training record: its kinds, and the rules that make it usable."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# The fields that make a record of each kind.
KINDS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
# They change what a turn says, and a template may or may not print them: leaving them out silently
# would train on half a conversation.
UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
MAX_RECORD_BYTES = 10_000_000


@dataclasses.dataclass(frozen=True)
class Record:
    """A usable record.

    Attributes:
      kind: a key of KINDS.
      texts: one text; or prompt and completion; or the contents of the messages.
      line: where it stands in its file, from 1 (a line, a row of a table, a document).
      roles: the roles of the messages, else empty.
      opens: False for the later pieces of one long text: no beginning-of-text token.
      closes: False for all but the last piece of one long text: no end-of-text token.
    """

    kind: str
    texts: tuple[str, ...]
    line: int
    roles: tuple[str, ...] = ()
    opens: bool = True
    closes: bool = True


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that cannot be used.

    Attributes:
      line: where it stands in its file, from 1.
      reason: why, in words for the person who repairs the file.
    """

    line: int
    reason: str


def printable(text: str) -> str:
    r"""The text with every control character but the line end written as an escape, `\x1b`."""
    return "".join(
        character
        if character == "\n" or character.isprintable()
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def names_of(value: Mapping[str, Any]) -> str:
    """The first few field names of an object, for a message."""
    return ", ".join(f"`{name[:40]}`" for name in list(value)[:8]) or "no fields"


class _Unusable(Exception):
    """Carries the reason from the rule that failed to `parse`."""


def kinds_of(value: Mapping[str, Any]) -> list[str]:
    """The kinds whose fields an object has, all of them."""
    return [kind for kind, fields in KINDS.items() if all(field in value for field in fields)]


def parse(value: Any, kind: str, line: int) -> Record | Rejected:
    """Checks one decoded object against the rules of its kind.

    Args:
      value: what the file holds, of any type.
      kind: a key of KINDS.
      line: where it stands in its file.

    Returns:
      A Record, or Rejected with the reason.
    """
    try:
        if not isinstance(value, Mapping):
            raise _Unusable(f"not an object: got {type(value).__name__}")
        for field in KINDS[kind]:
            if field not in value:
                raise _Unusable(f"missing field `{field}`: found {names_of(value)}")
        if kind == "messages":
            return _messages(value, line)
        texts = tuple(_text(value[field], f"field `{field}`") for field in KINDS[kind])
        if not texts[-1].strip():
            raise _Unusable(f"empty: field `{KINDS[kind][-1]}` has no text")
        return Record(kind, texts, line)
    except _Unusable as unusable:
        return Rejected(line, str(unusable))


def text_problem(text: str) -> str | None:
    """Why a text cannot be tokenised, or None."""
    if "\0" in text:
        return "contains a NUL character"
    try:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "contains a lone surrogate, which is not Unicode text"
    if size > MAX_RECORD_BYTES:
        return f"too large: more than {MAX_RECORD_BYTES // 1_000_000} MB"
    return None


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"wrong type: {what} must be a string, got {type(value).__name__}")
    problem = text_problem(value)
    if problem:
        raise _Unusable(f"{what} {problem}")
    return value


def _messages(value: Mapping[str, Any], line: int) -> Record:
    if value.get("tools"):
        raise _Unusable("field `tools` is not supported: tool calls are left out")
    messages = value["messages"]
    if not isinstance(messages, list):
        kind = type(messages).__name__
        raise _Unusable(f"wrong type: field `messages` must be a list, got {kind}")
    if not messages:
        raise _Unusable("empty: field `messages` holds no message")
    roles, contents = [], []
    for number, message in enumerate(messages, start=1):
        role, content = _message(message, number)
        roles.append(role)
        contents.append(content)
    return Record("messages", tuple(contents), line, tuple(roles))


def _message(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise _Unusable(
            f"wrong type: message {number} must be an object, got {type(message).__name__}"
        )
    for field in ("role", "content"):
        if field not in message:
            raise _Unusable(f"missing field `{field}` in message {number}")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise _Unusable(
            f"unknown role {str(role)[:40]!r} in message {number}: use one of {', '.join(ROLES)}"
        )
    for field in UNSUPPORTED:
        if message.get(field):
            raise _Unusable(f"field `{field}` in message {number} is not supported")
    content = _text(message["content"], f"content of message {number}")
    if role == "assistant" and not content.strip():
        raise _Unusable(f"empty: the assistant's message {number} has no text")
    return role, content
