"""What is to be asked of a teacher: the segments that nobody stored yet, in parts of batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxdistill.data.dataset import Dataset
from jaxdistill.data.teacher_cache import parts, segments
from jaxdistill.data.teacher_cache.parts import Wanted
from jaxdistill.data.teacher_cache.segments import SegmentKey
from jaxdistill.data.teacher_cache.store import Store


class CapturedRow(NamedTuple):
    """A row of a data set of which something is to be stored.

    Attributes:
      dataset: its name.
      index: its number there.
      pieces: (first position in the row, what is wanted) of its segments.
    """

    dataset: str
    index: int
    pieces: tuple[tuple[int, Wanted], ...]

    @property
    def tokens(self) -> int:
        """How many the segments have."""
        return sum(len(one.tokens) for _, one in self.pieces)

    @property
    def positions(self) -> int:
        """How many are wanted."""
        return sum(int(one.mask.sum()) for _, one in self.pieces)


def lacking(data: Mapping[str, Dataset], base: Store | None) -> list[CapturedRow]:
    """The rows with segments that a store lacks, each segment where it comes first.

    Where a segment comes again and other positions of it count, all of them are wanted.
    """
    masks: dict[SegmentKey, np.ndarray] = {}
    for dataset in data.values():
        for _, segment in segments.of(dataset):
            if segment.mask.any():
                known = masks.get(segment.key)
                masks[segment.key] = segment.mask if known is None else known | segment.mask
    rows = []
    for name, dataset in data.items():
        for index in range(dataset.num_rows):
            pieces = tuple(_pieces(dataset, index, masks, base))
            if pieces:
                rows.append(CapturedRow(name, index, pieces))
    return rows


def _pieces(
    dataset: Dataset, index: int, masks: dict[SegmentKey, np.ndarray], base: Store | None
) -> Iterator[tuple[int, Wanted]]:
    """The segments of a row that are wanted and were not wanted before."""
    for segment in segments.of_row(dataset, index):
        mask = masks.pop(segment.key, None)
        if mask is None or (base is not None and base.find(segment.key, mask) is not None):
            continue
        yield segment.place, Wanted(segment.key, mask, segment.tokens)


def in_parts(
    rows: Sequence[CapturedRow], batch_size: int, most: int
) -> Iterator[list[list[CapturedRow]]]:
    """Batches of rows, and as many of them to a part as have about `most` positions."""
    part: list[list[CapturedRow]] = []
    positions = 0
    for first in range(0, len(rows), batch_size):
        batch = list(rows[first : first + batch_size])
        count = sum(row.positions for row in batch)
        if part and positions + count > most:
            yield part
            part, positions = [], 0
        part.append(batch)
        positions += count
    if part:
        yield part


def wanted_of(
    part: Sequence[Sequence[CapturedRow]], owners: Sequence[int], process: int
) -> list[Wanted]:
    """What a process stores of a part, in order.

    Args:
      part: its batches.
      owners: of each row of a batch the process that stores it.
      process: whose share.
    """
    return [
        one
        for batch in part
        for row, owner in zip(batch, owners, strict=False)
        if owner == process
        for _, one in row.pieces
    ]


def names(part: Sequence[Sequence[CapturedRow]], owners: Sequence[int]) -> set[str]:
    """The names of what all processes store of a part."""
    shares = [wanted_of(part, owners, process) for process in sorted(set(owners))]
    return {parts.name_of(share) for share in shares if share}
