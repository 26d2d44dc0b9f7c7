"""Tokenised data on disk: which arrays a folder has, and how they are written, as a stream."""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from jaxdistill.errors import DamagedError, StorageError
from jaxdistill.safe import beside, manifest

Mark = tuple[int, int]  # bytes behind a header, and their CRC-32
Spec = tuple[
    np.dtype, tuple[int, ...]
]  # the numbers of an array, and the shape behind the first dim


def _flat(dtype: Any) -> Spec:
    return np.dtype(dtype), ()


# Of a shard: documents as they are, one after the other.
TOKENS: dict[str, Spec] = {
    "tokens": _flat(np.int32),  # [N]; see `ids`
    "loss": _flat(np.bool_),  # [N], whether the token counts as a target; [0]: all of them do
}
DOCUMENTS: dict[str, Spec] = {
    "documents": _flat(np.int64),  # [D + 1], where each document begins
    # [R, 4]: a hash of what each record says, its line, its documents, and whom it names of
    # several teachers, from 1
    "records": (np.dtype(np.int64), (4,)),
}
# Beside them, of documents that are given in the tokens of a second model too.
SECOND_TOKENS: dict[str, Spec] = {
    "groups": _flat(np.int32),  # [N], of each token, counted from 1 in its document; 0 is none
    "second_tokens": _flat(np.int32),  # [M]
    "second_groups": _flat(np.int32),  # [M]
}
SECOND_DOCUMENTS: dict[str, Spec] = {
    "second_documents": _flat(np.int64),  # [D + 1]
    "shortened": _flat(np.bool_),  # [D], whether it is the beginning of a longer one
}
# Of a data set, whose tokens are those of its shards, joined.
ROWS: dict[str, Spec] = {
    "segments": (np.dtype(np.int64), (2,)),  # [S, 2], start and length, sorted by row
    "rows": _flat(np.int64),  # [R + 1], which segments are in a row
    "records": _flat(np.uint64),  # [K], hashes of the records that were used
}
SECOND_ROWS: dict[str, Spec] = {"second_segments": (np.dtype(np.int64), (2,))}  # [S, 2]
ROUTES: dict[str, Spec] = {"row_routes": _flat(np.int32)}  # [R], which teacher teaches, from 1
QUARANTINE = "quarantine.jsonl"
IDS = "ids"  # the fact of a folder that names the numbers of `tokens`
BLOCK = 1 << 16  # bytes with a checksum of their own: what is read to have a row of them


def ids(vocab: int) -> np.dtype:
    """The numbers that tokens are kept in: 16 bits where every id fits."""
    return np.dtype(np.uint16 if vocab <= 1 << 16 else np.int32)


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


class Appender:
    """A file that only grows behind its header, and knows the checksum of what it holds.

    Args:
      path: where.
      header: bytes before what is appended.
      mark: where an earlier writer was; what stands behind it is cut off. None: a new file.
    """

    def __init__(self, path: Path, header: bytes = b"", mark: Mark | None = None):
        self._path, (self.size, self._sum) = path, mark or (0, 0)
        with writing(path):
            self._file = path.open("wb" if mark is None else "r+b")
            if mark is None:
                self._file.write(header)
            else:
                self._file.truncate(len(header) + self.size)
                self._file.seek(0, os.SEEK_END)

    def append(self, data: Any) -> None:
        """Adds bytes at the end."""
        with writing(self._path):
            self._file.write(data)
        self._sum = isal_zlib.crc32(data, self._sum)
        self.size += len(data)

    def mark(self) -> Mark:
        """How far the file is, once all of it is the system's to write."""
        with writing(self._path):
            self._file.flush()
        return self.size, self._sum

    def finish(self, header: bytes = b"") -> None:
        """Writes the header that holds for the whole, and closes."""
        with writing(self._path):
            self._file.seek(0)
            self._file.write(header)
            self._file.close()

    def close(self) -> None:
        """Closes a file that will not be finished."""
        self._file.close()


def holds(path: Path, header: int, mark: Mark) -> bool:
    """Whether a file still holds what was appended up to a mark, behind `header` bytes."""
    with path.open("rb") as file:
        file.seek(header)
        left, found = mark[0], 0
        while left and (data := file.read(min(left, 1 << 20))):
            left, found = left - len(data), isal_zlib.crc32(data, found)
    return not left and found == mark[1]


class ArrayWriter:
    """A .npy file whose length is known only when it is finished.

    Args:
      path: where.
      dtype: of its values.
      row_shape: of what is appended, [n, *row_shape].
      mark: as for `Appender`.
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype,
        row_shape: tuple[int, ...] = (),
        mark: Mark | None = None,
    ):
        self._dtype, self._row_shape = dtype, row_shape
        self._row = dtype.itemsize * math.prod(row_shape)
        self._file = Appender(path, npy_header(dtype, row_shape), mark)
        self.mark, self.close = self._file.mark, self._file.close

    def append(self, values: np.ndarray) -> None:
        """Adds rows at the end."""
        assert values.dtype == self._dtype and values.shape[1:] == self._row_shape
        self._file.append(np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def finish(self) -> None:
        """Writes the true length into the header and closes."""
        self._file.finish(npy_header(self._dtype, self._row_shape, len(self)))

    def __len__(self) -> int:
        return self._file.size // self._row


def write_array(folder: Path, name: str, spec: Spec, values: np.ndarray) -> None:
    """Writes an array whole."""
    writer = ArrayWriter(folder / f"{name}.npy", *spec)
    writer.append(values.astype(spec[0], copy=False))
    writer.finish()


def npy_header(dtype: np.dtype, row_shape: tuple[int, ...], count: int = 0) -> bytes:
    """The header of a .npy file of `count` rows; NumPy pads it so that the first dim can grow."""
    file = io.BytesIO()
    facts = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (count, *row_shape),
    }
    np.lib.format.write_array_header_1_0(file, facts)
    return file.getvalue()


@contextlib.contextmanager
def new_folder(folder: Path, *, resumes: bool) -> Iterator[Path]:
    """A temporary folder beside the final one; it takes the final one's place if all went well.

    Another process may finish the same data first: then its folder stays and ours is dropped. Where
    it resumes, what a killed build of the same data has left is in it; what others have left is
    removed, and told.
    """
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with beside.folder(folder, resumes=resumes) as temporary:
            yield temporary
            if folder.exists() and problem(folder) is None:
                return
            if folder.exists():
                os.replace(folder, temporary.with_name(beside.OLD))
            os.replace(temporary, folder)


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of a folder that is complete."""
    with writing(folder):
        manifest.seal(folder, facts, block=BLOCK)


def problem(folder: Path) -> str | None:
    """What is wrong with a folder, a file missing or of other size or content; or None."""
    try:
        facts = manifest.verify(folder)
    except DamagedError as error:
        return str(error)
    if facts["block"] != BLOCK:
        return f"{folder}: its checksums are of blocks of {facts['block']} bytes, not {BLOCK}"
    return None
