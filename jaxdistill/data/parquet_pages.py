"""Pages of a Parquet file by their own headers: how large each is, and how many values it holds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_HEADER = 1 << 20  # bytes that a page's header may have, the least and largest of its values inside
_DEPTH = 8  # of structs within structs
_COUNTED = (5, 7, 8)  # headers of data pages, of dictionaries, and of data pages in version 2


class PageHeader(NamedTuple):
    """What a page says of itself.

    Attributes:
      size: bytes without compression.
      values: how many.
    """

    size: int
    values: int


def pages(path: Path, start: int, size: int) -> Iterator[PageHeader]:
    """The pages of a column of a row group, none of them decompressed.

    Args:
      path: of the file.
      start: place of the first page.
      size: bytes of all of them, compressed.

    Raises:
      ValueError: where a header cannot be read.
    """
    with open(path, "rb") as file:
        at, end = start, start + size
        while at < end:
            file.seek(at)
            header = _Thrift(file.read(min(_HEADER, end - at)))
            try:
                told = header.struct()
                page = PageHeader(told[2], sum(told[one][1] for one in _COUNTED if one in told))
                compressed = told[3]
            except (IndexError, KeyError, TypeError) as error:
                raise ValueError(f"the header of a page at byte {at} is damaged") from error
            if min(*page, compressed) < 0:
                raise ValueError(f"the page at byte {at} has a negative size")
            yield page
            at += header.at + compressed


def start_of(chunk: Any) -> int:
    """Where the pages of a column chunk, as pyarrow describes it, begin."""
    begins = [chunk.data_page_offset, chunk.dictionary_page_offset]
    return min(begin for begin in begins if begin)


class _Thrift:
    """Reads structs in Thrift's compact protocol: numbers and structs of numbers, by field.

    Reference: thrift/doc/specs/thrift-compact-protocol.md, parquet-format/src/main/thrift.
    """

    def __init__(self, data: bytes):
        self._data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _DEPTH:
            raise IndexError("nested too deeply")
        fields: dict[int, Any] = {}
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._number()
            fields[field] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # a truth is in its kind
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._number()
        if kind == 12:
            return self.struct(depth + 1)
        if kind in (7, 8):  # a float, a text
            self._skip(8 if kind == 7 else self._plain())
            return None
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._plain()
            for _ in range(count):
                # Within a list a truth has a byte of its own.
                self._value(3 if head & 15 in (1, 2) else head & 15, depth + 1)
            return None
        raise IndexError("no such kind")

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._data):
            raise IndexError("cut")

    def _plain(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise IndexError("no number")

    def _number(self) -> int:
        value = self._plain()
        return (value >> 1) ^ -(value & 1)
