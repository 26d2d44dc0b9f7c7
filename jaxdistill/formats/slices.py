"""Reads slices of stacked weights: a few rows of a file's tensor at a time, by a few threads."""

import collections
import concurrent.futures
import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxdistill.formats.tensor_names import Part, TensorName

_THREADS = min(8, (os.cpu_count() or 1) + 1)  # one waits for the disk while others copy
_TILE = 192
_ALIGNED = 64  # bytes: where XLA wants a CPU's arrays to begin
_PIECE = 1 << 21  # bytes of a reading: a thread holds no more beside the weight

Spans = tuple[slice, ...]


@runtime_checkable
class Tensors(Protocol):
    """What a folder or a GGUF file offers: slices and dtypes of tensors by their file's names.

    One that several threads may read has `threads = True`. One of whose rows a few columns can be
    read alone has the paths that it reads as `files`.
    """

    def read(self, name: str, index: Spans, memory: np.ndarray | None = None) -> np.ndarray:
        """The slice `index` of one tensor; it may lie in `memory`, bytes that are free for it."""

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` returns."""


class Buffers:
    """Buffers that the readings of one loading use in turn: the system clears new memory first."""

    def __init__(self) -> None:
        self._free: collections.deque[np.ndarray] = collections.deque()

    @contextlib.contextmanager
    def one(self) -> Iterator[np.ndarray]:
        """Bytes for one reading."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(_PIECE, np.uint8)
        try:
            yield memory
        finally:
            self._free.append(memory)


class _Rows(NamedTuple):
    """Rows of one tensor of a file; those of a vector are its numbers."""

    file: str
    start: int
    stop: int
    vector: bool


class _Target(NamedTuple):
    """Where some columns of these rows belong, in the file's order; a vector is a column."""

    place: np.ndarray
    columns: slice


def read(
    name: TensorName,
    part: Part | None,
    slices: Sequence[Spans],
    tensors: Tensors,
    dtype: np.dtype,
    buffers: Buffers,
) -> list[np.ndarray]:
    """Slices of a stacked weight; those that have columns of the same rows share their readings.

    Args:
      name: what the file calls the weight.
      part: of the file's tensor; None: all.
      slices: indices of the weight, no two alike.
      tensors: where to read.
      dtype: of what is returned.
      buffers: memory that readings use.
    """
    blocks = [_empty([span.stop - span.start for span in spans], dtype) for spans in slices]
    targets: dict[_Rows, list[_Target]] = collections.defaultdict(list)
    for spans, block in zip(slices, blocks, strict=True):
        for rows, target in _targets(name, part, spans, block):
            targets[rows].append(target)
    readings = [
        functools.partial(_read_piece, piece, here, tensors, buffers)
        for rows, found in targets.items()
        for neighbours in _neighbours(found)
        for piece, here in _cut(rows, neighbours, tensors.dtype(rows.file).itemsize)
    ]
    if len(readings) == 1 or not getattr(tensors, "threads", False):
        for reading in readings:
            reading()
        return blocks
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(reading) for reading in readings]:
            done.result()  # raises what the reading raised
    return blocks


def _targets(
    name: TensorName, part: Part | None, spans: Spans, block: np.ndarray
) -> Iterator[tuple[_Rows, _Target]]:
    """What a slice needs of each tensor, a run of rows for every run of a fused one."""
    outer, inner = spans[: name.stacked], spans[name.stacked :]
    whole = slice(0, block.shape[-1]), inner[-1]
    runs = [whole] if part is None else list(part.runs(inner[-1]))
    for index in np.ndindex(*block.shape[: name.stacked]):
        tensor = (span.start + at for span, at in zip(outer, index, strict=True))
        file = name.pattern.format(*tensor)
        for here, there in runs:
            place, wanted = block[(*index, ..., here)], (*inner[:-1], there)
            if name.transposed:
                place, wanted = place.T, wanted[::-1]
            vector = len(wanted) == 1
            rows, columns = (*wanted, slice(0, 1)) if vector else wanted
            place = place.reshape(-1, 1) if vector else place
            yield _Rows(file, rows.start, rows.stop, vector), _Target(place, columns)


def _neighbours(targets: list[_Target]) -> Iterator[list[_Target]]:
    """Targets in groups whose columns lie together, in order."""
    group: list[_Target] = []
    for target in sorted(targets, key=lambda one: one.columns.start):
        if group and group[-1].columns.stop != target.columns.start:
            yield group
            group = []
        group.append(target)
    yield group


def _cut(
    rows: _Rows, targets: list[_Target], itemsize: int
) -> Iterator[tuple[_Rows, list[_Target]]]:
    """Pieces of the rows, as many bytes as a reading has, each with its part of every target."""
    width = sum(target.place[:1].size for target in targets) * itemsize
    step = max(1, _PIECE // max(1, width))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        part = slice(start - rows.start, stop - rows.start)
        here = [target._replace(place=target.place[part]) for target in targets]
        yield rows._replace(start=start, stop=stop), here


def _read_piece(rows: _Rows, targets: list[_Target], tensors: Tensors, buffers: Buffers) -> None:
    """Fills every target with its columns of the rows, in place where these lie as in the file."""
    first, columns = targets[0]
    wanted = slice(rows.start, rows.stop), slice(columns.start, targets[-1].columns.stop)

    def read_into(memory: np.ndarray) -> np.ndarray:
        values = tensors.read(rows.file, wanted[:1] if rows.vector else wanted, memory)
        return values.reshape(-1, 1) if rows.vector else values

    alone = len(targets) == 1 and first.flags.c_contiguous
    if alone and first.dtype == tensors.dtype(rows.file):
        memory = first.reshape(-1).view(np.uint8)
        values = read_into(memory)
        if not np.may_share_memory(values, memory):
            fill(first, values)
        return
    with buffers.one() as memory:
        values = read_into(memory)
        for place, own in targets:
            fill(place, values[:, own.start - columns.start : own.stop - columns.start])


def _empty(sizes: list[int], dtype: np.dtype) -> np.ndarray:
    """New memory that begins where a CPU's device takes it as it is; other memory is copied."""
    size = math.prod(sizes) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    first = -memory.ctypes.data % _ALIGNED
    return memory[first : first + size].view(dtype).reshape(sizes)


def fill(place: np.ndarray, values: np.ndarray) -> None:
    """place[:] = values, a tile at a time where one of them is turned: both stay in the cache.

    A tile is copied in the order of `values` first: its lines lie far apart there, often by a power
    of two, and would evict each other from the cache while it is turned. Numbers of 16 bits that
    stay as they are move as whole numbers: NumPy has no fast loop for bfloat16.
    """
    if place.dtype == values.dtype and place.dtype.itemsize == 2:
        place, values = place.view(np.uint16), values.view(np.uint16)
    if _turned(place) == _turned(values):
        place[...] = values
        return
    if _turned(values):
        place, values = place.T, values.T
    for row in range(0, place.shape[0], _TILE):
        for column in range(0, place.shape[1], _TILE):
            here = np.s_[row : row + _TILE, column : column + _TILE]
            place[here] = np.ascontiguousarray(values[here], dtype=place.dtype)


def _turned(matrix: np.ndarray) -> bool:
    """Whether numbers of a column lie closer than those of a row."""
    return matrix.strides[0] < matrix.strides[1]
