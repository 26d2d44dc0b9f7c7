"""Hashes of large files, kept beside the built data: read once, known by their times afterwards."""

import contextlib
import contextvars
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.safe import json_file, whole_file

FILE = "digests.json"
_WORTH = 1 << 24  # bytes; a smaller file is read sooner than a list is kept
# Within so many seconds of its last change a file may change again without its times telling it.
_SETTLED = 2.0
_folder: contextvars.ContextVar[Path | None] = contextvars.ContextVar("digests", default=None)


@contextlib.contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Within, what `of` finds of large files is kept in a folder, and taken from there."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def of(path: Path) -> str:
    """The SHA-256 of a file.

    A large file whose size, times of change and inode are those of when it was read is not read
    again. A program that writes into it moves the time of its inode, which no program can set.

    Raises:
      OSError: if it cannot be read.
    """
    folder = _folder.get()
    before = _state(path)
    if folder is None or before[0] < _WORTH:
        return _read(path)
    name = str(path.resolve())
    known = _known(folder).get(name)
    if isinstance(known, list) and known[:-1] == before:
        return str(known[-1])
    settled = max(before[1:3]) / 1e9 + _SETTLED < time.time()
    digest = _read(path)
    if settled and _state(path) == before:
        with contextlib.suppress(OSError):  # a cache that cannot be written is one that is read
            folder.mkdir(parents=True, exist_ok=True)
            content = _known(folder) | {name: [*before, digest]}
            whole_file.write_text(folder / FILE, json.dumps(content, indent=1) + "\n")
    return digest


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _known(folder: Path) -> dict[str, Any]:
    """The list of a folder; nothing where there is none, or it is damaged."""
    try:
        return json_file.read(folder / FILE, missing={})
    except UserError:
        return {}


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
