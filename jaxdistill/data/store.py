"""Tokenised data on disk: flat arrays written as a stream, read back memory-mapped and verified."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.errors import DamagedError, StorageError
from jaxdistill.safe import manifest

ARRAYS = {
    "tokens": np.dtype(np.int32),  # [N], all documents, one after the other
    "loss": np.dtype(np.bool_),  # [N], whether the token counts as a target
    "documents": np.dtype(np.int64),  # [D + 1], where each document begins
    "segments": np.dtype(np.int64),  # [S, 2], start and length, sorted by row
    "rows": np.dtype(np.int64),  # [R + 1], which segments are in a row
    "records": np.dtype(np.uint64),  # [K], hashes of the records that were used
}
QUARANTINE = "quarantine.jsonl"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write into one that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror or error}: free space there, or set "
            "another folder"
        ) from error


class ArrayWriter:
    """A .npy file whose length is known only when it is finished."""

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...] = ()):
        """Creates the file."""
        self._path, self._dtype, self._row_shape, self._count = path, dtype, row_shape, 0
        with writing(path):
            self._file = path.open("wb")
            self._header()
        self._header_size = self._file.tell()

    def append(self, values: np.ndarray) -> None:
        """Adds rows at the end."""
        assert values.dtype == self._dtype and values.shape[1:] == self._row_shape
        with writing(self._path):
            self._file.write(np.ascontiguousarray(values).data)
        self._count += len(values)

    def finish(self) -> None:
        """Writes the true length into the header and closes."""
        with writing(self._path):
            self._file.seek(0)
            self._header()
            # NumPy pads the header so that the first dim can grow in place.
            assert self._file.tell() == self._header_size
            self._file.close()

    def close(self) -> None:
        """Closes a file that will not be finished."""
        self._file.close()

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._count, *self._row_shape),
            },
        )


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the final one; it takes the final one's place if all went well.

    Another process may finish the same data first: then its folder stays and ours is dropped.
    """
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:12]}")
    with writing(folder.parent):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with writing(folder):
            if folder.exists() and problem(folder) is None:
                return
            if folder.exists():
                damaged = temporary.with_name(f"{temporary.name}-damaged")
                os.replace(folder, damaged)
                shutil.rmtree(damaged, ignore_errors=True)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of a folder that is complete."""
    with writing(folder):
        manifest.seal(folder, facts)


def problem(folder: Path) -> str | None:
    """What is wrong with a folder, a file missing or of other size or content; or None."""
    try:
        manifest.verify(folder)
    except DamagedError as error:
        return str(error)
    return None


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder, memory-mapped."""
    return {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS
    }
