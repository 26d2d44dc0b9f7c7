"""What a training learns from: a feed gives the batch at a position, a corpus reads ahead."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxdistill.data import pipeline
from jaxdistill.data.dataset import Dataset
from jaxdistill.types import Batch, Span

# feed(row, state) -> (span, batch): the batch of the step that begins at a position in the data.
#
# Asked twice for one row the answer is the same: it depends on the row, on a seed and, where the
# student writes the text, on the state before the step. Going back in training is asking for an
# earlier row. A feed that draws the rows of several steps from one state must be able to give any
# of them again, so it keeps what it drew. Batches may differ in their number of rows; each number
# costs one compiled program.
# None instead says that the process was asked to stop while the batch was made.
Feed = Callable[[int, Any], tuple[Span, Batch] | None]


class CorpusFeed:
    """The batches of a data set, prepared ahead as long as they are asked for one after the other.

        feed = CorpusFeed(dataset, batch_size=8, seed=0, left_out=lambda: guard.left_out)
        span, batch = feed(0, None)                # opens the stream at row 0: Span(0, 8)
        span, batch = feed(span.end_row, None)     # the next batch is ready: Span(8, 16)
        span, batch = feed(0, None)                # going back opens the stream again

    Args:
      dataset: from `pipeline.build`.
      batch_size: rows of the global batch.
      seed: decides the order of every epoch.
      left_out: the ranges of rows that no batch holds, as they are now.
      rows: which rows of every global batch this process wants; None: all.
      threads: how many prepare batches ahead.
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
    ):
        self._open = lambda start, gaps: pipeline.batches(
            dataset,
            batch_size=batch_size,
            start=start,
            left_out=gaps,
            seed=seed,
            rows=rows,
            threads=threads,
        )
        self._left_out = left_out
        self._ahead: Iterator[tuple[Span, Batch]] = iter(())
        self._next: tuple[int, list[tuple[int, int]]] | None = None

    def __call__(self, row: int, state: Any) -> tuple[Span, Batch]:
        """The batch at a row of the stream, as NumPy arrays; the state does not matter."""
        gaps = list(self._left_out())
        if self._next != (row, gaps):
            self._ahead = self._open(row, gaps)
        span, batch = next(self._ahead)
        self._next = span.end_row, gaps
        return span, batch
