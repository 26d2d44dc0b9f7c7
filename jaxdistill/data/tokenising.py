"""Batches of records become documents, in order: here, and by processes where it takes long."""

import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from jaxdistill.data import wire
from jaxdistill.data.codec import Codec
from jaxdistill.data.documents import check
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.records import Record, Rejected
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.settings import Settings
from jaxdistill.data.worker import MAIN, Worker
from jaxdistill.errors import DataError
from jaxdistill.safe.pool import Died, Pool

RecordBatch = list[Record | Rejected]
Origin = TypeVar("Origin")
ALONE_SECONDS = 2.0  # what takes no longer is not worth the start of processes
_MOST = 16  # processes by default: as many as one that reads and writes keeps busy


def default_workers() -> int:
    """How many processes tokenise where nobody says: one for each processor of this one, 16 at
    most.
    """
    own = getattr(os, "sched_getaffinity", None)  # not on macOS
    return min(_MOST, len(own(0)) if own else os.cpu_count() or 1)


class Tokeniser:
    """Makes documents of the records of a data set, which are of one kind.

    Args:
      codec: of the tokenizer.
      settings: of the data set.
      second: the tokens of another model beside them, see `pipeline.build`; or None.
      name: of the data set, for messages.
      workers: how many processes tokenise, once it has taken ALONE_SECONDS; 1: this one does.

    Attributes:
      kind: of the records; None as long as none was met.
    """

    def __init__(
        self,
        codec: Codec,
        settings: Settings,
        second: SecondView | PrivilegedView | None,
        name: str,
        workers: int,
    ):
        self._given, self._second = (codec, settings), second
        self._name, self._workers = name, workers
        self.kind: str | None = None
        self._holder = ""
        self._worker: Worker | None = None

    @property
    def two_views(self) -> bool:
        """Whether documents are given in the tokens of a second model too."""
        return self._second is not None

    @property
    def all_count(self) -> bool:
        """Whether every token counts, so that no mask is kept: no mark takes one out."""
        return self._given[1].loss_on == "all" and self.kind in ("text", "completion")

    def meet(self, kind: str, source: str, line: int) -> None:
        """Notes the kind of a record: the first one's is that of all.

        Raises:
          DataError: if it is another one, or does not suit the settings.
          ConfigError: for a setting that has no effect on it.
        """
        if self.kind is None:
            self.kind, self._holder = kind, source
            check(self._given[1], kind, source)
        elif kind != self.kind:
            raise DataError(
                f"data.{self._name}: mixed kinds of records: {self._holder} holds {self.kind!r}, "
                f"{source}:{line} is {kind!r}: a data set has one kind"
            )

    def made(
        self,
        batches: Iterator[tuple[Origin, RecordBatch]],
        where: Callable[[Origin, RecordBatch], str],
    ) -> Generator[tuple[Origin, RecordBatch, wire.Made], None, None]:
        """(place, batch, what becomes of its good records) of every batch, in order.

        The processes end with the iterator.

        Args:
          batches: each with its place, its records met. They are read ahead; what reading raises
            comes in its turn.
          where: a place in words, for messages.

        Raises:
          DataError: if two processes end while they work on one batch.
          UserError: as `Worker`.
        """
        alone = time.monotonic() + ALONE_SECONDS
        while self._worker is None or self._workers == 1 or time.monotonic() < alone:
            try:
                place, batch = next(batches)
            except StopIteration:
                return
            records = good(batch)
            if records and self._worker is None:
                assert self.kind is not None, "its records are met"
                self._worker = Worker(*self._given, self.kind, self._holder, self._second)
            yield place, batch, self._worker(records) if self._worker else wire.nothing()
        messages = (((place, batch), wire.of_records(good(batch))) for place, batch in batches)
        with Pool(MAIN, self._worker.portable(), self._workers) as pool:
            try:
                for (place, batch), answer in pool.answers(messages):
                    yield place, batch, wire.made_of(answer)
            except Died as died:
                raise DataError(
                    f"data.{self._name}: {where(*died.place)}: each process that tokenises these "
                    f"records ends ({died}): set data.workers to 1, which needs the least memory; "
                    "where this process ends too, leave them out"
                ) from None


def good(batch: RecordBatch) -> list[Record]:
    """The records of a batch that can be tokenised."""
    return [item for item in batch if isinstance(item, Record)]
