"""Checksums of the model folders that we write: damage is found when such a folder is read."""

import pathlib

import jax

from jaxdistill.errors import DamagedError
from jaxdistill.safe import manifest

FILE = "jaxdistill.json"


def seal(folder: pathlib.Path) -> None:
    """Writes the checksums of a folder that is complete, and forces all of it to the disk."""
    manifest.seal(folder, {}, FILE)


def check(folder: pathlib.Path, *, weights: bool, shared: bool = False) -> None:
    """Reads a folder against its checksums, where it has some; other tools write none.

    Files that were added later are no damage.

    Args:
      folder: of a model.
      weights: also the weights, which are read once more for it; else the small files alone.
      shared: whether all processes call this together, so that each reads a part.

    Raises:
      DamagedError: naming the file, and how to go on where it was changed on purpose.
    """
    if not (folder / FILE).exists():
        return
    part, parts = (jax.process_index(), jax.process_count()) if shared else (0, 1)
    wanted = lambda name: weights or not name.endswith(".safetensors")
    try:
        manifest.verify(folder, part, parts, name=FILE, wanted=wanted, alone=False)
    except DamagedError as error:
        raise DamagedError(
            f"{error}: write the folder again; if you changed it on purpose, remove {FILE} from it"
        ) from error


def same(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two sealed folders hold the same, and the second is as it was written."""
    try:
        return manifest.read(one, FILE)["files"] == manifest.verify(other, name=FILE)["files"]
    except DamagedError:
        return False
