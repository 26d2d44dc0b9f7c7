"""What a configuration takes from the one it extends: which file that is, and how the two merge.

`extends: NAME` names a recipe. `extends: PATH` (with a / or ending in .yaml) names a file, relative
to the file that says so. The rules of merging:

- A section merges with the base's section key by key.
- A section that names another thing replaces the base's. That is `method` with another `name`, and
  a section with a choice (`source`, `from`, `random`) that the base's section does not make.
- Anything else replaces what the base has, lists too. `null` in place of a section removes it.
"""

import copy
import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jaxdistill.config import keys, syntax
from jaxdistill.config.syntax import KeyPath, shown
from jaxdistill.errors import ConfigError

KEY = "extends"
MAX_FILES = 8
_CHOICES = {"source", "from", "random", "api", "self"}


@dataclasses.dataclass(frozen=True, order=True)
class FilePosition:
    """Where something stands: how many bases down its file is, then line and column from 1."""

    depth: int
    line: int
    column: int
    file: str = dataclasses.field(compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclasses.dataclass
class MergedFile:
    """A configuration with its bases merged: its tree, where each part stands, what is wrong.

    `incomplete` says that a base could not be read, so that what is missing may be in it.
    """

    value: Any
    places: dict[KeyPath, FilePosition]
    faults: list[tuple[FilePosition, str]]
    incomplete: bool = False


def recipes() -> dict[str, pathlib.Path]:
    """Recipe name -> file: inside an installed package, or configs/ beside it in a checkout."""
    package = pathlib.Path(__file__).resolve().parents[1]
    folders = (package / "_recipes", package.parent / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))} if folder else {}


def read(path: str | os.PathLike) -> str:
    """The text of a configuration file.

    Raises:
      ConfigError: if it cannot be read, is too large, or is not UTF-8.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            data = file.read(syntax.MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{shown(name)}: cannot read this configuration: {reason}") from None
    try:
        # Too large a file is refused by its size later, and may end within a character here.
        return data.decode("utf-8-sig" if len(data) <= syntax.MAX_BYTES else "latin-1")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text: save the file as UTF-8") from None


def parse(text: str, name: str, *, extends: bool = True, above: tuple[str, ...] = ()) -> MergedFile:
    """Parses a text and merges it over what it extends; `name` is its file.

    Args:
      text: YAML.
      name: the file, or what stands for it in messages.
      extends: whether the key has its meaning in this kind of file.
      above: the files that extend this one, outermost first.
    """
    document = syntax.parse(text)
    place = lambda line, column: FilePosition(len(above), line, column, name)
    places = {path: place(*mark) for path, mark in document.marks.items()}
    faults = [(place(f.line, f.column), f.message) for f in document.faults]
    source = MergedFile(document.value, places, faults)
    if extends and isinstance(source.value, dict) and KEY in source.value:
        wanted, where = source.value.pop(KEY), places.pop((KEY,))
        try:
            base = _base(wanted, (*above, name))
        except ConfigError as error:
            source.faults.append((where, f"{KEY} = {shown(wanted)}: {error}"))
            source.incomplete = True
        else:
            merged: dict[KeyPath, FilePosition] = {(): places[()]}
            source.value = _merge(base.value, source.value, (), base.places, places, merged)
            source.places = merged
            source.faults += base.faults
            source.incomplete = base.incomplete
    return source


def _base(wanted: Any, above: tuple[str, ...]) -> MergedFile:
    """What `extends` names, with its own bases; a ConfigError says why there is none."""
    path = _locate(wanted, above[-1])
    chain = " -> ".join((*above, path))
    if os.path.realpath(path) in map(os.path.realpath, above):
        raise ConfigError(f"a circle: {chain}")
    if len(above) >= MAX_FILES:
        raise ConfigError(f"more than {MAX_FILES} files extend one another: {chain}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{path} is not a regular file")
    base = parse(read(path), path, above=above)
    if not isinstance(base.value, dict):
        if base.faults:
            return dataclasses.replace(base, value={}, incomplete=True)
        raise ConfigError(f"{path} holds no sections")
    if "steps" in base.value:
        raise ConfigError(f"{path} is a workflow, which no configuration can extend")
    return base


def _locate(wanted: Any, beside: str) -> str:
    """The file that `extends` means in the file `beside`."""
    if not isinstance(wanted, str) or not wanted or not wanted.isprintable():
        raise ConfigError("must be a recipe's name or a path")
    if "/" in wanted or os.sep in wanted or wanted.endswith((".yaml", ".yml")):
        return os.path.join(os.path.dirname(beside), wanted.removeprefix("./") or ".")
    files = recipes()
    if wanted not in files:
        near = keys.nearest(wanted, files)
        hint = f'did you mean "{near}"?' if near else "`jaxdistill ls recipes` lists them"
        raise ConfigError(f"is no recipe; {hint}")
    return os.fspath(files[wanted])


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `over` laid over that of `base`, by the rules of this module; both stay whole."""
    return _merge(dict(base), dict(over), (), {}, {}, {})


def _merge(
    base: dict, over: dict, path: KeyPath, base_places: dict, over_places: dict, places: dict
) -> dict[str, Any]:
    """Merges two sections at a path and writes down where each part of the result stands."""
    result = {}
    for key in [*base, *(key for key in over if key not in base)]:
        here = (*path, key)
        old, new = base.get(key), over.get(key)
        if key in over and here in over_places:
            places[here] = over_places[here]
        if key not in over:
            _record(old, here, base_places, places)
            result[key] = copy.deepcopy(old)
        elif isinstance(old, dict) and isinstance(new, dict) and not _another(key, old, new):
            result[key] = _merge(old, new, here, base_places, over_places, places)
        elif not (isinstance(old, dict) and new is None):
            _record(new, here, over_places, places)
            result[key] = copy.deepcopy(new)
    return result


def _another(key: str, old: dict, new: dict) -> bool:
    """Whether a section names another thing than the base's, of which no option then holds."""
    if key == "method":
        return "name" in new and new["name"] != old.get("name")
    return any(choice in new and choice not in old for choice in _CHOICES)


def _record(value: Any, path: KeyPath, known: dict, places: dict) -> None:
    """Copies the places of a value and of all below it."""
    if path in known:
        places[path] = known[path]
    parts = value.items() if isinstance(value, dict) else []
    for slot, part in enumerate(value) if isinstance(value, list) else parts:
        _record(part, (*path, slot), known, places)


def flattened(path: str | os.PathLike) -> str:
    """The text of a configuration file in full, with nothing left to extend and with its comments.

    A section that only one file has, or that the extending file states whole, keeps its text.
    """
    text = read(path)
    source = parse(text, os.fspath(path))
    head, sections = _sections(text)
    if KEY not in sections or source.faults:
        return text
    wanted = syntax.parse(text).value[KEY]
    base_text = flattened(_locate(wanted, os.fspath(path)))
    base_head, below = _sections(base_text)
    base = parse(base_text, "base").value
    over = {key: value for key, value in syntax.parse(text).value.items() if key != KEY}
    lines = [head]
    for key, value in source.value.items():
        if key in over and (value == over[key] or key not in base):
            lines.append(sections[key])
        elif value == base.get(key):
            lines.append(below[key])
        else:
            lines.append(syntax.dump({key: value}))
    return "".join(lines)


def _sections(text: str) -> tuple[str, dict[str, str]]:
    """The comments at a file's head, and the text of each section with the comments above it."""
    starts = [match.start() for match in re.finditer(r"^(?:#.*\n|\n)*^[A-Za-z_]\w*:", text, re.M)]
    head = re.match(r"(?:#.*\n|\n)*", text)
    head_end = head.end() if head else 0
    starts = sorted({max(start, head_end) for start in starts})
    parts = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    named = ((re.search(r"^(\w+):", part, re.M), part) for part in parts)
    return text[:head_end], {name[1]: part for name, part in named if name}
