"""A checksum of every file in a folder: what was written is what is read, or an error says so."""

import json
import os
import pathlib
import zlib

from jaxdistill.errors import CorruptCheckpointError

NAME = "digests.json"
_BLOCK = 1 << 20


def write(folder: pathlib.Path) -> None:
    """Writes the CRC-32 of every file below a folder to its digests.json, whole or not at all."""
    temporary = folder / (NAME + ".tmp")
    with open(temporary, "w") as file:
        json.dump(_digests(folder), file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)


def verify(folder: pathlib.Path) -> bool:
    """Reads every file of a folder against its digests.json; False if it has none.

    A process killed between the end of a save and `write` leaves a whole folder without one.

    Raises:
      CorruptCheckpointError: naming the first file that is missing, new or changed.
    """
    try:
        known = json.loads((folder / NAME).read_text())
        found = _digests(folder)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{folder}: cannot be read: {error}") from error
    for name in sorted(known.keys() | found.keys()):
        if known.get(name) != found.get(name):
            state = "missing" if name not in found else "new" if name not in known else "changed"
            raise CorruptCheckpointError(
                f"{folder}: damaged: {name} is {state} since it was written; use another checkpoint"
            )
    return True


def _digests(folder: pathlib.Path) -> dict[str, int]:
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (NAME, NAME + ".tmp"):
            crc = 0
            with open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    crc = zlib.crc32(block, crc)
            digests[path.relative_to(folder).as_posix()] = crc
    return digests
