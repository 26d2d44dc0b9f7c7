"""Tokenised data on disk: flat arrays written as a stream, verified block by block when read."""

import collections
import contextlib
import io
import math
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from jaxdistill.errors import DamagedError, StorageError
from jaxdistill.safe import beside, manifest

Mark = tuple[int, int]  # bytes behind a header, and their CRC-32
ARRAYS = {
    "tokens": np.dtype(np.int32),  # [N], all documents, one after the other; see `ids`
    "loss": np.dtype(np.bool_),  # [N], whether the token counts as a target; [0]: all of them do
    "documents": np.dtype(np.int64),  # [D + 1], where each document begins
    "segments": np.dtype(np.int64),  # [S, 2], start and length, sorted by row
    "rows": np.dtype(np.int64),  # [R + 1], which segments are in a row
    "records": np.dtype(np.uint64),  # [K], hashes of the records that were used
}
# Beside them, of data that are given in the tokens of a second model too.
SECOND_ARRAYS = {
    "groups": np.dtype(np.int32),  # [N], of each token, counted from 1 in its document; 0 is none
    "second_tokens": np.dtype(np.int32),  # [M]
    "second_groups": np.dtype(np.int32),  # [M]
    "second_documents": np.dtype(np.int64),  # [D + 1]
    "second_segments": np.dtype(np.int64),  # [S, 2]
}
# Beside them, of data for several teachers: which one teaches, from 1.
ROUTE_ARRAYS = {
    "routes": np.dtype(np.int32),  # [D]
    "row_routes": np.dtype(np.int32),  # [R]
}
QUARANTINE = "quarantine.jsonl"
IDS = "ids"  # the fact of a folder that names the numbers of `tokens`
BLOCK = 1 << 16  # bytes with a checksum of their own: what is read to have a row of them
_KEPT_BLOCKS = 256  # of an array, in memory: 16 MiB


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
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the final one; it takes the final one's place if all went well.

    Another process may finish the same data first: then its folder stays and ours is dropped. What
    a killed build of the same data has left is in it; what others have left is removed, and told.
    """
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with beside.folder(folder, resumes=True) as temporary:
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


def read_arrays(folder: Path) -> dict[str, Any]:
    """The arrays of a folder, each block read against its checksum when it is used.

    Tokens are int32 and the mask has their length, whatever the folder keeps of both.
    """
    content = manifest.read(folder)
    files = content["files"]
    known = ARRAYS | SECOND_ARRAYS | ROUTE_ARRAYS
    short = content.get(IDS) == "uint16"
    known |= {"tokens": np.dtype(np.uint16)} if short else {}
    found: dict[str, Any] = {
        name: Checked(folder / f"{name}.npy", dtype, files[f"{name}.npy"]["crc32"])
        for name, dtype in known.items()
        if name in ARRAYS or f"{name}.npy" in files
    }
    if short:
        found["tokens"] = _Wide(found["tokens"])
    if not len(found["loss"]):
        found["loss"] = _AllCount(found["tokens"])
    return found


class _Wide:
    """An array of small numbers whose slices are int32, as tokens are everywhere else."""

    def __init__(self, kept: "Checked"):
        self._kept, self.shape, self.dtype = kept, kept.shape, np.dtype(np.int32)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: slice) -> np.ndarray:
        return self._kept[index].astype(np.int32)


class _AllCount:
    """The mask of tokens all of which count, of which no file is kept."""

    def __init__(self, tokens: Any):
        self.shape, self.dtype = tokens.shape, np.dtype(np.bool_)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice) -> np.ndarray:
        return np.ones(len(range(*index.indices(len(self)))), np.bool_)


class Checked:
    """An array in a file whose slices are read from there, block by block, each time checked.

    What changes on the disk after the start is found before it is used. No map: a file that is cut
    off under one ends the process without a message. The blocks used last stay in memory.

    Args:
      path: a .npy file.
      dtype: what it must hold.
      sums: CRC-32 of every block of `BLOCK` bytes of the file.

    Raises:
      DamagedError: if it is no such file.
    """

    def __init__(self, path: Path, dtype: np.dtype, sums: Sequence[int]):
        self._path, self._sums = path, sums
        self._blocks: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._lock = threading.Lock()  # several threads make batches
        try:
            self._file = os.open(path, os.O_RDONLY)
            self._close = weakref.finalize(self, os.close, self._file)
            with open(path, "rb") as file:
                np.lib.format.read_magic(file)
                self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
                self._start = file.tell()
        except (OSError, ValueError) as error:
            raise self._damaged(f"cannot be read: {error}") from error
        if self.dtype != dtype:
            raise self._damaged(f"holds {self.dtype}, not {dtype}")
        self._row = dtype.itemsize * math.prod(self.shape[1:])
        self._end = self._start + len(self) * self._row

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice) -> np.ndarray:
        """Rows of the array, a copy.

        Raises:
          DamagedError: if the file has changed since it was written.
        """
        first, last, step = index.indices(len(self))
        assert step == 1, "rows lie one after the other"
        count = max(last - first, 0)
        start = self._start + first * self._row
        end, at = start + count * self._row, start // BLOCK * BLOCK
        blocks = range(start // BLOCK, -(-end // BLOCK) if count else 0)
        data = b"".join(map(self._block, blocks))[start - at : end - at]
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def _block(self, number: int) -> bytes:
        with self._lock:
            if number in self._blocks:
                self._blocks.move_to_end(number)
                return self._blocks[number]
        place = number * BLOCK
        size = min(BLOCK, self._end - place)
        try:
            data = os.pread(self._file, size, place)
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror or error}") from error
        if len(data) != size or isal_zlib.crc32(data) != self._sums[number]:
            raise self._damaged(f"is changed since it was written, in bytes {place}-{place + size}")
        with self._lock:
            self._blocks[number] = data
            while len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return data

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"{self._path}: {what}: start again, and the data are built anew")
