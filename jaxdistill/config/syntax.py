"""The YAML that a configuration is written in: a small, safe part of YAML 1.2, with positions.

`true` and `false` are the only booleans, `1e-4` is a number, nothing is a date, an octal or a
sexagesimal number, and tags, duplicate keys, documents after the first and oversized input are
refused before anything is built.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
MAX_NODES = 10_000
MAX_DEPTH = 32
MAX_ALIASES = 100
MAX_DIGITS = 400


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something wrong in the text, at a line and a column counted from 1."""

    line: int
    column: int
    message: str


@dataclasses.dataclass(frozen=True)
class YamlDocument:
    """Plain values, where each of them stands, and what is wrong with the text."""

    value: Any
    marks: dict[KeyPath, tuple[int, int]]
    faults: list[Fault]


class _Loader(yaml.SafeLoader):
    """SafeLoader's grammar with our own few implicit types."""

    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that `_Loader` would read as something else."""

    yaml_implicit_resolvers: dict = {}

    def ignore_aliases(self, data: Any) -> bool:
        """Writes every value out."""
        return True


_TYPES = {
    "null": (re.compile(r"^(?:null|~|)$"), ["n", "~", ""]),
    "bool": (re.compile(r"^(?:true|false)$"), ["t", "f"]),
    "int": (re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    "float": (
        re.compile(
            r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan)$"
        ),
        list("-+.0123456789"),
    ),
}
for _name, (_pattern, _first) in _TYPES.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


class _Refused(Exception):
    """Stops reading at a fault after which nothing sensible can be read."""

    def __init__(self, mark: yaml.Mark | None, message: str):
        self.fault = Fault(mark.line + 1 if mark else 1, mark.column + 1 if mark else 1, message)


def parse(text: str) -> YamlDocument:
    """Reads one document; what is wrong is collected in `faults`, never raised."""
    builder = _Builder()
    value = None
    try:
        _check_limits(text)
        node = yaml.compose(text, Loader=_Loader)
        value = builder.build(node, (), 0) if node is not None else None
    except _Refused as refused:
        builder.faults.append(refused.fault)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f"{error.context}: " if error.context else ""
        builder.faults.append(_Refused(mark, f"not valid YAML: {context}{error.problem}").fault)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        column = len(before) - (before.rfind("\n") + 1) + 1
        fault = Fault(
            before.count("\n") + 1,
            column,
            f"character U+{ord(text[error.position]):04X} is not allowed in YAML",
        )
        builder.faults.append(fault)
    return YamlDocument(value, builder.marks, builder.faults)


def dump(value: Any) -> str:
    """Plain values as YAML text that `parse` reads back to the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dotted(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf by its key as it is overridden; empty mappings and lists are leaves too.

    >>> list(dotted({"train": {"steps": 5}, "data": {"train": [{"path": "a"}], "prompts": []}}))
    [('train.steps', 5), ('data.train.0.path', 'a'), ('data.prompts', [])]
    """
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for name, value in items:
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping | list | tuple) and value:
            yield from dotted(value, key)
        else:
            yield key, value


def _check_limits(text: str) -> None:
    """Walks the events, which need no recursion, before any tree is made of them."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise _Refused(None, f"larger than {MAX_BYTES // 1024} KiB: this is no configuration")
    depth = nodes = aliases = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        mark = event.start_mark
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent)
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise _Refused(mark, f"tags such as {tag!r} are not allowed: write plain values")
        if documents > 1:
            raise _Refused(mark, "only one document is allowed: remove what follows `---`")
        if depth > MAX_DEPTH:
            raise _Refused(mark, f"nested deeper than {MAX_DEPTH} levels")
        if nodes > MAX_NODES:
            raise _Refused(mark, f"more than {MAX_NODES} values")
        if aliases > MAX_ALIASES:
            raise _Refused(mark, f"more than {MAX_ALIASES} aliases")


class _Builder:
    """Makes plain values of nodes, remembering places, counting aliases each time they are used."""

    def __init__(self) -> None:
        self.marks: dict[KeyPath, tuple[int, int]] = {}
        self.faults: list[Fault] = []
        self._nodes = 0

    def build(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        """The value of a node at a path."""
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise _Refused(node.start_mark, "aliases make this too large or endless")
        self.marks.setdefault(path, _position(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i), depth + 1) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line, column = _position(key_node)
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not isinstance(key, str):
                self.faults.append(Fault(line, column, "a key must be a name"))
                continue
            if key == "<<":
                self.faults.append(Fault(line, column, "merge keys (<<) are not supported"))
                continue
            if key in result:
                first = self.marks[(*path, key)][0]
                message = f"duplicate key {shown(key)} (first on line {first})"
                self.faults.append(Fault(line, column, message))
                continue
            self.marks[(*path, key)] = (line, column)
            result[key] = self.build(value_node, (*path, key), depth + 1)
        return result

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.rpartition(":")[2], node.value
        if kind == "null":
            return None
        if kind == "bool":
            return text == "true"
        if kind in ("int", "float") and len(text) > MAX_DIGITS:
            self.faults.append(Fault(*_position(node), "a number with too many digits"))
            return None
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        return text


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def shown(value: Any, width: int = 60) -> str:
    """A value for a message: quoted if text, escaped for the terminal, shortened if long."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif value is None:
        text = "null"
    elif isinstance(value, dict):
        text = "{...}" if value else "{}"
    elif isinstance(value, list | tuple):
        text = "[...]" if value else "[]"
    elif isinstance(value, str):
        text = f'"{value if value.isprintable() else ascii(value[: width + 1])[1:-1]}"'
    else:
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge number"
    return text if len(text) <= width else text[: width - 3] + "..."
