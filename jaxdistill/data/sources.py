"""Where records come from: streams of JSONL, text, Parquet, and the texts Python ships."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxdistill.data import files, parquet, paths, python_docs, tables
from jaxdistill.data.files import decode, lines, too_large
from jaxdistill.data.paths import TABLE_ENDINGS, TEXT_ENDINGS, File, ending_of
from jaxdistill.data.records import KINDS, Record, Rejected, has_fields, kinds_of, parse
from jaxdistill.data.rules import Empty, names_of, text_problem
from jaxdistill.errors import DataError
from jaxdistill.types import ORIGINS

# `plain` makes one document of a text file, `paragraphs` one of every block between blank lines.
TEXT_FORMATS = ("plain", "paragraphs")
FORMATS = ("auto", *KINDS, *TEXT_FORMATS)
PYTHON_DOCS = "python:docs"
RecordStream = Iterator[Record | Rejected]


@dataclasses.dataclass(frozen=True)
class Source:
    """One stream of records that can be read again and again.

    Attributes:
      name: how the user named it; messages and the quarantine file use it.
      format: a value of FORMATS.
      read: starts a new pass over the records, good and rejected, in file order.
      digest: a hash of the content, whatever its path and times.
      origin: who wrote it, a value of `types.ORIGINS`.
      weight: how often each of its records is read in an epoch.
      teacher: which of several its records are for, where they do not say; or None.
      size: bytes of its file; None: many, or nobody knows.
      parts: the sources that it joins, the files of a folder.
      unread: names of fields that passes over it met and did not read.
      notes: what the user should know about how it was found.
    """

    name: str
    format: str
    read: Callable[[], RecordStream]
    digest: Callable[[], str]
    origin: str = "data"
    weight: float = 1.0
    teacher: str | None = None
    size: int | None = None
    parts: tuple["Source", ...] = ()
    unread: set[str] = dataclasses.field(default_factory=set, compare=False)
    notes: tuple[str, ...] = ()

    def __iter__(self) -> RecordStream:
        return self.read()


def open_source(
    path: str | Path,
    format: str = "auto",
    origin: str = "data",
    *,
    weight: int | float = 1.0,
    teacher: str | None = None,
    allow_network: bool = False,
) -> Source:
    """Opens files, or a named set of records, as a source of records.

    The endings decide how the bytes are read: `.jsonl`, `.ndjson`: one JSON object a line; `.json`:
    one list of them; `.csv`, `.tsv`, `.parquet`: one record a row; `.txt`, `.text`, `.md`: text. A
    further `.gz`, `.bz2`, `.xz` or `.zst` says that it is compressed. A folder stands for the files
    below it, by name. For records, `format` is a key of `records.KINDS`, and `auto` takes the kind
    of the first good one. For text it is `plain` (the file is one document; also what `auto` means)
    or `paragraphs` (blank lines part the documents). Records are streamed: memory does not grow
    with the file.

    Args:
      path: a file, a folder, a pattern such as `data/*.jsonl`, the same behind `gs://` or `s3://`
        (no Parquet), `python:docs` with an optional
        `?split=train` or `?split=held_out`, and `&part=manual` or `&part=library`; or
        `hf:NAME?split=train` (extra `hf`).
      format: a value of FORMATS.
      origin: who wrote it: data, teacher or student, for losses that differ by it.
      weight: how often each record is read in an epoch: 2 twice, 0.5 every other one.
      teacher: which of several teachers its records are for, where they do not say.
      allow_network: let `hf:` download.

    Returns:
      A Source.

    Raises:
      DataError: if nothing is there, its ending or the format is not supported, or the two do not
        go together.
    """
    name = str(path)
    if format not in FORMATS:
        raise DataError(f"{name}: format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    if origin not in ORIGINS:
        raise DataError(f"{name}: origin {origin!r} is unknown: use one of {', '.join(ORIGINS)}")
    if not 0 < weight <= 1000:
        raise DataError(f"{name}: weight {weight}: must be above 0 and at most 1000")
    found, weight = _open(path, name, format, allow_network), float(weight)
    given: dict[str, Any] = {"origin": origin, "weight": weight, "teacher": teacher}
    parts = tuple(dataclasses.replace(part, **given) for part in found.parts)
    return dataclasses.replace(found, **given, parts=parts)


def _open(path: str | Path, name: str, format: str, allow_network: bool) -> Source:
    if name.startswith("python:"):
        return _python_source(name, format)
    if name.startswith("hf:"):
        _check_record_format(name, format)
        dataset = tables.HubDataset(name, allow_network)
        unread: set[str] = set()
        read = lambda: _typed(dataset.objects(format, unread), format, name, unread, table=True)
        return Source(name, format, read, dataset.digest, unread=unread)
    found, notes = paths.find(path)
    parts = [_file(one, name if one == Path(path) else str(one), format) for one in found]
    if len(parts) == 1 and not notes:
        return parts[0]
    return dataclasses.replace(_joined(name, format, parts), notes=notes)


def _joined(name: str, format: str, parts: list[Source]) -> Source:
    def read() -> RecordStream:
        for part in parts:
            yield from part

    def digest() -> str:
        return hashlib.sha256(" ".join(part.digest() for part in parts).encode()).hexdigest()

    return Source(name, format, read, digest, parts=tuple(parts))


def _check_record_format(name: str, format: str) -> None:
    if format in TEXT_FORMATS:
        raise DataError(
            f"{name}: format {format!r} is for text files: use auto, {', '.join(KINDS)}"
        )


def _file(path: File, name: str, format: str) -> Source:
    ending = ending_of(path)
    if ending in TEXT_ENDINGS:
        return _text_source(path, name, format)
    _check_record_format(name, format)
    unread: set[str] = set()

    def objects() -> Iterable[tuple[int, Any] | Rejected]:
        if ending == ".parquet":
            columns = lambda names: tables.columns(names, format, name, unread)
            assert isinstance(path, Path), "Parquet of a bucket was refused"
            return parquet.objects(path, columns)
        if ending in TABLE_ENDINGS:
            return files.csv_objects(path)
        return files.json_objects(path) if ending == ".json" else files.jsonl_objects(path)

    read = lambda: _typed(objects(), format, name, unread, table=ending in TABLE_ENDINGS)
    size, digest = paths.size_of(path), lambda: paths.digest_of(path)
    return Source(name, format, read, digest, size=size, unread=unread)


def _python_source(name: str, format: str) -> Source:
    split, part = python_docs.chosen(name)
    if format not in ("auto", "text", "plain"):
        raise DataError(f"{name}: holds plain text: format must be auto or text, got {format!r}")

    def read() -> RecordStream:
        for line, document in enumerate(python_docs.documents(split, part), start=1):
            yield Record("text", (document,), line)

    return Source(name, "text", read, lambda: python_docs.digest(split, part))


def _text_source(path: File, name: str, format: str) -> Source:
    if format == "auto":
        format = "plain"
    if format not in TEXT_FORMATS:
        raise DataError(
            f"{name}: a text file is read as {' or '.join(TEXT_FORMATS)}, got format {format!r}; "
            "records of other kinds go into .jsonl or .parquet files"
        )
    paragraphs = format == "paragraphs"
    read, digest = lambda: _documents(path, paragraphs), lambda: paths.digest_of(path)
    return Source(name, format, read, digest, size=paths.size_of(path))


def _typed(
    objects: Iterable[tuple[int, Any] | Rejected],
    format: str,
    name: str,
    unread: set[str],
    table: bool,
) -> RecordStream:
    """Turns objects into records of one kind; `auto` takes that of the first object with one."""
    kind, first = (None, 0) if format == "auto" else (format, 0)
    for item in objects:
        if isinstance(item, Rejected):
            yield item
            continue
        line, value = item
        known = kind is not None and isinstance(value, dict) and has_fields(value, kind)
        found = kinds_of(value) if isinstance(value, dict) and not known else []
        if kind is None:
            if len(found) > 1:
                raise DataError(
                    f"{name}:{line}: the record has the fields of {' and '.join(found)}: say which "
                    "one to use with `format`"
                )
            if not found:
                null = table and not value
                yield Rejected(line, Empty("empty: null")) if null else _no_kind(value, line)
                continue
            kind, first = found[0], line
        elif first and found and kind not in found:
            raise DataError(
                f"{name}:{line}: mixed kinds of records: line {first} is {kind!r}, line {line} is "
                f"{found[0]!r}: split the file, or set `format: {kind}` to leave the others out"
            )
        yield parse(value, kind, line, unread, table)


def _no_kind(value: Any, line: int) -> Rejected:
    if not isinstance(value, dict):
        return Rejected(line, f"not an object: got {type(value).__name__}")
    need = (
        "`text`, `messages`, `prompt` and `completion`, `conversations`, or `instruction` and "
        "`output`"
    )
    return Rejected(line, f"missing field: expected {need}; found {names_of(value)}")


def _documents(path: File, paragraphs: bool) -> RecordStream:
    """The texts of a file; long ones in several records, which know whether they open or close."""
    held: tuple[int, int, bytes] | None = None
    opens = True
    with files.opened(path) as file:
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
    """(document, first line, bytes): whole lines, about PIECE_BYTES of one document at most."""
    held: list[bytes] = []
    document, size, whole, start = 0, 0, 0, 1
    for number, data in lines(file):
        if data is None:
            yield too_large(number)
            continue
        blank = paragraphs and not data.strip()
        if not blank:
            start = start if held else number
            held.append(data)
            # What is not seen does not move the cuts: a copy with other line ends has the same.
            size += len(b"".join(data.split()))
            whole += len(data) + 1
        if held and (blank or size >= files.PIECE_BYTES or whole >= 8 * files.PIECE_BYTES):
            yield document, start, b"\n".join(held)
            held, size, whole = [], 0, 0
        document += blank
    if held:
        yield document, start, b"\n".join(held)


def _piece(chunk: tuple[int, int, bytes], opens: bool, closes: bool) -> Record | Rejected:
    _, line, data = chunk
    text = decode(data if closes else data + b"\n", line)
    if isinstance(text, Rejected):
        return text
    problem = text_problem(text)
    if problem:
        return Rejected(line, problem)
    if opens and closes and not text.strip():
        return Rejected(line, Empty("empty: no text"))
    return Record("text", (text,), line, opens=opens, closes=closes)
