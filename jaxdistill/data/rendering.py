"""Renders a conversation so that no string in it can become a special token of the template."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxdistill.data.chat_template import ChatTemplate, RenderError, VariableError, mentions
from jaxdistill.data.codec import Codec
from jaxdistill.data.conversations import REASONING, RESERVED, called
from jaxdistill.data.records import Record
from jaxdistill.data.tally import Tally
from jaxdistill.errors import ConfigError, DataError, ModelError

OPEN, CLOSE = "\ue000", "\ue001"
SENTINEL = re.compile(f"{OPEN}([0-9]{{1,9}}){CLOSE}")
_PRIVATE = "\ue000-\ue003"
# JSON that is written in ASCII would hide the sentinels from the search for them.
_ESCAPED = re.compile(r"\\ue00[01]")
_NAME = "\U0010fffd"


def template_of(tokenizer: Any, chat_template: str | None = None) -> str | None:
    """The template in use: the one given, else the tokenizer's own (its default), else None."""
    if chat_template is not None:
        return chat_template
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def divided(words: Mapping[str, Any], sources: Sequence[str | None]) -> list[dict[str, Any]]:
    """What each of several templates is given of some words: those that it knows.

    Words that none of them knows are the first one's, which refuses them.
    """
    named = [[name for name in words if source and mentions(source, name)] for source in sources]
    named[0] += [name for name in words if not any(name in own for own in named)]
    return [{name: words[name] for name in words if name in own} for own in named]


def read_template(path: str | Path) -> str:
    """The chat template in a file.

    Raises:
      DataError: if it cannot be read as UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data.chat_template: {path}: cannot be read: {reason}") from error


def user_turn(tokenizer: Any) -> str:
    """What the chat template prints before the text of a user who begins.

    Raises:
      ModelError: if there is no template, or it does not print the text as it is.
    """
    source, text = template_of(tokenizer), "a user's text"
    if source is None:
        raise ModelError("the tokenizer has no chat template: set augment.user_turn")
    template = ChatTemplate(source, tokenizer.special_tokens_map)
    try:
        before, found, _ = template.render([{"role": "user", "content": text}]).partition(text)
    except RenderError as error:
        raise ModelError(f"{error}: set augment.user_turn") from error
    if not found:
        raise ModelError("the chat template does not print a user's text: set augment.user_turn")
    return before


def mark(number: int) -> str:
    """The sentinel of this number."""
    return f"{OPEN}{number}{CLOSE}"


@dataclasses.dataclass
class Shielded:
    """A conversation with sentinels in place of the strings of special tokens.

    Attributes:
      messages, tools, variables: what the template gets.
      stash: the strings, by the numbers of their sentinels.
      owners: the messages they stand in; -1: in none.
    """

    messages: list[dict[str, Any]]
    tools: list[Any]
    variables: dict[str, Any]
    stash: list[str]
    owners: list[int]


class ChatRenderer:
    """A chat template, and what it is given of a conversation.

    Attributes:
      template: compiled.
    """

    def __init__(
        self,
        codec: Codec,
        source: str | None,
        template_kwargs: Mapping[str, Any],
        tally: Tally | None = None,
    ):
        """Compiles the template.

        Args:
          codec: from `codec.prepare`.
          source: the template, see `template_of`.
          template_kwargs: what the template is given besides, such as `enable_thinking`.
          tally: where it is noted what the template does not print; None: nobody asks.

        Raises:
          DataError: if there is no template.
          ConfigError: for a name in template_kwargs that the template does not know.
          ModelError: if the template has a syntax error.
        """
        if source is None:
            raise DataError(
                "the records hold conversations, but the tokenizer has no chat template: use the "
                "tokenizer of a chat model, give data.chat_template, or write prompt and "
                "completion (format: alpaca_prompt does, for Alpaca's records)"
            )
        variables = {**codec.names, **template_kwargs}
        self.template = ChatTemplate(source, variables)
        self._reserved = frozenset(variables)
        for name in template_kwargs:
            if name in RESERVED or not self.template.mentions(name):
                raise ConfigError(
                    f"data.template_kwargs.{name}: the chat template knows no such name: correct "
                    "or remove it"
                )
        self._shield = re.compile(f"{codec.control_pattern.pattern}|[{_PRIVATE}]")
        self._tally = tally or Tally()

    def first(
        self,
        record: Record,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
        mark_end: bool = False,
    ) -> tuple[Shielded, str]:
        """What the template gets, and what it makes of it, generation marks included.

        Templates want tool calls in several spellings: the first that is not refused is used.

        Args:
          record: the conversation.
          add_generation_prompt: whether the assistant is to begin a turn.
          variables: of a stranger, for the template besides its own.
          mark_end: put `mark(len(stash))` behind the last message.

        Raises:
          RenderError: if the template refuses it, or a variable is not the stranger's to set.
        """
        if taken := sorted({*self._reserved, *RESERVED} & set(variables)):
            raise VariableError(f"chat_template_kwargs.{taken[0]}: is not the client's to set")
        shielded = self._shielded(record)
        shielded.variables.update(variables)
        if mark_end:
            shielded.messages[-1]["content"] += mark(len(shielded.stash))
        own = record.conversation.variables if record.conversation else ()
        for name in (*own, *variables):
            if not self.template.mentions(name):
                raise VariableError(
                    f"field `chat_template_kwargs`: the chat template knows no `{name[:40]}`"
                )
        refused: RenderError | None = None
        for messages in _spellings(shielded.messages):
            tried = dataclasses.replace(shielded, messages=messages)
            try:
                return tried, self.text(tried, messages, add_generation_prompt)
            except RenderError as error:
                refused = refused or error
        assert refused is not None, "there is always the first spelling"
        raise refused

    def text(self, shielded: Shielded, messages: Sequence[Any], prompt: bool) -> str:
        """What the template makes of messages, with the tools and variables of a conversation."""
        return self.template.render(
            messages,
            add_generation_prompt=prompt,
            tools=shielded.tools,
            variables=shielded.variables,
        )

    def _shielded(self, record: Record) -> Shielded:
        """The conversation with its strings of special tokens replaced."""
        stash: list[str] = []
        owners: list[int] = []
        owner = -1

        def hide(match: re.Match[str]) -> str:
            stash.append(match[0])
            owners.append(owner)
            return mark(len(stash) - 1)

        def hidden(value: Any) -> Any:
            if isinstance(value, str):
                return self._shield.sub(hide, value)
            if isinstance(value, Mapping):
                return {hidden(key): hidden(item) for key, item in value.items()}
            return [hidden(item) for item in value] if isinstance(value, list | tuple) else value

        more = record.conversation
        messages = []
        for owner, (role, content) in enumerate(zip(record.roles, record.texts, strict=True)):
            fields = self._spelled(more.fields[owner]) if more else {}
            messages.append({"role": role, "content": hidden(content), **hidden(fields)})
        owner = -1
        tools, variables = (hidden(more.tools), hidden(more.variables)) if more else ([], {})
        return Shielded(messages, tools, variables, stash, owners)

    def _spelled(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of a message, its reasoning under the name that the template knows."""
        for name in REASONING:
            if name in fields and not self.template.mentions(name):
                known = [other for other in REASONING if self.template.mentions(other)]
                rest = {key: value for key, value in fields.items() if key != name}
                return {**rest, known[0] if known else name: fields[name]}
        return fields

    def check(self, shielded: Shielded, text: str) -> None:
        """Refuses what the template would leave out without which a conversation says otherwise.

        Raises:
          RenderError: naming the field.
        """
        if shielded.stash and _ESCAPED.search(text):
            raise RenderError("chat template: escapes a special token that is written in a message")
        for tool in shielded.tools:
            if not self.template.mentions("tools") or called(tool)["name"] not in text:
                name = called(tool)["name"][:40]
                raise RenderError(f"field `tools`: the chat template does not print {name!r}")
        for number, message in enumerate(shielded.messages, start=1):
            for call in message.get("tool_calls", ()):
                name = call["function"]["name"]
                if not self.template.mentions("tool_calls") or name not in text:
                    raise RenderError(
                        f"field `tool_calls` of message {number}: the chat template does not "
                        f"print {name[:40]!r}"
                    )
            if "tool_call_id" in message and not self.template.mentions("tool_call_id"):
                self._tally.unprinted.add("tool_call_id")
        self._check_names(shielded)

    def _check_names(self, shielded: Shielded) -> None:
        """Who speaks matters; what a tool is called stands in the call it answers."""
        for number, message in enumerate(shielded.messages):
            if "name" not in message:
                continue
            renamed = list(shielded.messages)
            renamed[number] = {**message, "name": _NAME}
            if self.template.mentions("name") and _NAME in self.text(shielded, renamed, False):
                continue
            if message["role"] != "tool":
                raise RenderError(
                    f"field `name` of message {number + 1}: the chat template does not print it: "
                    "write it into `content`, or remove the field"
                )
            self._tally.unprinted.add("name")


def _spellings(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The ways to write tool calls: arguments as an object or as text, no content as null or ""."""
    yield [dict(message) for message in messages]
    if not any("tool_calls" in message for message in messages):
        return
    silent = any(message["content"] is None for message in messages)
    for text, null in ((False, False), (True, True), (True, False)):
        if (silent or text) and (silent or null):
            yield [_spelled_calls(message, text, null) for message in messages]


def _spelled_calls(message: Mapping[str, Any], text: bool, null: bool) -> dict[str, Any]:
    made = dict(message)
    if made["content"] is None and not null:
        made["content"] = ""
    if text and "tool_calls" in made:
        made["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(
                call["function"]["arguments"], ensure_ascii=False)}}
            for call in made["tool_calls"]
        ]  # fmt: skip
    return made
