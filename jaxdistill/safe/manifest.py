"""What a folder says of itself: facts, and checksums of every file, so that damage is seen."""

import concurrent.futures
import json
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from isal import isal_zlib  # zlib's CRC-32, in the processor's own instructions

from jaxdistill.errors import DamagedError
from jaxdistill.safe import json_file

NAME = "manifest.json"
BLOCK = 1 << 25  # bytes that have a checksum of their own: cores, and processes, share a file
_WAITS = (1.0, 5.0)  # seconds before a read that failed is tried again
_PIECE = 1 << 20  # bytes read at a time, small enough to be summed in a core's cache


def seal(
    folder: pathlib.Path, facts: Mapping[str, Any], name: str = NAME, block: int | None = None
) -> None:
    """Writes the manifest of a finished folder, and forces all of it to the disk.

    Args:
      folder: nothing in it may change from now on.
      facts: anything JSON can hold.
      name: of the manifest's file.
      block: bytes that have a checksum of their own; None: `BLOCK`.
    """
    manifest, block = name, block or BLOCK
    sizes = _sizes(folder, manifest)
    files = {name: {"bytes": size, "crc32": []} for name, size in sizes.items()}
    blocks = _blocks(files, block)
    for (name, _), crc in zip(blocks, _sums(folder, blocks, block), strict=True):
        files[name]["crc32"].append(crc)
    content = {**facts, "block": block, "files": files}
    sealed = {"crc32": zlib.crc32(_canonical(content)), "content": content}
    with open(folder / manifest, "w", encoding="utf-8") as file:
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


def read(folder: pathlib.Path, name: str = NAME) -> dict[str, Any]:
    """The facts of a folder and its `files`, without looking at these.

    Raises:
      DamagedError: if the manifest is missing, or is not as it was written.
    """
    path = folder / name
    sealed = json_file.read(path, {"crc32": int, "content": dict})
    if sealed["crc32"] != zlib.crc32(_canonical(sealed["content"])):
        raise DamagedError(f"{path}: damaged: it has another checksum")
    if not isinstance(sealed["content"].get("files"), dict):
        raise DamagedError(f"{path}: damaged: is no manifest")
    return sealed["content"]


def verify(
    folder: pathlib.Path,
    part: int = 0,
    parts: int = 1,
    *,
    name: str = NAME,
    wanted: Callable[[str], bool] = lambda name: True,
    alone: bool = True,
) -> dict[str, Any]:
    """Reads the files of a folder against its manifest, and returns that.

    Args:
      folder: a sealed one.
      part: of several processes that share the reading, which one this is; each sees all names and
        sizes, and every `parts`-th block.
      parts: how many they are.
      name: of the manifest's file.
      wanted: which of its files are looked at, by name.
      alone: whether a file that the manifest does not name is damage.

    Raises:
      DamagedError: naming the first file that is missing, new or changed, and where.
    """
    content = read(folder, name)
    files, block = _known(content)
    files = {file: facts for file, facts in files.items() if wanted(file)}
    try:
        sizes = {file: size for file, size in _sizes(folder, name).items() if wanted(file)}
        if not alone:
            sizes = {file: size for file, size in sizes.items() if file in files}
        _check_names(folder, {file: facts["bytes"] for file, facts in files.items()}, sizes)
        own = _blocks(files, block)[part::parts]
        sums = _patiently(lambda: _sums(folder, own, block))
    except OSError as error:
        raise DamagedError(f"{folder}: cannot be read: {error}") from error
    for (file, start), crc in zip(own, sums, strict=True):
        if crc != files[file]["crc32"][start // block]:
            end = min(start + block, sizes[file])
            raise DamagedError(
                f"{folder}: damaged: {file} is changed since it was saved, "
                f"in bytes {start} to {end}"
            )
    return content


def _known(content: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The files of a manifest and the size of a block; before blocks, a file was one."""
    files = content["files"]
    if "block" in content:
        return files, content["block"]
    whole = {name: {**file, "crc32": [file["crc32"]]} for name, file in files.items()}
    return whole, max((file["bytes"] for file in files.values()), default=1) + 1


def _check_names(folder: pathlib.Path, known: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Raises where a file is missing, new or of another size."""
    for name in sorted(known.keys() | found.keys()):
        if known.get(name) == found.get(name):
            continue
        state = "missing" if name not in found else "new" if name not in known else "changed"
        sizes = f": {found[name]} bytes, not {known[name]}" if state == "changed" else ""
        raise DamagedError(f"{folder}: damaged: {name} is {state} since it was saved{sizes}")


def _sizes(folder: pathlib.Path, manifest: str) -> dict[str, int]:
    """Name -> bytes of all files but the manifest, in the order of names."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / manifest]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _blocks(files: Mapping[str, Mapping[str, Any]], block: int) -> list[tuple[str, int]]:
    """Every block of every file, by name and first byte; an empty file has none."""
    starts = lambda name: range(0, files[name]["bytes"], block)
    return [(name, start) for name in files for start in starts(name)]


def _sums(folder: pathlib.Path, blocks: Sequence[tuple[str, int]], block: int) -> list[int]:
    """CRC-32 of blocks: each tells every change of up to 32 bits in a row for certain."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda one: _sum(folder / one[0], one[1], block), blocks))


def _patiently(read: Callable[[], list[int]]) -> list[int]:
    """What is read; what fails is tried twice more: the hiccup of a network disk is no damage."""
    for seconds in _WAITS:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(seconds)
    return read()


def _sum(path: pathlib.Path, start: int, count: int) -> int:
    crc = 0
    piece = memoryview(bytearray(_PIECE))  # once: a new one each time costs as much as a sum
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while count and (got := file.readinto(piece[: min(_PIECE, count)])):
            count, crc = count - got, isal_zlib.crc32(piece[:got], crc)
    return crc


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
