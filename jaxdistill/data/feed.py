"""What a training learns from: a feed gives the batch at a position, a corpus reads ahead."""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxdistill.data import batching
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.routes import MicroBatchLayout
from jaxdistill.types import DATA, ORIGINS, Batch, Span


class Feed(abc.ABC):
    """Gives the batch of the step that begins at a position in the data.

    Asked twice for one row the answer is the same: it depends on the row, on a seed and, where the
    student writes the text, on the state before the step. Going back in training is asking for an
    earlier row. A feed that draws the rows of several steps from one state must be able to give any
    of them again, so it keeps what it drew. Batches may differ in their number of rows; each number
    costs one compiled program.

    A feed without memory overrides `next` and `epoch` alone.
    """

    def begin(self, meta: Mapping[str, Any]) -> None:  # noqa: B027 - nothing to remember
        """Starts from the meta of a checkpoint, or from the start.

        Args:
          meta: what `kept` and `beside` gave, among other things; empty at the start.
        """

    @abc.abstractmethod
    def next(self, row: int, state: Any) -> tuple[Span, Batch] | None:
        """The batch of the step that begins at a row, as NumPy arrays: this process' rows.

        None instead says that the process was asked to stop while the batch was made, in all
        processes alike.

        Args:
          row: a position in the stream of rows.
          state: the training state before the step.
        """

    def kept(self, row: int) -> Mapping[str, Any]:
        """What a checkpoint keeps of the feed, as JSON can hold it; the next step is at row."""
        return {}

    def beside(self, row: int) -> Mapping[str, Any]:
        """The same of what is too large for a manifest: by names, each a file of its own."""
        return {}

    def evaluated(self, row: int, metrics: Mapping[str, float]) -> None:  # noqa: B027
        """Hears how the state measures whose next step is at a row."""

    def measure(self, state: Any) -> Mapping[str, float]:
        """What the feed measures of a state at an evaluation, beside the held-out rows."""
        return {}

    def shown(self) -> Sequence[Mapping[str, str]]:
        """What of the last `measure` people look at: rows as `MetricsWriter.samples` takes them."""
        return []

    def numbers(self, span: Span) -> Mapping[str, float]:
        """What the record of the step that learned from these rows says of its text."""
        return {}

    def origin(self, span: Span) -> str:
        """Who wrote the text of these rows, a value of `types.ORIGINS`."""
        return ORIGINS[DATA]

    @abc.abstractmethod
    def epoch(self, row: int) -> float:
        """Epochs of the data that lie before a row."""

    def usual(self) -> Batch | None:
        """One row of padding with all leaves, where batches have as many rows as the run was told.

        None: how many rows they have is not known before they are made.
        """
        return None


class CorpusFeed(Feed):
    """The batches of a data set, prepared ahead as long as they are asked for one after the other.

        feed = CorpusFeed(dataset, batch_size=8, seed=0, left_out=lambda: guard.left_out)
        span, batch = feed.next(0, None)           # opens the stream at row 0: Span(0, 8)
        span, batch = feed.next(span.end_row, None)    # the next batch is ready: Span(8, 16)
        span, batch = feed.next(0, None)           # going back opens the stream again

    Args:
      dataset: from `pipeline.build`.
      batch_size: rows of the stream in the global batch.
      seed: decides the order of every epoch.
      left_out: the ranges of rows that no batch holds, as they are now.
      rows: which rows of every global batch this process wants; None: all.
      threads: how many prepare batches ahead.
      layout: of batches for several teachers.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        left_out: Callable[[], Sequence[tuple[int, int]]],
        rows: Sequence[int] | None = None,
        threads: int = 2,
        layout: MicroBatchLayout | None = None,
    ):
        self._open = lambda start, gaps: batching.batches(
            dataset,
            batch_size=batch_size,
            start=start,
            left_out=gaps,
            seed=seed,
            rows=rows,
            threads=threads,
            layout=layout,
        )
        self._dataset, self._left_out = dataset, left_out
        self._ahead: Iterator[tuple[Span, Batch]] = iter(())
        self._next: tuple[int, list[tuple[int, int]]] | None = None

    def next(self, row: int, state: Any) -> tuple[Span, Batch]:
        """The batch at a row of the stream, as NumPy arrays; the state does not matter."""
        gaps = list(self._left_out())
        if self._next != (row, gaps):
            self._ahead = self._open(row, gaps)
        span, batch = next(self._ahead)
        self._next = span.end_row, gaps
        return span, batch

    def epoch(self, row: int) -> float:
        """Times that every row of the data was read."""
        return row / self._dataset.num_rows

    def usual(self) -> Batch:
        """One row of padding with all leaves."""
        return batching.stack([self._dataset.empty_row()])
