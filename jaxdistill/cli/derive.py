"""Arguments of a command out of the sections it takes, and the sections out of what was typed."""

import argparse
import types
import typing
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from jaxdistill.errors import ConfigError
from jaxdistill.section import Flag, Section

S = typing.TypeVar("S", bound=Section)


def add(parser: Any, section: type[Section], optional: Collection[str] = ()) -> None:
    """Adds an argument for every field of a section: its description, type and default.

    Args:
      parser: an `argparse.ArgumentParser`, or a group of one.
      section: whose fields are options.
      optional: required fields that may be left out here, because something else stands for them.
    """
    for name, field in section.model_fields.items():
        kind, metadata = _plain(field.annotation, list(field.metadata))
        flag = next((one for one in metadata if isinstance(one, Flag)), Flag())
        options: dict[str, Any] = {"help": _help(field)}
        required = field.is_required() and name not in optional
        if not field.is_required():
            options["default"] = field.get_default(call_default_factory=True)
        words = [*([flag.short] if flag.short else []), flag.name or f"--{name.replace('_', '-')}"]
        if kind is bool and options["default"]:
            parser.add_argument(f"--no-{name}", dest=name, action="store_false", **options)
            continue
        if kind is bool:
            parser.add_argument(*words, action="store_true", **options)
            continue
        options |= _type(kind, metadata) | {"metavar": flag.metavar}
        several = typing.get_origin(kind) is tuple
        if several and options.get("default") is not None:
            options["default"] = list(options["default"])
        if flag.positional:
            options["nargs"] = ("+" if required else "*") if several else None if required else "?"
            parser.add_argument(name, **options)
            continue
        if several:
            options |= {"action": "append"} if flag.repeat else {"nargs": "+"}
        parser.add_argument(*words, dest=name, required=required, **options)


def read(section: type[S], arguments: argparse.Namespace) -> S:
    """The section that was typed.

    Raises:
      ConfigError: for each rule between options that is broken.
    """
    values = {name: getattr(arguments, name) for name in section.model_fields}
    try:
        return section.model_validate(values)
    except ValidationError as error:
        command = arguments.parser.prog.partition(" ")[2]
        lines = [f"{command}: {line}" for item in error.errors() for line in _lines(dict(item))]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _lines(item: dict[str, Any]) -> list[str]:
    """One of pydantic's errors, with options as they are typed."""
    if item["type"] == "rules":
        problems = [(path[:1], message) for path, message in item["ctx"]["problems"]]
    else:
        problems = [(item["loc"][:1], item["msg"][:1].lower() + item["msg"][1:])]
    return [
        "".join(f"--{str(part).replace('_', '-')}: " for part in path) + message
        for path, message in problems
    ]


def _help(field: FieldInfo) -> str:
    """The description, with the default where there is one to name."""
    text = (field.description or "").rstrip(".")
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if default is True:
        return f"Do not {text[:1].lower()}{text[1:]}"
    if default is not None and default is not False and default != ():
        value = " ".join(default) if isinstance(default, tuple) else default
        text += f"; default: {value}"
    elif not field.is_required() and default is not False and "none" not in text.lower():
        text += "" if "default" in text.lower() else "; default: none"
    return text.replace("%", "%%")


def _plain(annotation: Any, metadata: list[Any]) -> tuple[Any, list[Any]]:
    """A field's type without None and Annotated, and the metadata found on the way."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *more = typing.get_args(annotation)
        return _plain(inner, metadata + [part for one in more for part in _parts(one)])
    if origin in (typing.Union, types.UnionType):
        (inner,) = (one for one in typing.get_args(annotation) if one is not types.NoneType)
        return _plain(inner, metadata)
    return annotation, metadata


def _parts(one: Any) -> list[Any]:
    """Constraints inside pydantic's Field, or the object itself."""
    return list(one.metadata) if isinstance(one, FieldInfo) else [one]


def _type(kind: Any, metadata: list[Any]) -> dict[str, Any]:
    """How argparse reads a value of a type."""
    if typing.get_origin(kind) is tuple:
        kind, metadata = _plain(typing.get_args(kind)[0], [])
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    if kind in (int, float):
        return {"type": _number(kind, metadata)}
    assert kind is str, f"an option of type {kind} cannot be typed"
    return {}


def _number(kind: Callable[[str], Any], metadata: list[Any]) -> Callable[[str], Any]:
    """A reader of numbers within their range."""
    low = next(
        (m for m in metadata if isinstance(m, annotated_types.Ge | annotated_types.Gt)), None
    )
    high = next((m.le for m in metadata if isinstance(m, annotated_types.Le)), None)
    assert low is not None, "every number on the command line has a range"
    least, open_ = (low.ge, False) if isinstance(low, annotated_types.Ge) else (low.gt, True)
    rule = "a whole number" if kind is int else "a number"
    rule += f" above {least}" if open_ else f" of at least {least}" if high is None else ""
    if high is not None:
        rule += f" and at most {high}" if open_ else f" from {least} to {high}"

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        inside = value is not None and (value > least if open_ else value >= least)
        if not inside or (high is not None and not value <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")
        return value

    return number
