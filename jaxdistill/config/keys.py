"""What a key means, which keys exist, and which one was probably meant."""

import difflib
import functools
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from jaxdistill import methods
from jaxdistill.config.schema import Config
from jaxdistill.config.synonyms import OTHER_METHODS, SYNONYMS
from jaxdistill.config.syntax import shown
from jaxdistill.errors import ConfigError

JsonSchema = dict[str, Any]


_EXTENDS = {
    "type": "string",
    "description": "A recipe, or a path relative to this file, that has what this file leaves out; "
    "sections merge key by key.",
}


_MOST = 4  # alternatives of a section that are explained in full


def tree() -> JsonSchema:
    """The sections of a configuration, and the key of its file that is none of them."""
    return _schema_with(methods.rows())


@functools.lru_cache(maxsize=4)
def _schema_with(rows: object) -> JsonSchema:
    """The schema with the methods that the table holds now."""
    schema = Config.model_json_schema()
    return {**schema, "properties": {"extends": _EXTENDS, **schema["properties"]}}


def explain(key: str) -> str:
    """Description, type, range and default of a key such as `method.alpha`; "" lists everything.

    The name of a method is what it is, and its options; so it is with what others call a key or a
    method.

    Raises:
      ConfigError: if there is no such key.
    """
    if key in SYNONYMS:
        also = f"; method.name: {OTHER_METHODS[key]}" if key in OTHER_METHODS else ""
        return f"{key} is {SYNONYMS[key]} here{also}\n\n{explain(SYNONYMS[key])}"
    if key in OTHER_METHODS:
        name = re.match(r"\w+", OTHER_METHODS[key])
        assert name, "it begins with the name of a method"
        return f"{key} is method.name: {OTHER_METHODS[key]}\n\n{explain(name[0])}"
    if key in methods.METHODS:
        (own,) = [node for node in _step([tree()], "method") if _named(node) == key]
        return _describe(f"method: {{name: {key}}}", own)
    path = tuple(part for part in key.split(".") if part)
    nodes = [tree()]
    for depth, part in enumerate(path):
        below = _step(nodes, part) or [node for node in nodes if _named(node) == part]
        if not below:
            hint = suggest(path[:depth], part)
            raise ConfigError(f"{shown(part)}: no such key{'; ' + hint if hint else ''}")
        nodes = below
    if sum(_named(node) is not None for node in nodes) > _MOST:
        return _names(".".join(path), nodes)
    return "\n\n".join(_describe(".".join(path), schema) for schema in nodes)


def _names(key: str, found: Sequence[JsonSchema]) -> str:
    """The alternatives of a section by name, one line on each."""
    named = {name: node.get("description", "") for node in found if (name := _named(node))}
    width = max(map(len, named))
    lines = [f"  {name:{width}}  {text}" for name, text in named.items()]
    first = next(iter(named))
    return "\n".join(
        [
            f"{key}: a section whose `name` is one of",
            *lines,
            f"`--explain {key}.{first}` lists keys",
        ]
    )


def example(path: Sequence[str | int]) -> str:
    """How a section may be written, such as `{project: ...}`; "" where it has no own keys."""
    nodes = [tree()]
    for part in path:
        nodes = _step(nodes, part)
    for node in nodes:
        for name in (*node.get("required", ()), *node.get("properties", {})):
            return f"{{{name}: ...}}"
    return ""


def suggest(section: Sequence[str | int], key: str, given: Any = None) -> str:
    """`did you mean "x"?` for an unknown key of a section, or "" when nothing is near.

    Args:
      section: path of the section that holds the key.
      key: the unknown key.
      given: what the section holds, a mapping: its `name` tells the method, and keys it already
        has are less likely to be meant.
    """
    given = given if isinstance(given, dict) else {}
    nodes = [tree()]
    for part in section:
        nodes = _step(nodes, part)
    names = lambda nodes: {name for node in nodes for name in node.get("properties", {})}
    own = [node for node in nodes if _named(node) in (None, given.get("name"))] or nodes
    best = nearest(key, names(own), given)
    if best is None and own != nodes and (best := nearest(key, names(nodes), given)):
        owners = [_named(node) for node in nodes if best in node.get("properties", {})]
        some = ", ".join(map(str, owners[:3])) + (" and others" if len(owners) > 3 else "")
        return f'did you mean "{best}" of {some}?'
    if best is None and key in SYNONYMS:
        return f'here it is "{SYNONYMS[key]}"'
    if best is None:
        homes = [path for path in all_keys() if path[-1] == key]
        best = ".".join(homes[0]) if len(homes) == 1 else None
    return f'did you mean "{best}"?' if best else ""


def nearest(word: str, names: Collection[str], taken: Collection[str] = ()) -> str | None:
    """The name that is fewest edits away, if those are at most a third of its letters."""
    if len(word) > 64:
        return None
    similar = difflib.SequenceMatcher(b=word)

    def rank(name: str) -> tuple[int, bool, float]:
        similar.set_seq1(name)
        return _edits(word, name), name in taken, -similar.ratio()

    best = min(names, key=rank, default=None)
    if best is None or _edits(word, best) > max(1, len(best) // 3):
        return None
    return best


def _edits(left: str, right: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours between two words."""
    left, right = left.lower(), right.lower()
    previous: list[int] = []
    current = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        older, previous, current = previous, current, [i]
        for j, b in enumerate(right, 1):
            cost = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and b == left[i - 2]:
                cost = min(cost, older[j - 2] + 1)
            current.append(cost)
    return current[-1]


def _step(nodes: Sequence[JsonSchema], part: str | int) -> list[JsonSchema]:
    """The schemas one key or index below; a name below a list means that of its items."""
    below: list[JsonSchema] = []
    for node in nodes:
        properties = node.get("properties", {})
        if part in properties:
            below += _alternatives(properties[part])
        elif "items" in node:
            items = _alternatives(node["items"])
            below += items if str(part).isdigit() else _step(items, part)
        elif (named := _any_name(node)) is not None:
            below += _step(one := _alternatives(named), part) or one
    return [node for i, node in enumerate(below) if node not in below[:i]]


def _alternatives(node: JsonSchema) -> list[JsonSchema]:
    """A schema with references resolved, split into its alternatives if they are sections."""
    reference = node.get("$ref")
    if reference:
        target = tree()["$defs"][reference.rpartition("/")[2]]
        node = {**target, **{name: value for name, value in node.items() if name != "$ref"}}
    options = node.get("anyOf") or node.get("oneOf")
    if not options:
        return [node]
    parts = [part for option in options for part in _alternatives(option)]
    sections = [part for part in parts if "properties" in part]
    outer = {name: node[name] for name in ("default", "description") if name in node}
    scalars = [{**outer, "options": options}] if len(sections) < len(parts) else []
    if scalars and (lists := [part for part in parts if "items" in part or _any_name(part)]):
        scalars = [{**part, **outer} for part in lists]
    elif sections and all(part.get("type") == "null" for part in parts if part not in sections):
        scalars = []
    return scalars + sections


def _any_name(node: JsonSchema) -> JsonSchema | None:
    """What stands under names of the user's own, where a section has such."""
    children = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
    return next((one for one in children if isinstance(one, dict) and one), None)


def _named(node: JsonSchema) -> str | None:
    """The value of `name` that tells a section apart from its alternatives."""
    return node.get("properties", {}).get("name", {}).get("const")


def all_keys() -> tuple[tuple[str, ...], ...]:
    """The path of every key, sections included, each once."""
    return _all_keys(methods.rows())


@functools.lru_cache(maxsize=4)
def _all_keys(rows: object) -> tuple[tuple[str, ...], ...]:
    return tuple(_below([tree()], ()))


def values(path: Sequence[str]) -> tuple[str, ...]:
    """What a key may be, where that is one of a few words; () for numbers, paths and sections."""
    nodes = [tree()]
    for part in path:
        nodes = _step(nodes, part)
    flat = [one for node in nodes for one in node.get("options", [node])]
    words = [word for one in flat for word in one.get("enum", [one.get("const")])]
    words += [word for one in flat if one.get("type") == "boolean" for word in ("true", "false")]
    return tuple(dict.fromkeys(word for word in words if isinstance(word, str)))


def _below(nodes: Sequence[JsonSchema], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    seen: set[str] = set()
    for node in nodes:
        for name in node.get("properties", {}):
            if name not in seen:
                seen.add(name)
                yield (*path, name)
                yield from _below(_step(nodes, name), (*path, name))


def _describe(key: str, schema: JsonSchema) -> str:
    """A section with one line per key, or a key with all there is to say."""
    if "properties" not in schema:
        return f"{key}: {_type(schema)}{_default(schema)}\n  {schema.get('description', '')}"
    head = f"{key or 'configuration'}: {schema.get('description', '')}"
    required = schema.get("required", [])
    lines = [head]
    for name, child in schema["properties"].items():
        default = " (required)" if name in required else _default(child)
        description = child.get("description") or _alternatives(child)[0].get("description", "")
        lines.append(f"  {name}: {_type(child)}{default}. {description}")
    return "\n".join(lines)


def _default(schema: JsonSchema) -> str:
    return f", default {shown(schema['default'])}" if "default" in schema else ""


_RANGE = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "object": "section",
}


def _type(schema: JsonSchema) -> str:
    """A type and its range in words."""
    if "$ref" in schema:
        return _type(tree()["$defs"][schema["$ref"].rpartition("/")[2]])
    options = schema.get("options") or schema.get("anyOf") or schema.get("oneOf")
    if options:
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of ({_type(items)})"
    bounds = [f" {words} {_brief(schema[key])}" for key, words in _RANGE.items() if key in schema]
    return _TYPES.get(schema.get("type", ""), "value") + ",".join(bounds)


def _brief(number: int | float) -> str:
    return f"{int(number)}" if number == int(number) else f"{number:g}"
