"""What was decided once and would not come again: lines on the disk before an update learns."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.data import store
from jaxdistill.errors import StorageError
from jaxdistill.rollouts.answers import Answer
from jaxdistill.safe import json_file

_log = logging.getLogger(__name__)
NAME = "answers"  # of a line: the hash of what it is about


class Decisions:
    """A file with a line of JSON for each decision, found by the answers that it is about.

    Of two lines about the same answers the later one holds. What a kill or damage left is no
    decision: `find` does not see it.

    Args:
      path: the file, which one process writes.
      read: the fields of a line -> what it says; ValueError where that is no decision.
    """

    def __init__(self, path: Path, read: Callable[[dict[str, Any]], Any]):
        self._path, self._read = path, read
        # Of a long run only the places are kept: what it decided would fill the memory.
        self._places: dict[str, int] | None = None

    def find(self, name: str) -> Any:
        """What was decided about answers of a hash; None: nothing was.

        Raises:
          StorageError: where the file cannot be read.
        """
        places = self._known()
        if name not in places:
            return None
        _, found, said = next(self._lines(places[name]), (0, "", None))
        return said if found == name else None

    def add(self, name: str, fields: Mapping[str, Any]) -> None:
        """Writes a decision down; it is on the disk when this returns.

        Raises:
          StorageError: where it cannot be written.
        """
        self._known()[name] = _append(self._path, {NAME: name, **fields})

    def _known(self) -> dict[str, int]:
        """The place of each decision; lines that are none are reported when they are first met."""
        if self._places is None:
            damaged: list[int] = []
            self._places = {one: place for place, one, _ in self._lines(0, damaged)}
            if damaged:
                _log.warning(
                    "%s: %d lines are damaged, the first at byte %d: their answers are judged "
                    "again if they are asked for",
                    self._path,
                    len(damaged),
                    damaged[0],
                )
        return self._places

    def _lines(
        self, place: int, damaged: list[int] | None = None
    ) -> Iterator[tuple[int, str, Any]]:
        """(place, hash, what was decided) of the file's lines from a place on.

        The places of whole lines that are no decision go to `damaged`; a line that a kill cut short
        is none.
        """
        if not self._path.exists():
            return
        try:
            if not self._path.is_file():
                raise OSError("it is no regular file")
            with self._path.open("rb") as file:
                file.seek(place)
                while line := file.readline(json_file.MAX_BYTES):
                    try:
                        record = json_file.parse(line)
                        json_file.check(record, {NAME: str})
                        said = self._read(record)
                    except ValueError:
                        if damaged is not None and line.endswith(b"\n"):
                            damaged.append(place)
                    else:
                        yield place, record[NAME], said
                    place = file.tell()
        except OSError as error:
            raise StorageError(
                f"{self._path}: cannot be read: {error.strerror or error}: make it readable"
            ) from error


def hash_of(answers: Sequence[Answer], *, of: str = "", notes: bool = False) -> str:
    """A hash of prompts and answers.

    Args:
      answers: what is decided about.
      of: whatever else it depends on.
      notes: whether it depends on the notes of the prompts.
    """
    digest = hashlib.blake2b(of.encode(), digest_size=16)
    for one in answers:
        for ids in (one.prompt.tokens, one.tokens):
            digest.update(len(ids).to_bytes(8, "big") + ids.astype("<i4").tobytes())
        if notes:
            digest.update(json.dumps(dict(one.prompt.notes), sort_keys=True).encode())
    return digest.hexdigest()


def _append(path: Path, record: dict[str, Any]) -> int:
    """Adds a line behind whatever is there, on the disk when it returns; its place."""
    with store.writing(path), path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        torn = end and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        return end + bool(torn)
