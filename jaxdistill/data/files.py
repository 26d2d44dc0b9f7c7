"""Objects and lines out of files: JSON in lines or one list, tables of text, compressed or not."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from jaxdistill.data.paths import File, ending_of
from jaxdistill.data.records import NumberedObjects, Rejected
from jaxdistill.data.rules import MARKS, MAX_RECORD_BYTES
from jaxdistill.errors import DataError

# A long text is read in pieces of about this size, so that memory does not grow with the file.
PIECE_BYTES = 250_000
_BOM = b"\xef\xbb\xbf"
# The longest first: UTF-32's mark begins with UTF-16's.
_WIDE = ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"),
         (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))  # fmt: skip
_LOOKED_AT = 256
_BLANKS = " \t\r\n"
_MAGIC = ((b"\x1f\x8b", ".gz"), (b"BZh91AY&SY", ".bz2"), (b"\xfd7zXZ\x00", ".xz"),
          (b"\x28\xb5\x2f\xfd", ".zst"), (b"PK\x03\x04", ".zip"))  # fmt: skip
# Cells that hold JSON, because a table of text has no lists.
_JSON_CELLS = ("messages", "conversations", "tools", "history", "chat_template_kwargs")
_TURN_CELLS = ("prompt", "completion")  # texts, or lists of turns
_YES_NO = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


@contextlib.contextmanager
def opened(path: File) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed.

    Raises:
      DataError: if it is not UTF-8 but UTF-16 or UTF-32, or its compression is damaged, or is not
        that of its ending.
    """
    try:
        with path.open("rb") as packed, _decompressed(path, packed) as file:
            start = file.peek(_LOOKED_AT)[:_LOOKED_AT]
            other = next((ending for magic, ending in _MAGIC if start.startswith(magic)), None)
            if other:
                remedy = "unpack it" if other == ".zip" else f"call it {path.name}{other}"
                raise DataError(f"{path}: holds {other} data under another ending: {remedy}")
            wide = _wide(start)
            if wide:
                raise DataError(
                    f"{path}: is written in {wide}, not in UTF-8: iconv -f {wide} -t UTF-8 "
                    f"'{path}' > utf8{ending_of(path)} makes a file that can be read"
                )
            yield cast(BinaryIO, file)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path}: its compression is damaged: {error}: write it again") from error


def _decompressed(path: File, packed: io.BufferedReader) -> Any:
    ending = path.suffix.lower()
    if ending == ".zst":
        return _zstandard(path, packed)
    open_with = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(ending)
    return contextlib.nullcontext(packed) if open_with is None else open_with(packed, "rb")


def _zstandard(path: File, packed: io.BufferedReader) -> io.BufferedReader:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: reading .zst needs pyarrow: pip install 'jaxdistill[parquet]', or compress "
            "it as .gz"
        ) from None
    return io.BufferedReader(pyarrow.input_stream(packed, compression="zstd"), 1 << 20)


def _wide(start: bytes) -> str | None:
    """What text with more than one byte to a letter is called, or None."""
    for mark, name in _WIDE:
        if start.startswith(mark):
            return name
    even, odd = start[::2].count(0), start[1::2].count(0)
    # English in UTF-16 has a zero at every second place, and none at the others.
    half = len(start) // 2
    return "UTF-16" if half >= 8 and max(even, odd) > 0.8 * half and not min(even, odd) else None


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
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


def too_large(line: int) -> Rejected:
    """Why a line is left out."""
    return Rejected(line, f"too large: more than {MAX_RECORD_BYTES // 1_000_000} MB in one line")


def decode(data: bytes, line: int) -> str | Rejected:
    """The text of a line's bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(line, f"invalid UTF-8 at byte {error.start}")


def jsonl_objects(path: File) -> NumberedObjects:
    """One object a line."""
    with opened(path) as file:
        yield from _object_lines(file)


def _object_lines(file: BinaryIO) -> NumberedObjects:
    for number, data in lines(file):
        if data is None:
            yield too_large(number)
            continue
        text = decode(data, number)
        if isinstance(text, Rejected):
            yield text
            continue
        # Lines of white space are not records: files end with one, and editors leave them.
        if text[:1] in _BLANKS and not text.strip(_BLANKS):
            continue
        try:
            value = json.loads(text)
        except RecursionError:
            yield Rejected(number, "bad JSON: nested too deeply")
        except ValueError as error:
            yield Rejected(number, f"bad JSON: {str(error)[:200]}")
        else:
            yield number, value


def json_objects(path: File) -> NumberedObjects:
    """The objects of one JSON list, numbered from 1; a .json file of lines is read as lines.

    Raises:
      DataError: if the list is not closed or no JSON, more stands behind it, or the file is one
        object.
    """
    with opened(path) as file:
        start = file.peek(1 << 16).removeprefix(_BOM).lstrip()  # pyrefly: ignore
        if start[:1] == b"[":
            yield from _list_objects(file, path)
            return
        first, broken, _ = start.partition(b"\n")
        if first[:1] == b"{" and broken and not first.rstrip().endswith(b"}"):
            raise DataError(
                f"{path}: is one JSON object over several lines: write the list of records in it "
                "as [{...}, ...], or one record a line"
            )
        yield from _object_lines(file)


def _list_objects(file: BinaryIO, path: File) -> NumberedObjects:
    """Streams the values of a JSON list: at most about one record more than needed is in memory."""
    reader = io.TextIOWrapper(file, encoding="utf-8-sig")
    decoder, number, ended = json.JSONDecoder(), 0, False
    try:
        text, at = reader.read(PIECE_BYTES).lstrip(), 1
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if text[at : at + 1] == "]":
                if not _ends(text[at + 1 :], reader):
                    raise DataError(
                        f"{path}: more stands behind the list of {number} records: put all records "
                        "into one list, or one on each line"
                    )
                return
            try:
                value, end = decoder.raw_decode(text, at)
                whole = end < len(text)
            except ValueError as error:
                value, end, whole = error, at, False
            if whole:
                number, at = number + 1, end
                yield number, value
                continue
            if ended or len(text) - at > 2 * MAX_RECORD_BYTES:
                bad = isinstance(value, ValueError)
                reason = str(value)[:200] if bad else "the list is not closed"
                raise DataError(f"{path}: bad JSON behind record {number + (not bad)}: {reason}")
            # As much again as is left, so that a long record is not tried at every piece.
            more = reader.read(max(PIECE_BYTES, len(text) - at))
            text, at, ended = text[at:] + more, 0, not more
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: invalid UTF-8 behind record {number}") from error
    except RecursionError:
        raise DataError(f"{path}: record {number + 1} is nested too deeply") from None
    finally:
        reader.detach()


def _ends(text: str, reader: io.TextIOWrapper) -> bool:
    """Whether nothing but white space is left."""
    while not text.strip():
        text = reader.read(PIECE_BYTES)
        if not text:
            return True
    return False


def csv_objects(path: File) -> NumberedObjects:
    """The rows of a table of text; its first row names the fields.

    Raises:
      DataError: if that row is missing or names a field twice, or a quote is not closed.
    """
    delimiter = "\t" if ending_of(path) == ".tsv" else ","
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    with opened(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names) or not any(names):
                raise DataError(f"{path}: its first row must name the fields, each once")
            for row in reader:
                if row:
                    yield _row(names, row, reader.line_num)
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.line_num}: is not a readable table: {error}"
            ) from error
        finally:
            text.detach()


def _row(names: list[str], row: list[str], line: int) -> tuple[int, Any] | Rejected:
    if len(row) != len(names):
        return Rejected(line, f"has {len(row)} cells, but the first row names {len(names)} fields")
    value: dict[str, Any] = {}
    for name, cell in zip(names, row, strict=True):
        if any("\ud800" <= character <= "\udfff" for character in cell):
            return Rejected(line, "invalid UTF-8")
        if name in _JSON_CELLS and cell:
            try:
                value[name] = json.loads(cell)
            except (ValueError, RecursionError) as error:
                return Rejected(line, f"field `{name}` is no JSON: {str(error)[:200]}")
        elif name in _TURN_CELLS:
            value[name] = _turns(cell)
        elif name in MARKS:
            value[name] = _YES_NO.get(cell.strip().lower(), cell) if cell else None
        else:
            value[name] = cell
    return line, value


def _turns(cell: str) -> Any:
    """The turns that a cell holds as JSON; the cell where it holds a text, JSON or not."""
    if not cell.lstrip().startswith("[") or '"role"' not in cell:
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    turns = isinstance(value, list) and all(
        isinstance(turn, dict) and "role" in turn and "content" in turn for turn in value
    )
    return value if turns and value else cell
