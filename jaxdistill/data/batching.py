"""Batches of rows: epoch after epoch in orders of their own, or each row once."""

import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxdistill.data.dataset import Dataset
from jaxdistill.data.routes import MicroBatchLayout
from jaxdistill.errors import ConfigError
from jaxdistill.types import Batch, Span

_log = logging.getLogger(__name__)


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    start: int = 0,
    left_out: Sequence[tuple[int, int]] = (),
    seed: int,
    shuffle: bool = True,
    rows: Sequence[int] | None = None,
    threads: int = 2,
    layout: MicroBatchLayout | None = None,
) -> Iterator[tuple[Span, Batch]]:
    """Batches without end, epoch after epoch, each epoch in an order of its own.

    The epochs are one stream of rows, whose row r depends on (dataset, seed, r) only. A batch holds
    the next `batch_size` rows of the stream that are not left out. To resume, start at the row
    where the batch before ended, with batches of any size and any number of processes and threads.

        batch_size=4, start=0, left_out=[(2, 6)]     rows 0 1 6 7 | 8 9 10 11 | ...
                                                     Span(0, 8), Span(8, 12), ...

    Args:
      dataset: from `build`.
      batch_size: rows of the stream in the global batch.
      start: the row of the stream to start with.
      left_out: ranges (first row, end) that no batch holds, disjoint and ascending.
      seed: decides the order of every epoch.
      shuffle: False keeps the rows' own order in every epoch.
      rows: which rows of every global batch this process wants, such as
        `sharding.local_rows(mesh, batch_size)`; None: all.
      threads: how many prepare batches ahead; 0 prepares each when it is asked for.
      layout: of batches for several teachers, of `layout.size(batch_size)` rows; None: there are
        not several.

    Returns:
      An iterator of (Span, Batch of NumPy arrays [rows, L]).

    Raises:
      ConfigError: if a number is out of range.
    """
    wanted = _wanted(batch_size if layout is None else layout.size(batch_size), rows)
    if start < 0:
        raise ConfigError(f"data: row {start}: must be at least 0")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed: {seed}: must lie between 0 and 2**32 - 1")
    if start == 0 and batch_size > len(dataset):
        _log.warning(
            "batch_size = %d: the data set has %d rows, so every batch holds some of them more "
            "than once: take a smaller batch, a shorter seq_len, or more data",
            batch_size,
            len(dataset),
        )
    stream = _EpochStream(dataset, start, left_out, seed if shuffle else None)
    padding = dataset.empty_row()

    def batch_of(number: int) -> tuple[Span, Batch]:
        first = number * batch_size
        rows = [stream.row_at(first + place) for place in range(batch_size)]
        places = range(batch_size)
        if layout is not None:
            routes = [dataset.route(stream.number_of(row)) for row in rows]
            places = layout.places(routes, batch_size).tolist()
        here = [places[place] for place in wanted]
        span = Span(rows[0], rows[-1] + 1)
        return span, stack([padding if place < 0 else stream.row(rows[place]) for place in here])

    return _feed(batch_of, sys.maxsize, threads)


class _EpochStream:
    """The epochs of a data set as one stream of rows.

    Args:
      dataset: the rows.
      start: the row of the stream that counts as place 0.
      left_out: ranges of rows of the stream that have no place.
      seed: decides the order of every epoch; None: the rows' own.
    """

    def __init__(
        self, dataset: Dataset, start: int, left_out: Sequence[tuple[int, int]], seed: int | None
    ):
        # Importing grain takes seconds, which building and inspecting data do not need.
        import grain

        stream = grain.MapDataset.range(len(dataset))
        if seed is not None:
            stream = stream.seed(seed).shuffle()
        self._dataset, self._numbers, self._start = dataset, stream.repeat(), start
        self._gaps = [(max(first, start), end) for first, end in left_out if end > start]

    def row_at(self, place: int) -> int:
        """The row of the stream behind `place` others that are not left out, from the start on."""
        row = self._start + place
        for first, end in self._gaps:
            if row >= first:
                row += end - first
        return row

    def number_of(self, row: int) -> int:
        """Which row of the data stands at a row of the stream."""
        row_numbers: Any = self._numbers[row]
        return int(row_numbers)

    def row(self, row: int) -> Any:
        """What a batch carries of a row of the stream."""
        epoch = row // len(self._dataset)
        return self._dataset.in_epoch(self._dataset[self.number_of(row)], epoch)


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    threads: int = 2,
) -> Iterator[tuple[int, Batch]]:
    """Every row exactly once, in order; the last batch is filled up with empty rows.

    Empty rows have segment 0 and a mask of False. All processes get the same number of batches.

    Args:
      dataset: from `build`.
      batch_size: rows of the global batch.
      rows: which rows of every global batch this process wants, as in `batches`.
      threads: how many prepare batches ahead.

    Returns:
      An iterator of (number, Batch of NumPy arrays [rows, L]).

    Raises:
      ConfigError: if a number is out of range.
    """
    wanted = _wanted(batch_size, rows)
    padding = dataset.empty_row()

    def batch_of(number: int) -> tuple[int, Batch]:
        indices = [number * batch_size + row for row in wanted]
        held = [dataset.in_epoch(dataset[i], 0) for i in indices if i < len(dataset)]
        return number, stack(held + [padding] * (len(indices) - len(held)))

    return _feed(batch_of, -(-len(dataset) // batch_size), threads)


def _wanted(batch_size: int, rows: Sequence[int] | None) -> Sequence[int]:
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size}: must be at least 1")
    if rows is None:
        return range(batch_size)
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ConfigError(f"rows: {list(rows)}: must be some of 0 to {batch_size - 1}")
    return rows


def stack(rows: Sequence[Any]) -> Batch:
    """A batch of rows: trees of arrays by the names of `Batch`, such as `Dataset` gives."""
    return Batch(**_stacked(rows))


def _stacked(nodes: Sequence[Any]) -> Any:
    # By hand: jax.tree.map takes half as long again as np.stack alone.
    if isinstance(nodes[0], np.ndarray):
        return np.stack(nodes)
    return {name: _stacked([node[name] for node in nodes]) for name in nodes[0]}


def _feed(batch_of: Any, count: int, threads: int) -> Iterator[tuple[Any, Batch]]:
    """batch_of(0), batch_of(1), ..., made ahead of the reader in threads; the order is kept."""
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    # Grain names a function by its line in a file, which may be torn while somebody edits it, and
    # that would end the run; a partial has no line.
    made = functools.partial(batch_of)
    # No worker processes: they outlive a killed trainer, and slicing mapped arrays needs none.
    return iter(grain.MapDataset.range(count).map(made).to_iter_dataset(options))
