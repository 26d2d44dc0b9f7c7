"""Renders a conversation through a chat template, and marks where the assistant speaks."""

import datetime
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxdistill.errors import ModelError

# The sandbox stops a template from reaching Python; these stop it from never ending.
MAX_RENDERED = 40_000_000
MAX_SECONDS = 20.0
# What a template that prints today's date prints: the same data must give the same tokens tomorrow.
DATE = datetime.datetime(2024, 7, 26)

# Private-use characters. Data never reaches the template with them, see `chat.shield`.
GENERATION_STARTS, GENERATION_ENDS = "\ue002", "\ue003"

Messages = Sequence[Mapping[str, str]]


class RenderError(Exception):
    """The template refuses one conversation; the message is the reason."""


class _Generation(jinja2.ext.Extension):
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


class ChatTemplate:
    """A compiled chat template.

    It renders what `tokenizer.apply_chat_template(..., tokenize=False)` renders, with two
    differences: the date a template may ask for is fixed (DATE), and size and time are bounded.

    Attributes:
      marks_generation: whether the template says itself, by `{% generation %}`, which text is the
        assistant's.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]):
        """Compiles the template.

        Args:
          source: Jinja text.
          variables: what the template may use besides the messages, the special tokens' names.

        Raises:
          ModelError: if the template has a syntax error.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        provided: dict[str, Any] = environment.globals
        provided["raise_exception"] = _refuse
        provided["strftime_now"] = DATE.strftime
        provided["namespace"] = _Namespace
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"chat template: line {error.lineno}: {error.message}") from error
        self._variables = dict(variables)
        self.marks_generation = bool(re.search(r"\{%-?\s*generation\s*-?%\}", source))

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The conversation as one string, generation marks included.

        Raises:
          RenderError: if the template refuses the messages, or prints too much or too long.
        """
        deadline = time.monotonic() + MAX_SECONDS
        parts, size = [], 0
        try:
            for part in self._template.generate(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            ):
                parts.append(part)
                size += len(part)
                if size > MAX_RENDERED or time.monotonic() > deadline:
                    raise RenderError(
                        f"chat template: printed {size} characters and did not end: at most "
                        f"{MAX_RENDERED} characters and {MAX_SECONDS:.0f} s are allowed"
                    )
        except RenderError:
            raise
        # The template is foreign text: whatever it trips over is the conversation's reason.
        except Exception as error:
            reason = f"chat template: {type(error).__name__}: {str(error)[:200]}"
            raise RenderError(reason) from error
        return "".join(parts)

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
