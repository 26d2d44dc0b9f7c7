"""Arrays of built data, read from their files block by block, each checked; several are one."""

import bisect
import collections
import itertools
import math
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from jaxdistill.data import store
from jaxdistill.errors import DamagedError
from jaxdistill.safe import manifest

_KEPT_BLOCKS = 256  # of an array, in memory: 16 MiB
_KEPT_FILES = 64  # of an array, open; those behind are opened for each read


def of_rows(folder: Path, shards: Sequence[Path]) -> dict[str, Any]:
    """The arrays of a data set: its own, and the tokens of its shards, one behind the other.

    Tokens are int32 and the mask has their length, whatever the shards keep of both.

    Raises:
      DamagedError: if a manifest or a file is not as it was written.
    """
    own = joined([folder], store.ROWS | store.SECOND_ROWS | store.ROUTES, store.ROWS)
    return own | of_shards(shards)


def of_shards(shards: Sequence[Path]) -> dict[str, Any]:
    """The tokens of shards, joined, as in `of_rows`."""
    short = manifest.read(shards[0]).get(store.IDS) == "uint16"
    specs: dict[str, store.Spec] = {**store.TOKENS, **store.SECOND_TOKENS}
    specs |= {"tokens": (np.dtype(np.uint16), ())} if short else {}
    columns: dict[str, Any] = joined(shards, specs, store.TOKENS)
    if short:
        columns["tokens"] = _Wide(columns["tokens"])
    if not len(columns["loss"]):
        columns["loss"] = _AllCount(columns["tokens"])
    return columns


def joined(
    folders: Sequence[Path], specs: Mapping[str, store.Spec], needed: Mapping[str, store.Spec]
) -> dict[str, "Checked"]:
    """Arrays of folders by name, joined in their order; those that are not needed may be missing.

    Raises:
      DamagedError: if a manifest or a file is not as it was written.
    """
    files = [manifest.read(folder)["files"] for folder in folders]
    return {
        name: Checked(
            [
                (folder / f"{name}.npy", known[f"{name}.npy"]["crc32"])
                for folder, known in zip(folders, files, strict=True)
            ],
            *spec,
        )
        for name, spec in specs.items()
        if name in needed or all(f"{name}.npy" in known for known in files)
    }


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


class _NpyFile:
    """A .npy file, its header read; it stays open where it is one of the first."""

    def __init__(self, path: Path, sums: Sequence[int], spec: store.Spec, keep: bool):
        self._path, self._sums = path, sums
        dtype, row_shape = spec
        row = dtype.itemsize * math.prod(row_shape)
        try:
            with open(path, "rb") as file:
                np.lib.format.read_magic(file)
                shape, _, found = np.lib.format.read_array_header_1_0(file)
                self.start = file.tell()
            self._handle = os.open(path, os.O_RDONLY) if keep else None
        except (OSError, ValueError) as error:
            raise self._damaged(f"cannot be read: {error}") from error
        if self._handle is not None:
            self._close = weakref.finalize(self, os.close, self._handle)
        if (found, shape[1:]) != (dtype, row_shape):
            raise self._damaged(f"holds {found}, not {dtype}")
        self.count = int(shape[0])
        self._end = self.start + self.count * row

    def block(self, number: int) -> bytes:
        """A block of the file, checked.

        Raises:
          DamagedError: if it has changed since it was written.
        """
        place = number * store.BLOCK
        size = min(store.BLOCK, self._end - place)
        try:
            if self._handle is not None:
                data = os.pread(self._handle, size, place)
            else:
                with open(self._path, "rb", buffering=0) as file:
                    data = os.pread(file.fileno(), size, place)
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror or error}") from error
        if len(data) != size or isal_zlib.crc32(data) != self._sums[number]:
            raise self._damaged(f"is changed since it was written, in bytes {place}-{place + size}")
        return data

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"{self._path}: {what}: start again, and the data are built anew")


class Checked:
    """The arrays of one or more files as one, whose slices are read from there and checked.

    What changes on the disk after the start is found before it is used. No map: a file that is cut
    off under one ends the process without a message. The blocks used last stay in memory.

    Args:
      files: .npy files, each with the CRC-32 of every block of `BLOCK` bytes.
      dtype: what they must hold.
      row_shape: of what they hold, [n, *row_shape].

    Raises:
      DamagedError: if one is no such file.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, Sequence[int]]],
        dtype: np.dtype,
        row_shape: tuple[int, ...],
    ):
        self.dtype, self._row_shape = dtype, row_shape
        self._row = dtype.itemsize * math.prod(row_shape)
        self._files = [
            _NpyFile(path, sums, (dtype, row_shape), number < _KEPT_FILES)
            for number, (path, sums) in enumerate(files)
        ]
        self._ends = list(itertools.accumulate(file.count for file in self._files))
        self._blocks: collections.OrderedDict[tuple[int, int], bytes] = collections.OrderedDict()
        self._lock = threading.Lock()  # several threads make batches

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._row_shape)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: slice) -> np.ndarray:
        """Rows of the array, a copy.

        Raises:
          DamagedError: if a file has changed since it was written.
        """
        first, last, step = index.indices(len(self))
        assert step == 1, "rows lie one after the other"
        pieces = []
        while first < last:
            number = bisect.bisect_right(self._ends, first)
            end = min(last, self._ends[number])
            pieces.append(self._bytes(number, first, end))
            first = end
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return np.frombuffer(data, self.dtype).reshape(-1, *self._row_shape)

    def _bytes(self, number: int, first: int, last: int) -> bytes:
        """What rows of one file hold; they are counted over all files."""
        file, size = self._files[number], store.BLOCK
        start = file.start + (first - (self._ends[number] - file.count)) * self._row
        end, at = start + (last - first) * self._row, start // size * size
        blocks = range(start // size, -(-end // size))
        return b"".join(self._block(number, block) for block in blocks)[start - at : end - at]

    def _block(self, number: int, block: int) -> bytes:
        key = number, block
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        data = self._files[number].block(block)
        with self._lock:
            self._blocks[key] = data
            while len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return data
