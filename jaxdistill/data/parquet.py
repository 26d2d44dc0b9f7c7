"""Rows of a Parquet file, a few megabytes at a time, however small the file that holds them."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data.records import Rejected
from jaxdistill.data.rules import MAX_RECORD_BYTES
from jaxdistill.errors import DataError

AT_A_TIME = 32_000_000  # bytes of rows that are made into objects
_BATCH = 1024  # rows that are decoded together, their texts by reference
_OBJECT = 64  # bytes of any value beside its text
# What a row group says that it holds: a small file can claim anything.
MAX_VALUES = 50_000_000
MAX_DECODED = 4 << 30


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
            _check(path, file.metadata, columns)
            texts = _texts(file.schema, columns)
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
                for row in _bounded(batch):
                    number += 1
                    if isinstance(row, str):
                        yield Rejected(number, row)
                    else:
                        yield number, without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable Parquet file: {error}") from error


def _check(path: Path, metadata: Any, columns: Collection[str]) -> None:
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        values = max((chunk.num_values for chunk in chunks), default=0)
        size = sum(chunk.total_uncompressed_size for chunk in chunks)
        if values > MAX_VALUES or size > MAX_DECODED:
            raise DataError(
                f"{path}: row group {number} claims {values} values of {size} bytes in a file of "
                f"{os.path.getsize(path)}: at most {MAX_VALUES} and {MAX_DECODED} are read; write "
                "it anew with smaller row groups"
            )


def _texts(schema: Any, columns: Collection[str]) -> list[str]:
    """The paths of all texts in the columns, those inside of lists included."""
    leaves = [schema.column(index) for index in range(len(schema))]
    return [
        leaf.path
        for leaf in leaves
        if leaf.physical_type == "BYTE_ARRAY" and leaf.path.split(".")[0] in columns
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
