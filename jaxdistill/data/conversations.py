"""Conversations as records hold them: turns, tool calls, reasoning, marks of what is learned."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdistill.data import meaning, rules
from jaxdistill.data.rules import Empty, Unlearned, Unusable, checked_text, mark_of

ROLES = ("system", "developer", "user", "assistant", "tool")
# Spellings of what the assistant thinks before it speaks.
REASONING = ("reasoning_content", "reasoning", "thinking")
# What the template gets of a message besides role and content.
FIELDS = (*REASONING, "tool_calls", "name", "tool_call_id")
# Names that belong to the program that renders, not to a record or a configuration.
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
            "tokenize")  # fmt: skip
_PLAIN = {"role", "content"}
_READ = {"role", "content", *FIELDS, *rules.MARKS, *rules.REFUSED}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a conversation holds besides roles and texts.

    Attributes:
      fields: of every message, those of FIELDS that it has; `content` where it is null.
      marks: of every message, whether it says that it is learned; None: it says nothing.
      tools: the functions that the assistant may call, as JSON objects.
      variables: what the template is given besides, `chat_template_kwargs`.
      prompt: how many messages are the prompt of a dialogue.
    """

    fields: tuple[Mapping[str, Any], ...]
    marks: tuple[bool | None, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: int = 0


@dataclasses.dataclass(frozen=True)
class Turns:
    """Parsed messages.

    Attributes:
      roles, texts: of every message.
      conversation: what else there is; None: nothing.
    """

    roles: tuple[str, ...]
    texts: tuple[str, ...]
    conversation: Conversation | None


def parse_turns(value: Mapping[str, Any], unread: set[str]) -> Turns:
    """The turns of `{"messages": [...]}`, or of `{"prompt": [...], "completion": [...]}`.

    Args:
      value: the record.
      unread: gets the names of fields that are not read.

    Raises:
      Unusable: with the reason.
    """
    if "messages" in value:
        prompt: list[Any] = []
        messages = _list(value["messages"], "messages")
    else:
        prompt = _list(value["prompt"], "prompt")
        messages = _list(value["completion"], "completion")
    whole = [*_system(value, [*prompt, *messages]), *prompt, *messages]
    if not messages:
        raise Unusable(Empty("empty: the conversation holds no message"))
    parsed = [_message(message, number, unread) for number, message in enumerate(whole, start=1)]
    roles, texts, fields, marks = zip(*parsed, strict=True)
    made = Conversation(fields, marks, _tools(value), _variables(value), len(whole) - len(messages))
    if made.prompt and "messages" in value:
        made = dataclasses.replace(made, prompt=0)
    if not learned(roles, made):
        raise Unusable(Unlearned("all turns of the assistant are marked as not learned"))
    plain = not (made.tools or made.variables or made.prompt or any(fields)) and not any(
        mark is not None for mark in marks
    )
    return Turns(roles, texts, None if plain else made)


def learned(roles: tuple[str, ...], conversation: Conversation) -> bool:
    """Whether a turn of the assistant is left that is not marked as not learned, or none exists."""
    theirs = [
        mark for role, mark in zip(roles, conversation.marks, strict=True) if role == "assistant"
    ]
    return not theirs or any(mark is not False for mark in theirs)


def _list(value: Any, field: str) -> list[Any]:
    value = _decoded(value)
    if not isinstance(value, list):
        raise Unusable(f"wrong type: field `{field}` must be a list, got {type(value).__name__}")
    return value


def _decoded(value: Any) -> Any:
    """What a string of JSON holds: tables keep lists and objects so."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _system(value: Mapping[str, Any], messages: list[Any]) -> Iterator[dict[str, str]]:
    """The system's message where it stands beside the conversation."""
    text = value.get("system")
    if text in (None, ""):
        return
    text = checked_text(text, "field `system`")
    if messages and isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
        raise Unusable("field `system` and a message of the system: leave one of them out")
    yield {"role": "system", "content": text}


def _tools(value: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = _decoded(value.get("tools"))
    if tools in (None, "", []):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Unusable("wrong type: field `tools` must be a list of objects")
    _check_json(tools, "field `tools`")
    for number, tool in enumerate(tools, start=1):
        if not isinstance(called(tool).get("name"), str):
            raise Unusable(f"tool {number} of field `tools` has no name")
    return tuple(tools)


def called(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool or of a tool call, which may stand in it or be it."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def _variables(value: Mapping[str, Any]) -> dict[str, Any]:
    given = _decoded(value.get("chat_template_kwargs"))
    if given in (None, "", {}):
        return {}
    if not isinstance(given, Mapping):
        raise Unusable("wrong type: field `chat_template_kwargs` must be an object")
    _check_json(given, "field `chat_template_kwargs`")
    for name in given:
        if name in RESERVED:
            raise Unusable(f"field `chat_template_kwargs` must not set `{name}`")
    return dict(given)


def _check_json(value: Any, what: str) -> None:
    try:
        checked_text(json.dumps(value, ensure_ascii=False, allow_nan=False), what)
    except (TypeError, ValueError, RecursionError):
        raise Unusable(f"wrong type: {what} holds what is no JSON") from None


def _message(
    message: Any, number: int, unread: set[str]
) -> tuple[str, str, Mapping[str, Any], bool | None]:
    """(role, text, other fields, mark) of one message."""
    where = f"message {number}"
    if isinstance(message, dict) and message.keys() == _PLAIN and message["role"] in ROLES:
        content = message["content"]
        if isinstance(content, str) and (content.strip() or message["role"] != "assistant"):
            return message["role"], checked_text(content, f"content of {where}"), {}, None
    if not isinstance(message, Mapping):
        raise Unusable(f"wrong type: {where} must be an object, got {type(message).__name__}")
    for name in message:
        if name not in _READ:
            meaning.check(name, message[name], where, kind="messages")
            unread.add(f"messages.{name}")
    if "role" not in message:
        raise Unusable(f"missing field `role` in {where}")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise Unusable(f"unknown role {str(role)[:40]!r} in {where}: use one of {', '.join(ROLES)}")
    rules.check_refused(message, where)
    mark = mark_of(message, where)
    fields = _fields(message, role, where)
    content = message.get("content")
    if "content" not in message and "tool_calls" not in fields:
        raise Unusable(f"missing field `content` in {where}")
    if content is None and "tool_calls" in fields:
        # Some templates print a turn for "" and none for null.
        return role, "", {**fields, "content": None}, mark
    text = _text(content, f"content of {where}")
    silent = role == "assistant" and not text.strip() and "tool_calls" not in fields
    if silent and mark is not False:
        raise Unusable(Empty(f"empty: the assistant's {where} has no text"))
    return role, text, fields, mark


def _text(content: Any, what: str) -> str:
    """A text, or the joined texts of a list of parts."""
    if not isinstance(content, list):
        return checked_text("" if content is None else content, what)
    parts = []
    for number, part in enumerate(content, start=1):
        if not isinstance(part, Mapping):
            raise Unusable(
                f"wrong type: part {number} of the {what} must be an object, got "
                f"{type(part).__name__}"
            )
        if part.get("type", "text") != "text" or "text" not in part:
            kind = str(part.get("type"))[:40]
            raise Unusable(f"part {number} of the {what} is of type {kind!r}: only texts are read")
        parts.append(checked_text(part["text"], f"part {number} of the {what}"))
    return checked_text("".join(parts), what)


def _fields(message: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """What a message holds besides role and content, checked."""
    fields: dict[str, Any] = {}
    thoughts = {name: message[name] for name in REASONING if message.get(name) not in (None, "")}
    if thoughts and role != "assistant":
        raise Unusable(f"field `{next(iter(thoughts))}` of {where}: only the assistant thinks")
    if len(set(map(str, thoughts.values()))) > 1:
        raise Unusable(f"fields {rules.names_of(thoughts)} of {where} hold different texts")
    for name, text in list(thoughts.items())[:1]:
        fields[name] = checked_text(text, f"field `{name}` of {where}")
    for name in ("name", "tool_call_id"):
        if message.get(name) not in (None, ""):
            fields[name] = checked_text(message[name], f"field `{name}` of {where}")
    calls = _decoded(message.get("tool_calls"))
    if calls not in (None, "", []):
        if role != "assistant":
            raise Unusable(f"field `tool_calls` of {where}: only the assistant calls tools")
        fields["tool_calls"] = _calls(calls, where)
    return fields


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is what templates expect."""
    what = f"field `tool_calls` of {where}"
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise Unusable(f"wrong type: {what} must be a list of objects")
    _check_json(calls, what)
    made = []
    for call in calls:
        function = dict(called(call))
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise Unusable(f"{what}: a call has no name")
        given = _decoded(function.get("arguments", {}))
        if not isinstance(given, Mapping):
            raise Unusable(f"{what}: the arguments of {function['name'][:40]!r} are no JSON object")
        function["arguments"] = dict(given)
        rest = {name: call[name] for name in ("id", "type") if call.get(name) is not None}
        made.append({"type": "function", **rest, "function": function})
    return made
