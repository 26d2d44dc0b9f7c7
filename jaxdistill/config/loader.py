"""Reads a configuration file and its overrides, and reports everything wrong with them at once."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from jaxdistill.config import inherit, keys, syntax
from jaxdistill.config.inherit import FilePosition, read
from jaxdistill.config.schema import Config
from jaxdistill.config.synonyms import OTHER_METHODS
from jaxdistill.config.syntax import KeyPath, shown
from jaxdistill.config.written import Written
from jaxdistill.errors import ConfigError
from jaxdistill.methods import METHODS
from jaxdistill.section import NAME_PATTERN, Section

Tree = TypeVar("Tree", bound=Section)


def load(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `key=value` overrides applied, checked.

    `extends` merges the file over another one: `config.inherit` has the rules. Other relative paths
    inside the configuration are relative to the current directory, not to the file.

    Args:
      path: the file.
      overrides: such as "train.steps=20" or "data.train.0.path=x.jsonl"; the value is YAML.

    Raises:
      ConfigError: with one line `file:line:column: key = value: message` for each thing wrong.
    """
    return loads(read(path), os.fspath(path), overrides)


def loads(text: str, name: str = "<text>", overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML text; `name` stands for the file in messages."""
    config, written = _read_as(Config, text, name, overrides)
    return config.placed(written)


def loads_as(schema: type[Tree], text: str, name: str, overrides: Sequence[str] = ()) -> Tree:
    """As `loads`, for a file of another kind: `schema` is the section it holds."""
    return _read_as(schema, text, name, overrides)[0]


def _read_as(
    schema: type[Tree], text: str, name: str, overrides: Sequence[str]
) -> tuple[Tree, Written]:
    """The section that a text holds, and where its parts stand."""
    source = inherit.parse(text, name, extends=schema is Config)
    report = _Report(name, source.places, schema)
    for place, message in source.faults:
        report.at(place, message)
    raw = source.value
    if raw is None and not source.faults:
        report.at(report.start, "the file is empty: `jaxdistill init` writes one to start from")
    elif raw is not None and not isinstance(raw, dict):
        report.at(source.places[()], "must be sections, such as `train: {steps: 10}`")
    config = None
    if isinstance(raw, dict):
        for override in overrides:
            _override(raw, override, report)
        try:
            config = schema.model_validate(raw)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                if not (source.incomplete and item["type"] == "missing"):
                    _translate(raw, dict(item), report)
    if report.lines or config is None:
        raise ConfigError(
            "\n".join(text for _, text in sorted(report.lines, key=lambda line: line[0]))
        )
    return config, Written(report.places, report.sources)


def dump(config: Config) -> str:
    """The configuration as YAML with every default written out; `loads` reads it back equal."""
    return syntax.dump(config.model_dump(mode="json", by_alias=True))


@dataclasses.dataclass
class _Report:
    """Collects messages, each with the place in a file or the override it is about."""

    name: str
    places: dict[KeyPath, FilePosition]
    schema: type[Section]
    sources: dict[KeyPath, str] = dataclasses.field(default_factory=dict)
    lines: list[tuple[tuple, str]] = dataclasses.field(default_factory=list)

    @property
    def start(self) -> FilePosition:
        """The beginning of the file."""
        return FilePosition(0, 1, 1, self.name)

    def at(self, place: FilePosition, message: str) -> None:
        self.lines.append(((0, place), f"{place}: {message}"))

    def override(self, override: str, message: str) -> None:
        self.lines.append(((1, self.start), f"override {shown(override)}: {message}"))

    def about(self, path: KeyPath, message: str) -> None:
        """Places a message at the nearest thing the user wrote at or above a path."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.sources:
                return self.override(self.sources[path[:end]], message)
            if path[:end] in self.places:
                return self.at(self.places[path[:end]], message)
        return self.at(self.start, message)

    def replaced(self, path: KeyPath, override: str) -> None:
        """From now on what stands at and below a path comes from an override."""
        for places in (self.places, self.sources):
            for place in [place for place in places if place[: len(path)] == path]:
                del places[place]
        self.sources[path] = override


def _override(raw: dict[str, Any], override: str, report: _Report) -> None:
    """Writes one `key=value` into the raw tree."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        return report.override(override, "write it as key=value, such as train.steps=20")
    if parts == [inherit.KEY]:
        return report.override(override, f"{inherit.KEY} belongs into the file")
    document = syntax.parse(text)
    for fault in document.faults:
        report.override(override, fault.message)
    if document.faults:
        return None
    here: Any = raw
    path: KeyPath = ()
    for depth, part in enumerate(parts):
        slot: str | int = part
        section: Any = here
        if isinstance(here, list):
            if not re.fullmatch(r"[0-9]{1,6}", part) or int(part) >= len(here):
                place = ".".join(parts[:depth])
                return report.override(
                    override, f"{place} is a list of {len(here)}, counted from 0"
                )
            slot = int(part)
        elif not isinstance(here, dict):
            place = ".".join(parts[:depth])
            return report.override(override, f"{place} = {shown(here)} is no section; set it whole")
        path = (*path, slot)
        if depth == len(parts) - 1:
            section[slot] = document.value
        else:
            if isinstance(here, dict) and here.get(slot) is None:
                here[slot] = {}
            here = section[slot]
    report.replaced(path, override)
    return None


def _translate(raw: dict[str, Any], item: dict[str, Any], report: _Report) -> None:
    """One of pydantic's errors in our words, at its place."""
    path = _path(item["loc"], item["type"])
    if item["type"] == "rules":
        for below, message in item["ctx"]["problems"]:
            report.about((*path, *below), f"{_key(raw, (*path, *below))}: {message}")
        return
    if item["type"] == "default_factory_not_called":
        return  # what the default is made from is wrong, and that is reported
    if item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]:
        return  # its entries are wrong, and each of them is reported
    if item["type"] == "union_tag_not_found":
        names = {name for method in METHODS.values() for name in method.options.model_fields}
        for key in [key for key in item["input"] if key not in names]:
            unknown = {"type": "extra_forbidden", "loc": ("method", "", key)}
            _translate(raw, unknown, report)
    key, message = _key(raw, path), _message(raw, path, item, report.schema)
    if item["type"].startswith("union_tag"):
        path = (*path, "name")
        key = _key(raw, path)
    report.about(path, f"{key}: {message}" if key else message)


def _path(location: tuple[str | int, ...], kind: str) -> KeyPath:
    """Drops what pydantic adds to an error's location for the alternative it tried."""
    parts = [part for i, part in enumerate(location) if not (i == 1 and location[0] == "method")]
    last = len(parts) - (kind == "extra_forbidden")
    return tuple(p for i, p in enumerate(parts) if i >= last or not str(p).startswith("<"))


def _at(raw: Any, path: KeyPath) -> tuple[bool, Any]:
    """Whether something stands at a path, and what."""
    for part in path:
        if isinstance(raw, dict) and part in raw:
            raw = raw[part]
        elif isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            return False, None
    return True, raw


def _key(raw: dict[str, Any], path: KeyPath) -> str:
    """`train.steps = 10`, or only `train.steps` where the file says nothing or a whole section."""
    name = ".".join(str(p) if re.fullmatch(r"[\w-]+", str(p)) else shown(p) for p in path)
    present, value = _at(raw, path)
    whole = isinstance(value, dict | list)
    return f"{name} = {shown(value)}" if present and not whole else name


_MESSAGES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "finite_number": "must be a finite number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "tuple_type": "must be a list, such as [a, b]",
    "too_short": "needs {min_length} or more entries",
    "too_long": "may have {max_length} entries at most",
    "string_too_short": "must not be empty",
    "string_too_long": "may have at most {max_length} characters",
    "int_parsing_size": "is too large",
    "string_unicode": "holds characters that cannot be written as UTF-8",
}


# What else a value may be, by the alternative that was tried.
_ALTERNATIVES = {
    "<number>": " or {schedule: linear, start: a, end: b}",
    "<auto>": " or a number of tokens",
    "<steps>": " of steps, or a fraction below 1",
    "<scheme>": ", or {scheme: int8, exceptions: [mlp.down=none]}",
    "<whole>": ", or {scheme: int4, exceptions: [mlp.down=int8]}",
    "<files>": ", or {fraction: 0.01} of the training data",
}


def _suggest(raw: dict[str, Any], path: KeyPath, schema: type[Section]) -> str:
    """What an unknown key probably was."""
    key, given = str(path[-1]), _at(raw, path[:-1])[1]
    if schema is Config:
        return keys.suggest(path[:-1], key, given)
    tree = schema.model_json_schema()
    sections = [tree, *tree.get("$defs", {}).values()]
    best = keys.nearest(key, {name for part in sections for name in part.get("properties", {})})
    return f'did you mean "{best}"?' if best else ""


def _message(
    raw: dict[str, Any], path: KeyPath, item: dict[str, Any], schema: type[Section]
) -> str:
    """What is wrong and, where it can be guessed, what was meant."""
    kind, value, context = item["type"], item.get("input"), item.get("ctx", {})
    if kind == "extra_forbidden":
        hint = _suggest(raw, path, schema)
        return f"unknown key; {hint}" if hint else "unknown key"
    if kind == "missing":
        return "required, but missing"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        such = keys.example(path) if schema is Config else ""
        such = f", such as {such}" if such else ""
        return f"must be a section of keys{such}{' (or removed)' if value is None else ''}"
    if kind.startswith("union_tag"):
        name = value.get("name") if isinstance(value, dict) else None
        ours = OTHER_METHODS.get(str(name).lower().replace("-", "_"))
        if ours is not None:
            return f"must be one of {', '.join(METHODS)}; here it is {ours}"
        return _choice(name, list(METHODS))
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        return _choice(value, expected) + _ALTERNATIVES.get(item["loc"][-1], "")
    if kind == "string_pattern_mismatch":
        named = context["pattern"] == NAME_PATTERN
        return "may hold only letters, digits, . _ and -" if named else "holds control characters"
    message = _MESSAGES.get(kind, item["msg"])
    other = _ALTERNATIVES.get(item["loc"][-1], "") if kind.endswith("_type") else ""
    return message.format(**context) + other + _hint(kind, value)


def _choice(value: Any, names: Sequence[str]) -> str:
    best = keys.nearest(value, names) if isinstance(value, str) else None
    hint = f'; did you mean "{best}"?' if best and len(names) > 1 else ""
    return f"must be {'one of ' if len(names) > 1 else ''}{', '.join(names)}{hint}"


def _hint(kind: str, value: Any) -> str:
    """What to write instead of a value of the wrong type."""
    if kind == "int_type" and isinstance(value, float) and value == value // 1 and value < 1e15:
        return f": write {int(value)}"
    if kind in ("int_type", "float_type") and isinstance(value, str) and value[:1].isdigit():
        return ": decimal digits without quotes, such as 1000 or 1e-4"
    if kind == "bool_type" and isinstance(value, str):
        return ", small letters, without quotes"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f': put it in quotes, "{value}"'
    return ""
