"""Renders chat templates, in the process that `chat_template` keeps for them.

The sandbox stops a template from reaching Python, the process from taking all time and memory.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

# What `render` gives a template itself.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
MAX_RENDERED = 40_000_000  # characters
MAX_LITERAL = 200  # characters of a string in a template that is looked for in texts
# What a template that prints today's date prints: the same data must give the same tokens tomorrow.
DATE = datetime.datetime(2024, 7, 26)
# Private-use characters. Data never reaches the template with them, see `chat.ChatEncoder`.
GENERATION_STARTS, GENERATION_ENDS = "\ue002", "\ue003"


class RenderTooLong(Exception):
    """The template printed more than is allowed."""


def call(function: str, *arguments: Any) -> Any:
    """`check`, `literals` or `render`, by name."""
    return {"check": check, "literals": literals, "render": render}[function](*arguments)


def check(source: str) -> str | None:
    """What is wrong with the syntax of a template."""
    try:
        _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None


def literals(source: str) -> list[str]:
    """The strings that a template compares texts with, splits them at, or prints."""
    tree = _environment().parse(source)
    constants = {node.value for node in tree.find_all(jinja2.nodes.Const)}
    texts = {text.strip() for text in constants if isinstance(text, str)}
    return sorted(text for text in texts if 0 < len(text) <= MAX_LITERAL)


def render(
    source: str,
    variables: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    limit: int,
) -> str:
    """The conversation as one string, generation marks included.

    Raises:
      RenderTooLong: if it has more than `limit` characters.
      Exception: whatever the template trips over.
    """
    parts, size = [], 0
    for part in _compiled(source).generate(
        messages=[dict(message) for message in messages],
        tools=tools,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **variables,
    ):
        parts.append(part)
        size += len(part)
        if size > limit:
            raise RenderTooLong(
                f"printed {size} characters and did not end: at most {limit} are allowed"
            )
    return "".join(parts)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    provided: dict[str, Any] = environment.globals
    provided["raise_exception"] = _refuse
    provided["strftime_now"] = DATE.strftime
    provided["namespace"] = _Namespace
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """The block tag `generation`: puts its body between two marks."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{GENERATION_STARTS}{caller()}{GENERATION_ENDS}"


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscore names, which could reach internals."""

    def __init__(*args: Any, **values: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **values)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} is not allowed in a namespace")


def _refuse(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
