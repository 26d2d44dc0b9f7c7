"""What a folder says of itself: facts, and a checksum of every file, so that damage is seen."""

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

from jaxdistill.errors import CorruptCheckpointError

NAME = "manifest.json"
_BLOCK = 1 << 18


def seal(folder: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of a finished folder, and forces all of it to the disk.

    Args:
      folder: nothing in it may change from now on.
      facts: anything JSON can hold.
    """
    content = {**facts, "files": _files(folder)}
    sealed = {"crc32": zlib.crc32(_canonical(content)), "content": content}
    with open(folder / NAME, "w", encoding="utf-8") as file:
        json.dump(sealed, file, indent=1)
    for path in [folder, *folder.rglob("*")]:
        sync(path)


def sync(path: pathlib.Path) -> None:
    """Forces a file's bytes, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The facts of a folder and its `files`, without looking at these.

    Raises:
      CorruptCheckpointError: if the manifest is missing, or is not as it was written.
    """
    try:
        sealed = json.loads((folder / NAME).read_text(encoding="utf-8"))
        intact = sealed["crc32"] == zlib.crc32(_canonical(sealed["content"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{folder / NAME}: cannot be read: {error}") from error
    if not intact:
        raise CorruptCheckpointError(f"{folder / NAME}: damaged: it has another checksum")
    return sealed["content"]


def verify(folder: pathlib.Path) -> dict[str, Any]:
    """Reads every file of a folder against its manifest, and returns that.

    Raises:
      CorruptCheckpointError: naming the first file that is missing, new or changed.
    """
    content = read(folder)
    known = content["files"]
    try:
        found = _files(folder)
    except OSError as error:
        raise CorruptCheckpointError(f"{folder}: cannot be read: {error}") from error
    for name in sorted(known.keys() | found.keys()):
        if known.get(name) != found.get(name):
            state = "missing" if name not in found else "new" if name not in known else "changed"
            raise CorruptCheckpointError(f"{folder}: damaged: {name} is {state} since it was saved")
    return content


def _files(folder: pathlib.Path) -> dict[str, dict[str, int]]:
    """Name -> bytes and CRC-32, which tells every change of up to 32 bits in a row for certain."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / NAME]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = list(pool.map(_sum, paths))
    names = (path.relative_to(folder).as_posix() for path in paths)
    return dict(zip(names, sums, strict=True))


def _sum(path: pathlib.Path) -> dict[str, int]:
    size = crc = 0
    block = memoryview(bytearray(_BLOCK))  # once: a new one each time costs as much as a sum
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            size, crc = size + count, zlib.crc32(block[:count], crc)
    return {"bytes": size, "crc32": crc}


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
