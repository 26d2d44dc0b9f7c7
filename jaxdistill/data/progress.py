"""How far a build of data has come, noted beside its files: a killed build resumes there."""

import collections
import dataclasses
import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxdistill.data import store
from jaxdistill.data.tally import Tally
from jaxdistill.errors import UserError
from jaxdistill.safe import json_file

FILE = "progress.json"
_VERSION = 3
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class BuildProgress:
    """What a build knows of the records behind it, beside what is in its files.

    Attributes:
      items: records of the source that is read, good and bad, that are done.
      kind: of all records, once one was seen.
      first: the number of the source of that one, and its line.
      records: of all sources, good and bad.
      begun: (records, documents, tokens) that were written before each source that was begun.
      tally: what was counted of them for notices.
      left_out: records that were left out, by reason.
      teachers: names of several teachers, as records have them.
      unread: names of fields that were met and not read.
    """

    items: int = 0
    kind: str | None = None
    first: tuple[int, int] = (0, 0)
    records: int = 0
    begun: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    tally: Tally = dataclasses.field(default_factory=Tally)
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    teachers: list[str] = dataclasses.field(default_factory=list)
    unread: set[str] = dataclasses.field(default_factory=set)


class Files:
    """The files of a build, which grow together.

    Args:
      folder: where.
      parts: the arrays of `store` that are written, by name.
      marks: what is kept of each, by its name; without it they begin anew.
    """

    def __init__(
        self, folder: Path, parts: Mapping[str, store.Spec], marks: Mapping[str, store.Mark]
    ):
        self._folder = folder
        self.arrays = {
            part: store.ArrayWriter(_array(folder, part), *spec, marks.get(part))
            for part, spec in parts.items()
        }
        path = folder / store.QUARANTINE
        self.quarantine = store.Appender(path, mark=marks.get(store.QUARANTINE))

    def append(self, part: str, values: np.ndarray) -> None:
        """Adds rows to an array."""
        self.arrays[part].append(values)

    def marks(self) -> dict[str, store.Mark]:
        """How far each file is."""
        marks = {part: writer.mark() for part, writer in self.arrays.items()}
        return {**marks, store.QUARANTINE: self.quarantine.mark()}

    def finish(self) -> None:
        """Completes the files, and removes the note of how far they were."""
        for file in (*self.arrays.values(), self.quarantine):
            file.finish()
        with store.writing(self._folder):
            (self._folder / FILE).unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the files, finished or not."""
        for file in (*self.arrays.values(), self.quarantine):
            file.close()


def _array(folder: Path, part: str) -> Path:
    return folder / f"{part}.npy"


def begin(
    folder: Path, identity: str, parts: Mapping[str, store.Spec]
) -> tuple[BuildProgress, Files]:
    """Where a killed build of the same data was, and its files; or the beginning.

    Args:
      folder: empty, or what the killed build was filling.
      identity: the fingerprint of the data.
      parts: the arrays of `store` that are written.

    Raises:
      StorageError: if the folder cannot be written.
    """
    progress = _read(folder, identity, parts)
    if progress:
        return progress[0], Files(folder, parts, progress[1])
    with store.writing(folder):
        if any(folder.iterdir()):
            _log.info("what a killed build left cannot be resumed: begun anew")
            shutil.rmtree(folder)
            folder.mkdir()
    return BuildProgress(), Files(folder, parts, {})


def write(folder: Path, identity: str, progress: BuildProgress, files: Files) -> None:
    """Notes how far a build is; what it has written is the system's already.

    Not forced to the disk, which would cost more than the note saves: where a power cut keeps the
    note and loses what it speaks of, the checksums differ.
    """
    content = {
        "version": _VERSION,
        "identity": identity,
        "marks": files.marks(),
        "progress": vars(progress)
        | {"unread": sorted(progress.unread), "tally": progress.tally.to_json()},
    }
    text = json.dumps(content)
    temporary = folder / f"{FILE}.tmp"
    with store.writing(folder):
        temporary.write_text(
            f'{{"crc32": {zlib.crc32(text.encode())}, "content": {text}}}', encoding="utf-8"
        )
        os.replace(temporary, folder / FILE)


def _read(
    folder: Path, identity: str, parts: Mapping[str, store.Spec]
) -> tuple[BuildProgress, dict[str, store.Mark]] | None:
    """What a killed build noted, if it was of this data and its files hold it; or None."""
    try:
        note = json_file.read(folder / FILE, {"crc32": int, "content": dict})
        content = note["content"]
        if note["crc32"] != zlib.crc32(json.dumps(content).encode()):
            return None
        if (content["version"], content["identity"]) != (_VERSION, identity):
            return None
        marks = {name: (size, crc) for name, (size, crc) in content["marks"].items()}
        places = {
            part: (_array(folder, part), len(store.npy_header(*spec)))
            for part, spec in parts.items()
        }
        places[store.QUARANTINE] = folder / store.QUARANTINE, 0
        if not all(store.holds(*places[name], mark) for name, mark in marks.items()):
            return None
    except (UserError, OSError):
        return None
    facts = content["progress"]  # a sound note is one that we wrote
    facts["left_out"] = collections.Counter(facts["left_out"])
    facts["begun"] = [tuple(before) for before in facts["begun"]]
    facts["first"] = tuple(facts["first"])
    facts["unread"] = set(facts["unread"])
    facts["tally"] = Tally.from_json(facts["tally"])
    return BuildProgress(**facts), marks
