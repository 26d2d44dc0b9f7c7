"""A data set whose rows carry what a stored teacher said about them."""

import dataclasses
from typing import Any

import numpy as np

from jaxdistill.data.dataset import Dataset
from jaxdistill.data.teacher_cache import segments
from jaxdistill.data.teacher_cache.formats import Format
from jaxdistill.data.teacher_cache.store import Store
from jaxdistill.errors import DataError

LEAF = "teacher"
_SHOWN = 60  # characters of an example


@dataclasses.dataclass(frozen=True, eq=False)
class TaughtDataset(Dataset):
    """Rows of tokens, each with `teacher`: the store's fields [L, ...], zeros where nothing counts.

    Attributes:
      store: where the teacher's signals lie.
      entries: int64 [S], the store's entry of every segment; -1 where no position counts.
    """

    store: Store = None  # pyrefly: ignore
    entries: np.ndarray = None  # pyrefly: ignore

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`, as `Dataset` has it, with `teacher`; of several draws all of them.

        Raises:
          IndexError: if there is no such row.
          DamagedError: if the store is not as it was written.
        """
        row: dict[str, Any] = super().__getitem__(index)
        here = [s for s in segments.of_row(self, index) if self.entries[s.number] >= 0]
        # All reads are on their way before the first is waited for.
        waits = [(s, self.store.reading(int(self.entries[s.number]))) for s in here]
        arrays = {
            name: np.zeros((self.seq_len, *shape), dtype)
            for name, (dtype, shape) in self.store.format.fields().items()
        }
        for segment, wait in waits:
            stored = self.store.mask(int(self.entries[segment.number]))
            places = segment.place + np.flatnonzero(stored)
            for name, values in wait().items():
                arrays[name][places] = values
        return row | {LEAF: arrays}

    def empty_row(self) -> dict[str, Any]:
        """A row of padding."""
        return super().empty_row() | empty(self.store.format, self.seq_len)

    def in_epoch(self, row: dict[str, Any], epoch: int) -> dict[str, Any]:
        """The row with what a batch of an epoch carries."""
        return row | {LEAF: self.store.format.in_epoch(row[LEAF], epoch)}


def empty(form: Format, seq_len: int) -> dict[str, Any]:
    """What a row of padding carries of a stored teacher."""
    fields = form.batch_fields().items()
    return {LEAF: {name: np.zeros((seq_len, *shape), dtype) for name, (dtype, shape) in fields}}


def beside(dataset: Dataset, store: Store, tokenizer: Any) -> TaughtDataset:
    """The data set with the store's entries, all of them there.

    Args:
      dataset: the rows.
      store: what was captured.
      tokenizer: of the rows, to show what is missing.

    Raises:
      DataError: if segments are missing: how many, and the first.
    """
    entries = np.full(len(dataset.arrays["segments"]), -1, np.int64)
    missing, first, other = 0, None, False
    for row, segment in segments.of(dataset):
        if not segment.mask.any():
            continue
        found = store.find(segment.key, segment.mask)
        if found is None:
            missing += 1
            other |= store.has(segment.key)
            first = first or (row, segment)
        else:
            entries[segment.number] = found
    if first is not None:
        raise DataError(_lacks(dataset, store, tokenizer, missing, first, other))
    plain = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(Dataset)}
    return TaughtDataset(**plain, store=store, entries=entries)


def _lacks(
    dataset: Dataset,
    store: Store,
    tokenizer: Any,
    missing: int,
    first: tuple[int, segments.Segment],
    other: bool,
) -> str:
    """What is missing, the first example, and why that may be."""
    row, segment = first
    text = tokenizer.decode(segment.tokens.tolist())
    shown = text[:_SHOWN] + ("..." if len(text) > _SHOWN else "")
    reasons = ""
    captured = store.notes.get("seq_len")
    if captured != dataset.seq_len:
        reasons += (
            f"; it was captured with data.seq_len = {captured}, here it is {dataset.seq_len}: "
            "another length makes other windows of longer documents"
        )
    if other:
        reasons += f"; it was captured with loss_on: {store.notes.get('loss_on')}, other positions"
    return (
        f"data.{dataset.name}: teacher.cache = {store.place} lacks {missing} of "
        f"{len(dataset.arrays['segments'])} segments; the first is {shown!r} (row {row}, "
        f"{len(segment.tokens)} tokens){reasons}: `jaxdistill teacher cache` with this "
        "configuration adds what is missing"
    )
