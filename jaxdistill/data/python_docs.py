"""Real English text that every Python ships: its manual's topics and the library's docstrings."""

import ast
import functools
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl

from jaxdistill.errors import DataError

SPLITS = ("all", "train", "held_out")
PARTS = ("all", "manual", "library")
HELD_OUT_ONE_IN = 10

# Part of the digest: raise it when the cleaning below changes what comes out.
_VERSION = 1
_SKIPPED = {
    "test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "_bundled",
    "lib2to3", "pydoc_data", "turtledemo", "__pycache__",
}  # fmt: skip
_SHORTEST = 200
_TOPICS = ("pydoc_data", "topics.py")


def chosen(name: str) -> tuple[str, str]:
    """The split and the part in `python:docs` or `python:docs?split=train&part=manual`.

    Raises:
      DataError: if the name holds anything else.
    """
    base, _, query = name.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    split, part = options.pop("split", "all"), options.pop("part", "all")
    if base != "python:docs" or options or split not in SPLITS or part not in PARTS:
        raise DataError(
            f"{name}: unknown text set: use python:docs, python:docs?split=train or "
            "?split=held_out, and &part=manual or &part=library for one of its two kinds of text"
        )
    return split, part


def is_held_out(document: str) -> bool:
    """Whether a document belongs to the held-out tenth; its text alone decides."""
    digest = hashlib.sha256(document.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def documents(split: str = "all", part: str = "all") -> Iterator[str]:
    """The documents of one split and part, always in the same order.

    That is topics by name, then modules by path. A module's document is its docstrings in the order
    of the source. The files are parsed, never imported or executed. Which texts there are depends
    on the version of Python.

    Args:
      split: `all`, `train`, or `held_out` (about one in ten, chosen by the hash of the text, so
        that no text is in both).
      part: `all`, `manual` (the topics) or `library` (the docstrings).

    Raises:
      DataError: if this Python ships neither.
    """
    everything = _documents()
    if part != "all":
        manual = frozenset(map(_clean, _topics()))
        everything = tuple(one for one in everything if (one in manual) == (part == "manual"))
    if not everything:
        raise DataError(
            f"python:docs: found no text in {_library()}: this Python ships without its library's "
            "source; use a file of your own"
        )
    for document in everything:
        if split == "all" or is_held_out(document) == (split == "held_out"):
            yield document


def digest(split: str = "all", part: str = "all") -> str:
    """A hash of the files that the documents are read from, and of split and part."""
    own = "" if part == "all" else f" {part}"
    hasher = hashlib.sha256(f"{_VERSION} {split} {HELD_OUT_ONE_IN}{own}".encode())
    for path in [_library().joinpath(*_TOPICS), *_modules()]:
        if path.is_file():
            content = path.read_bytes()
            name = path.relative_to(_library()).as_posix()
            hasher.update(f"{name} {len(content)} ".encode())
            hasher.update(content)
    return hasher.hexdigest()


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _modules() -> list[Path]:
    library = _library()
    documented = []
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).parts
        # The build's own configuration differs between machines and is no text.
        if not _SKIPPED.intersection(parts[:-1]) and not parts[-1].startswith("_sysconfigdata"):
            documented.append(path)
    return sorted(documented, key=lambda path: path.relative_to(library).as_posix())


@functools.cache
def _documents() -> tuple[str, ...]:
    texts = [*_topics(), *(_docstrings(path) for path in _modules())]
    # The same text twice would sit in a split twice, never in both.
    return tuple(dict.fromkeys(text for text in map(_clean, texts) if len(text) >= _SHORTEST))


def _topics() -> list[str]:
    """The values of the one dictionary literal in pydoc_data/topics.py."""
    tree = _parse(_library().joinpath(*_TOPICS))
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Dict):
            pairs = [
                (key.value, value.value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
            ]
            return [text for _, text in sorted(pairs) if isinstance(text, str)]
    return []


def _docstrings(path: Path) -> str:
    tree = _parse(path)
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    definitions = [node for node in ast.walk(tree) if isinstance(node, nodes)] if tree else []
    definitions.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for text in map(ast.get_docstring, definitions) if text)


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _clean(text: str) -> str:
    """Plain paragraphs, without interactive sessions, directives and control characters."""
    text = inspect.cleandoc(text).encode("utf-8", "ignore").decode("utf-8")
    text = re.sub(r"[^\S\n]+\n", "\n", text)
    paragraphs = [
        paragraph
        for paragraph in re.split(r"\n{2,}", text)
        if not re.match(r"\s*(>>>|\.\. )", paragraph) and re.search(r"[A-Za-z]{2}", paragraph)
    ]
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", "\n\n".join(paragraphs)).strip()
