"""Batches of records become documents, in order: here, and by processes where it takes long."""

import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import numpy as np

from jaxdistill.data import wire
from jaxdistill.data.records import Record, Rejected
from jaxdistill.data.tally import Tally
from jaxdistill.data.worker import MAIN, Worker
from jaxdistill.errors import DataError
from jaxdistill.safe.pool import Died, Pool

Batch = list[Record | Rejected]
Place = TypeVar("Place")
ALONE_SECONDS = 2.0  # what takes no longer is not worth the start of processes
_MOST = 32  # processes by default: as many as one that reads and writes keeps busy


def default_workers() -> int:
    """How many processes tokenise where nobody says: one for each processor of this one, 32 at
    most.
    """
    own = getattr(os, "sched_getaffinity", None)  # not on macOS
    return min(_MOST, len(own(0)) if own else os.cpu_count() or 1)


def made(
    batches: Iterator[tuple[Place, Batch]],
    worker: Callable[[], Worker | None],
    workers: int,
    where: Callable[[Place, Batch], str],
) -> Generator[tuple[Place, Batch, wire.Made], None, None]:
    """(place, batch, what becomes of its good records) of every batch, in order.

    The processes end with the iterator.

    Args:
      batches: each with its place. They are read ahead; what reading raises comes in its turn.
      worker: makes documents here; None as long as no good record was read.
      workers: how many processes do, once it has taken ALONE_SECONDS; 1: this one does.
      where: a place in words, for messages.

    Raises:
      DataError: if two processes end while they work on one batch.
      UserError: as `Worker`.
    """
    begun = time.monotonic()
    while True:
        here = worker()
        if here is not None and workers > 1 and time.monotonic() - begun >= ALONE_SECONDS:
            break
        try:
            place, batch = next(batches)
        except StopIteration:
            return
        here = worker()
        nothing = wire.Made([], np.zeros(0, np.uint64), Tally())
        yield place, batch, nothing if here is None else here(good(batch))
    messages = (((place, batch), wire.of_records(good(batch))) for place, batch in batches)
    with Pool(MAIN, here.portable(), workers) as pool:
        try:
            for (place, batch), answer in pool.answers(messages):
                yield place, batch, wire.made_of(answer)
        except Died as died:
            raise DataError(
                f"{where(*died.place)}: each process that tokenises these records ends ({died}): "
                "set data.workers to 1, which needs the least memory; where this process ends too, "
                "leave them out"
            ) from None


def good(batch: Batch) -> list[Record]:
    """The records of a batch that can be tokenised."""
    return [item for item in batch if isinstance(item, Record)]
