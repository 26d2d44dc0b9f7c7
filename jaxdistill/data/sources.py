"""Where records come from: streams of JSONL, text, Parquet, and the texts Python ships."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxdistill.data import parquet, python_docs
from jaxdistill.data.records import (
    KINDS,
    MAX_RECORD_BYTES,
    Record,
    Rejected,
    kinds_of,
    names_of,
    parse,
    text_problem,
)
from jaxdistill.errors import DataError
from jaxdistill.types import ORIGINS

# `plain` makes one document of a text file, `paragraphs` one of every block between blank lines.
TEXT_FORMATS = ("plain", "paragraphs")
FORMATS = ("auto", *KINDS, *TEXT_FORMATS)
JSON_ENDINGS = (".jsonl", ".ndjson")
TEXT_ENDINGS = (".txt", ".text", ".md")
PARQUET_ENDINGS = (".parquet",)
PYTHON_DOCS = "python:docs"

# A long text is tokenised in pieces of about this size, so that memory does not grow with the file.
PIECE_BYTES = 250_000
_BOM = b"\xef\xbb\xbf"

Stream = Iterator[Record | Rejected]


@dataclasses.dataclass(frozen=True)
class Source:
    """One stream of records that can be read again and again.

    Attributes:
      name: how the user named it; messages and the quarantine file use it.
      format: a value of FORMATS.
      read: starts a new pass over the records, good and rejected, in file order.
      digest: a hash of the content, whatever its path and times.
      origin: who wrote it, a value of `types.ORIGINS`.
    """

    name: str
    format: str
    read: Callable[[], Stream]
    digest: Callable[[], str]
    origin: str = "data"

    def __iter__(self) -> Stream:
        return self.read()


def open_source(path: str | Path, format: str = "auto", origin: str = "data") -> Source:
    """Opens a file, or a text set such as `python:docs?split=train`, as a source of records.

    The endings decide how the bytes are read: `.jsonl`, `.ndjson`: one JSON object a line;
    `.parquet`: one record a row; `.txt`, `.text`, `.md`: text. For JSONL and Parquet, `format` is
    `text`, `messages` or `completion`, and `auto` takes the kind of the first good record. For text
    it is `plain` (the file is one document; also what `auto` means) or `paragraphs` (blank lines
    part the documents). Records are streamed: memory does not grow with the file.

    Args:
      path: the file, or `python:docs` with an optional `?split=train` or `?split=held_out`.
      format: a value of FORMATS.
      origin: who wrote it: data, teacher or student, for losses that differ by it.

    Returns:
      A Source.

    Raises:
      DataError: if the file is missing, its ending or the format is not supported, or the two do
        not go together.
    """
    name = str(path)
    if format not in FORMATS:
        raise DataError(f"{name}: format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    if origin not in ORIGINS:
        raise DataError(f"{name}: origin {origin!r} is unknown: use one of {', '.join(ORIGINS)}")
    return dataclasses.replace(_open(path, name, format), origin=origin)


def _open(path: str | Path, name: str, format: str) -> Source:
    if name.startswith("python:"):
        return _python_source(name, format)
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{name}: is a folder: name the files in it")
    if not path.is_file():
        raise DataError(f"{name}: no such file (relative paths start at {Path.cwd()})")
    ending = path.suffix.lower()
    if ending in TEXT_ENDINGS:
        return _text_source(path, name, format)
    if ending in JSON_ENDINGS or ending in PARQUET_ENDINGS:
        if format in TEXT_FORMATS:
            raise DataError(
                f"{name}: format {format!r} is for text files: use auto, {', '.join(KINDS)}"
            )
        objects = _jsonl_objects if ending in JSON_ENDINGS else parquet.objects
        return Source(
            name, format, lambda: _typed(objects(path, format), format, name), lambda: _digest(path)
        )
    known = ", ".join(JSON_ENDINGS + TEXT_ENDINGS + PARQUET_ENDINGS)
    hint = " (write a JSON list as .jsonl, one object a line)" if ending == ".json" else ""
    raise DataError(f"{name}: files ending in {ending!r} cannot be read: use {known}{hint}")


def _python_source(name: str, format: str) -> Source:
    split = python_docs.split_of(name)
    if format not in ("auto", "text", "plain"):
        raise DataError(f"{name}: holds plain text: format must be auto or text, got {format!r}")

    def read() -> Stream:
        for line, document in enumerate(python_docs.documents(split), start=1):
            yield Record("text", (document,), line)

    return Source(name, "text", read, lambda: python_docs.digest(split))


def _text_source(path: Path, name: str, format: str) -> Source:
    if format == "auto":
        format = "plain"
    if format not in TEXT_FORMATS:
        raise DataError(
            f"{name}: a text file is read as {' or '.join(TEXT_FORMATS)}, got format {format!r}; "
            "records of other kinds go into .jsonl or .parquet files"
        )
    paragraphs = format == "paragraphs"
    return Source(name, format, lambda: _documents(path, paragraphs), lambda: _digest(path))


def _typed(objects: Iterable[tuple[int, Any] | Rejected], format: str, name: str) -> Stream:
    """Turns objects into records of one kind; `auto` takes that of the first object with one."""
    kind, first = (None, 0) if format == "auto" else (format, 0)
    for item in objects:
        if isinstance(item, Rejected):
            yield item
            continue
        line, value = item
        found = kinds_of(value) if isinstance(value, dict) else []
        if kind is None:
            if len(found) > 1:
                raise DataError(
                    f"{name}:{line}: the record has the fields of {' and '.join(found)}: say which "
                    "one to use with `format`"
                )
            if not found:
                yield _no_kind(value, line)
                continue
            kind, first = found[0], line
        elif first and found and kind not in found:
            raise DataError(
                f"{name}:{line}: mixed kinds of records: line {first} is {kind!r}, line {line} is "
                f"{found[0]!r}: split the file, or set `format: {kind}` to leave the others out"
            )
        yield parse(value, kind, line)


def _no_kind(value: Any, line: int) -> Rejected:
    if not isinstance(value, dict):
        return Rejected(line, f"not an object: got {type(value).__name__}")
    need = "`text`, `messages`, or `prompt` and `completion`"
    return Rejected(line, f"missing field: expected {need}; found {names_of(value)}")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without their ends; None for a line that is too large to be read."""
    number = 0
    while line := file.readline(MAX_RECORD_BYTES + 2):
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line.rstrip(b"\r\n")) > MAX_RECORD_BYTES:
            while not line.endswith(b"\n") and (line := file.readline(PIECE_BYTES)):
                pass
            yield number, None
        else:
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _too_large(line: int) -> Rejected:
    return Rejected(line, f"too large: more than {MAX_RECORD_BYTES // 1_000_000} MB in one line")


def _decode(data: bytes, line: int) -> str | Rejected:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(line, f"invalid UTF-8 at byte {error.start}")


def _jsonl_objects(path: Path, format: str) -> Iterator[tuple[int, Any] | Rejected]:
    with path.open("rb") as file:
        for number, data in _lines(file):
            if data is None:
                yield _too_large(number)
                continue
            text = _decode(data, number)
            if isinstance(text, Rejected):
                yield text
                continue
            # Lines of white space are not records: files end with one, and editors leave them.
            if not text.strip(" \t\r\n"):
                continue
            try:
                value = json.loads(text)
            except RecursionError:
                yield Rejected(number, "bad JSON: nested too deeply")
            except ValueError as error:
                yield Rejected(number, f"bad JSON: {str(error)[:200]}")
            else:
                yield number, value


def _documents(path: Path, paragraphs: bool) -> Stream:
    """The texts of a file; long ones in several records, which know whether they open or close."""
    held: tuple[int, int, bytes] | None = None
    opens = True
    with path.open("rb") as file:
        for chunk in _chunks(file, paragraphs):
            if isinstance(chunk, Rejected):
                yield chunk
                continue
            if held:
                closes = chunk[0] != held[0]
                yield _piece(held, opens, closes)
                opens = closes
            held = chunk
    if held:
        yield _piece(held, opens, closes=True)


def _chunks(file: BinaryIO, paragraphs: bool) -> Iterator[tuple[int, int, bytes] | Rejected]:
    """(document, first line, bytes): whole lines, at most about PIECE_BYTES of one document."""
    lines: list[bytes] = []
    document, size, start = 0, 0, 1
    for number, data in _lines(file):
        if data is None:
            yield _too_large(number)
            continue
        blank = paragraphs and not data.strip()
        if not blank:
            start = start if lines else number
            lines.append(data)
            size += len(data) + 1
        if lines and (blank or size >= PIECE_BYTES):
            yield document, start, b"\n".join(lines)
            lines, size = [], 0
        document += blank
    if lines:
        yield document, start, b"\n".join(lines)


def _piece(chunk: tuple[int, int, bytes], opens: bool, closes: bool) -> Record | Rejected:
    _, line, data = chunk
    text = _decode(data if closes else data + b"\n", line)
    if isinstance(text, Rejected):
        return text
    problem = text_problem(text)
    if problem:
        return Rejected(line, problem)
    if opens and closes and not text.strip():
        return Rejected(line, "empty: no text")
    return Record("text", (text,), line, opens=opens, closes=closes)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
