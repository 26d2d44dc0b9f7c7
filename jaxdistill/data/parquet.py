"""Rows of a Parquet file, a few megabytes at a time, however small the file that holds them."""

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data import parquet_pages
from jaxdistill.data.records import Rejected
from jaxdistill.data.rules import MAX_RECORD_BYTES
from jaxdistill.errors import DataError

AT_A_TIME = 32_000_000  # bytes of rows that are made into objects
_PREFIXES = "DELTA_BYTE_ARRAY"  # a value says how much of the one before it begins it
_BATCH = 1024  # rows that are decoded together, their texts by reference
_OBJECT = 64  # bytes of any value beside its text
# What a row group holds by the headers of its pages, which are what the decoder goes by. It has a
# page of each column in memory, whole; writers make pages of a megabyte, or of 1024 values.
MAX_VALUES = 50_000_000
MAX_DECODED = 4 << 30
MAX_PAGE = 1 << 30
# Text is packed to a tenth: a page that is large, and was next to nothing, is there to fill memory.
LARGE_PAGE, MAX_RATIO = 64 << 20, 100


def objects(
    path: Path, choose: Callable[[Sequence[str]], list[str]]
) -> Iterator[tuple[int, Any] | Rejected]:
    """(number, row) of the rows that can be read, and why others cannot.

    A value that stands in many rows is stored once; it is held once here, too, and its rows are
    made a few megabytes at a time.

    Args:
      path: of the file.
      choose: names of its columns -> those that are read.

    Raises:
      DataError: where the file cannot be read, claims more than anybody writes, or pyarrow is not
        installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow: pip install 'jaxdistill[parquet]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = choose(file.schema_arrow.names)
            count = _check(path, file.metadata, columns)
            texts = _texts(file, columns)
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            number = 0
            for batch in file.iter_batches(batch_size=count, columns=columns):
                for row in _bounded(batch):
                    number += 1
                    if isinstance(row, str):
                        yield Rejected(number, row)
                    else:
                        yield number, without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable Parquet file: {error}") from error


def _check(path: Path, metadata: Any, columns: Collection[str]) -> int:
    """How many rows may be decoded together.

    Raises:
      DataError: where a row group holds more than is read, or its pages cannot be found.
    """
    batch = _BATCH
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        values, decoded, largest = 0, 0, 0
        for chunk in chunks:
            pages = _pages(path, chunk)
            values = max(values, chunk.num_values, sum(page.values for page in pages))
            decoded += max(chunk.total_uncompressed_size, sum(page.size for page in pages))
            most = max((page.size for page in pages), default=0)
            largest += most
            if most > max(LARGE_PAGE, MAX_RATIO * chunk.total_compressed_size):
                raise DataError(
                    f"{path}: row group {number}, column {chunk.path_in_schema}: a page of {most} "
                    f"bytes was packed into {chunk.total_compressed_size}: above {LARGE_PAGE} at "
                    f"most {MAX_RATIO} times its packed size is read; write it anew with smaller "
                    "pages"
                )
            if _PREFIXES in chunk.encodings:
                # A value begins as the one before it: each may be as long as the whole page.
                batch = min(batch, max(1, AT_A_TIME // max(most, 1)))
        if values > MAX_VALUES or decoded > MAX_DECODED or largest > MAX_PAGE:
            raise DataError(
                f"{path}: row group {number} holds {values} values of {decoded} bytes, {largest} "
                f"of them in one page, in a file of {os.path.getsize(path)}: at most {MAX_VALUES}, "
                f"{MAX_DECODED} and {MAX_PAGE} are read; write it anew with smaller row groups and "
                "pages"
            )
    return batch


def _pages(path: Path, chunk: Any) -> list[parquet_pages.PageHeader]:
    try:
        begin, size = parquet_pages.start_of(chunk), chunk.total_compressed_size
        return list(itertools.islice(parquet_pages.pages(path, begin, size), MAX_VALUES))
    except ValueError as error:
        raise DataError(f"{path}: is not a readable Parquet file: {error}") from error


def _texts(file: Any, columns: Collection[str]) -> list[str]:
    """The paths of all texts in the columns, inside of lists too, that are read as dictionaries."""
    leaves = [file.schema.column(index) for index in range(len(file.schema))]
    groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    return [
        leaf.path
        for index, leaf in enumerate(leaves)
        if leaf.physical_type == "BYTE_ARRAY"
        and leaf.path.split(".")[0] in columns
        and not any(_PREFIXES in group.column(index).encodings for group in groups)
    ]


def _bounded(batch: Any) -> Iterator[Any]:
    """The rows as objects; a text says why one cannot be had."""
    until = np.cumsum(sum(_sizes(column) for column in batch.columns))
    start = 0
    while start < batch.num_rows:
        before = until[start - 1] if start else 0
        if until[start] - before > 2 * MAX_RECORD_BYTES:
            yield f"too large: more than {MAX_RECORD_BYTES // 1_000_000} MB in one row"
            start += 1
            continue
        stop = max(start + 1, int(np.searchsorted(until, before + AT_A_TIME, side="right")))
        yield from rows(batch.slice(start, stop - start))
        start = stop


def rows(batch: Any) -> Iterator[Any]:
    """The rows of a batch as objects; a text says why one cannot be had."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        # One bad string spoils the whole conversion: take the rows one by one.
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield "invalid UTF-8"


def _sizes(array: Any) -> np.ndarray:
    """int64 [N]: about how many bytes each value of an Arrow array takes as an object."""
    import pyarrow
    import pyarrow.compute

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        each = np.append(_sizes(array.dictionary), _OBJECT)
        return each[array.indices.fill_null(len(each) - 1).to_numpy(zero_copy_only=False)]
    if pyarrow.types.is_struct(kind):
        fields = [_sizes(array.field(index)) for index in range(kind.num_fields)]
        return sum(fields, np.full(len(array), _OBJECT, np.int64))
    types = pyarrow.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        values = [array.keys, array.items] if types.is_map(kind) else [array.values]
        inside = sum(map(_sizes, values), np.zeros(len(values[0]), np.int64))
        until = np.concatenate([[0], np.cumsum(inside)])[array.offsets.to_numpy()]
        return np.diff(until) + _OBJECT
    plain = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if any(is_one(kind) for is_one in plain):
        length = pyarrow.compute.call_function("binary_length", [array]).fill_null(0)
        return length.to_numpy(zero_copy_only=False).astype(np.int64) + _OBJECT
    return np.full(len(array), _OBJECT, np.int64)


def without_nulls(value: Any) -> Any:
    """Drops the nulls with which Parquet fills the fields that a struct does not have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
