"""Parses the header of a GGUF file: its metadata, and where each tensor lies."""

import math
import mmap
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.errors import ModelError

MAX_ENTRIES = 100_000
MAX_DIMS = 4
MAX_HEADER_BYTES = 256_000_000
MAX_VALUES = 4_000_000  # of one array; the largest are a vocabulary and its merges
MAX_ALIGNMENT = 1 << 20
_SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", None, None, "<Q", "<q", "<d")
_STRING, _ARRAY = 8, 9


class TensorPlace(NamedTuple):
    """Where one tensor lies: shape as [out, in], quantisation type, first byte, bytes per row."""

    shape: tuple[int, ...]
    kind: str
    start: int
    row_bytes: int


class Header(NamedTuple):
    """What a GGUF file says about itself."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]


def read_header(path: pathlib.Path) -> Header:
    """The header of a GGUF file of version 2 or 3, every length checked before anything is made.

    Raises:
      ModelError: where the file is something else, damaged or cut short, or the gguf package, which
        knows the quantisation types, is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            f"{path}: reading GGUF needs the package gguf: pip install 'jaxdistill[quickstart]'"
        ) from error
    with path.open("rb") as stream:
        start = stream.read(24)
        magic, version, tensors, entries = struct.unpack("<4sIQQ", start.ljust(24, b"\0"))
        if magic != b"GGUF" or version not in (2, 3) or max(tensors, entries) > MAX_ENTRIES:
            raise ModelError(
                f"{path}: is no GGUF file of version 2 or 3 (starts with {start[:4]!r}, version "
                f"{version}, {tensors} tensors, {entries} entries); download it again"
            )
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(_Cursor(data), tensors, entries, gguf)
            except (struct.error, ValueError, IndexError, KeyError, OverflowError) as error:
                raise ModelError(
                    f"{path}: cannot be read as GGUF ({type(error).__name__}: {str(error)[:200]}); "
                    "the file is damaged or cut short: download it again"
                ) from error


def _parse(cursor: "_Cursor", tensors: int, entries: int, gguf) -> Header:
    metadata = {}
    for _ in range(entries):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the key {key[:80]} stands there twice")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    rows = [cursor.tensor() for _ in range(tensors)]
    base = _aligned(cursor.place, metadata.get("general.alignment", 32))
    places = {}
    for name, dims, number, offset in rows:
        kind = gguf.GGMLQuantizationType(number)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = dims[0] // per_block * block_bytes
        start, size = base + offset, row_bytes * math.prod(dims[1:])
        if name in places:
            raise ValueError(f"tensor {name[:80]} stands there twice")
        if not size or dims[0] % per_block or start + size > len(cursor.data):
            raise ValueError(
                f"tensor {name[:80]} of {list(dims)} is empty, broken within a block, or reaches "
                "past the end of the file"
            )
        places[name] = TensorPlace(dims[::-1], kind.name, start, row_bytes)
    _check_apart(places)
    return Header(metadata, places)


def _aligned(place: int, alignment: Any) -> int:
    """Where the tensors begin."""
    whole = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not whole or not 1 <= alignment <= MAX_ALIGNMENT:
        raise ValueError(f"general.alignment is {str(alignment)[:40]}")
    return -(-place // alignment) * alignment


def _check_apart(places: dict[str, TensorPlace]) -> None:
    """No two tensors share bytes: a small file could otherwise claim any amount of memory."""
    end, before = 0, ""
    for name, place in sorted(places.items(), key=lambda item: item[1].start):
        if place.start < end:
            raise ValueError(f"tensors {before[:80]} and {name[:80]} share bytes")
        end, before = place.start + place.row_bytes * math.prod(place.shape[:-1]), name


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 24
        self._end = min(len(data), MAX_HEADER_BYTES)

    def take(self, count: int) -> bytes:
        if count > self._end - self.place:
            raise ValueError(f"{count} bytes at {self.place} reach past the end of the file")
        self.place += count
        return self.data[self.place - count : self.place]

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("<I"), self.scalar("<Q")
            if inner == _STRING:
                self._room(count, 8)
                return [self.string() for _ in range(count)]
            form = np.dtype(self._form(inner))
            return np.frombuffer(self.take(self._room(count, form.itemsize)), form).tolist()
        return self.scalar(self._form(kind))

    def _form(self, kind: int) -> str:
        form = _SCALARS[kind] if kind < len(_SCALARS) else None
        if form is None:  # an array inside an array
            raise ValueError(f"value type {kind} at {self.place} is not supported")
        return form

    def _room(self, count: int, size: int) -> int:
        """The bytes of `count` values, after checking that the file can hold them."""
        if count > MAX_VALUES:
            raise ValueError(f"{count} values at {self.place}: more than {MAX_VALUES}")
        if count * size > self._end - self.place:
            raise ValueError(f"{count} values at {self.place} reach past the end of the file")
        return count * size

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, dims (fastest first), type number and offset of one tensor."""
        name, count = self.string(), self.scalar("<I")
        if not 1 <= count <= MAX_DIMS:
            raise ValueError(f"tensor {name[:80]} has {count} dims")
        dims = tuple(self.scalar("<Q") for _ in range(count))
        return name, dims, self.scalar("<I"), self.scalar("<Q")
