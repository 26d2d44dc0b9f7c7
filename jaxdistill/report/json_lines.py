"""JSON-lines files that a kill or a full disk leaves whole: records appended, cut and read."""

import json
import math
import numbers
import os
import pathlib
import typing
from collections.abc import Mapping

from jaxdistill.safe import strict_json
from jaxdistill.train.hooks import NO_HOOKS, Hooks

# A link in a run directory, planted or stale, must not direct writes to a file elsewhere.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


class JsonLinesWriter:
    """A file that grows by whole records, written at once without a buffer of its own."""

    def __init__(self, path: pathlib.Path, hooks: Hooks = NO_HOOKS):
        self._hooks = hooks
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NOFOLLOW, 0o644)
        self._end = os.fstat(self._file).st_size

    def append(self, record: bytes) -> None:
        """Adds a record, all of it or nothing.

        Raises:
          OSError: it cannot be written.
        """
        self._hooks.at("metrics.append")
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
                self._hooks.at("metrics.appended")
        except OSError:
            # Half a record would spoil the next one: take it back, which needs no space.
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(record)

    def sync(self) -> None:
        """Forces what was appended to the disk."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        """Ends it; calling it again does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def scan(path: pathlib.Path) -> tuple[list[dict], list[int]]:
    """All records of a JSON-lines file, and the numbers of the lines that are damaged.

    A last line without its line end is still being written, which is no damage.
    """
    records, damaged = [], []
    if not path.exists():
        return records, damaged
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, start=1):
            record = _parse(line)
            if record is not None:
                records.append(record)
            elif line.endswith(b"\n") and line.strip():
                damaged.append(line_number)
    return records, damaged


def _parse(line: bytes) -> dict | None:
    """The record on a line, or None where there is no whole one; null for what is no number."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = strict_json.loads(line, nonfinite=True)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def cut(path: pathlib.Path, last_step: int | None, hooks: Hooks = NO_HOOKS) -> list[int]:
    """Removes the torn last line of a file, and records after `last_step` when one is given.

    A damaged line is not lost: it goes to `aside(path)`. Damaged is what is no record, and with
    `last_step` also what has no step, or a later one than a record that follows.

    Returns:
      the numbers of the lines that were put aside.

    Raises:
      OSError: it cannot be read or written; then nothing is removed.
    """
    if not os.path.lexists(path):
        return []
    hooks.at("metrics.cut")
    with open(os.open(path, os.O_RDWR | _NOFOLLOW), "r+b") as file:
        lines = file.readlines()
        keeps, damaged = _sorted(lines, last_step)
        kept = [line for line, keep in zip(lines, keeps, strict=True) if keep]
        if damaged:
            _put_aside(path, [lines[number - 1] for number in damaged])
        if keeps == sorted(keeps, reverse=True):
            # Cutting the end off needs no space and cannot be interrupted half-way.
            file.truncate(sum(map(len, kept)))
            return damaged
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return damaged


def aside(path: pathlib.Path) -> pathlib.Path:
    """Where the damaged lines of a file are kept."""
    return path.with_suffix(".damaged.jsonl")


def _sorted(lines: list[bytes], last_step: int | None) -> tuple[list[bool], list[int]]:
    """Which lines stay, and the numbers of those that are damaged."""
    records = [_parse(line) for line in lines]
    keeps = [
        record is not None and (last_step is None or _until(record, last_step))
        for record in records
    ]
    last_kept = max((place for place, keep in enumerate(keeps) if keep), default=-1)
    damaged = []
    for place, (line, record) in enumerate(zip(lines, records, strict=True)):
        whole = line.endswith(b"\n") and line.strip()
        later = record is not None and isinstance(record.get("step"), int) and place > last_kept
        if whole and not keeps[place] and not later:
            damaged.append(place + 1)
    return keeps, damaged


def _put_aside(path: pathlib.Path, lines: list[bytes]) -> None:
    """Keeps lines, on the disk before they go from where they were."""
    place = os.open(aside(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NOFOLLOW, 0o644)
    with open(place, "ab") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def _until(record: dict, last_step: int) -> bool:
    return isinstance(record.get("step"), int) and record["step"] <= last_step


def encoded(record: dict) -> bytes:
    """The line of a record."""
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def safe(value: typing.Any) -> typing.Any:
    """The value as JSON can hold it: null for numbers that are not finite, text for objects."""
    if isinstance(value, Mapping):
        return {str(key): safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [safe(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)
