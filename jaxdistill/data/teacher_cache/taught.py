"""A data set whose rows carry what a stored teacher said about them, or each of several."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill.data.dataset import Dataset
from jaxdistill.data.records import teacher_key
from jaxdistill.data.second_view import second_rows
from jaxdistill.data.teacher_cache import segments
from jaxdistill.data.teacher_cache.formats import Format
from jaxdistill.data.teacher_cache.store import Store
from jaxdistill.errors import DataError

LEAF = "teacher"
_SHOWN = 60  # characters of an example


@dataclasses.dataclass(frozen=True, eq=False)
class TaughtDataset(Dataset):
    """Rows of tokens, each with `teacher`: the store's fields [L, ...], zeros where nothing counts.

    Of several teachers `teacher` has the fields of each stored one by its name, zeros in the rows
    that are for another. Of one that reads its own tokens they are of its view of the rows.

    Attributes:
      stores: where the teacher's signals lie, by its route; 0 is the one that is alone. Of several
        those that are not stored have none.
      names: of several teachers, in the order of routes; () of one.
      entries: int64 [S], in its store the entry of every segment; -1 where no position counts, or
        where its teacher has no store.
    """

    stores: Mapping[int, Store] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()
    entries: np.ndarray = None  # pyrefly: ignore

    @functools.cached_property
    def read(self) -> Dataset:
        """The rows in the tokens that the teacher read."""
        return self if self.second is None else second_rows(self)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`, as `Dataset` has it, with `teacher`; of several draws all of them.

        Raises:
          IndexError: if there is no such row.
          DamagedError: if the store is not as it was written.
        """
        row: dict[str, Any] = super().__getitem__(index)
        own = self.route(index) if self.names else 0
        said = {
            route: _fields(store, self.read.seq_len) if route != own else self._said(store, index)
            for route, store in self.stores.items()
        }
        return row | {LEAF: self._named(said)}

    def _said(self, store: Store, index: int) -> dict[str, np.ndarray]:
        """What the teacher of a row said of it."""
        here = [s for s in segments.of_row(self.read, index) if self.entries[s.number] >= 0]
        # All reads are on their way before the first is waited for.
        waits = [(s, store.reading(int(self.entries[s.number]))) for s in here]
        arrays = _fields(store, self.read.seq_len)
        for segment, wait in waits:
            stored = store.mask(int(self.entries[segment.number]))
            places = segment.place + np.flatnonzero(stored)
            for name, values in wait().items():
                arrays[name][places] = values
        return arrays

    def _named(self, by_route: Mapping[int, Any]) -> Any:
        """What is by routes, by the names of teachers; of the one alone as it is."""
        if not self.names:
            return by_route[0]
        return {self.names[route - 1]: one for route, one in by_route.items()}

    def empty_row(self) -> dict[str, Any]:
        """A row of padding."""
        forms = {route: store.format for route, store in self.stores.items()}
        return super().empty_row() | empty(self._named(forms), self.read.seq_len)

    def in_epoch(self, row: dict[str, Any], epoch: int) -> dict[str, Any]:
        """The row with what a batch of an epoch carries."""
        said = {0: row[LEAF]}
        if self.names:
            said = {route: row[LEAF][self.names[route - 1]] for route in self.stores}
        told = {
            route: self.stores[route].format.in_epoch(one, epoch) for route, one in said.items()
        }
        return row | {LEAF: self._named(told)}


def _fields(store: Store, seq_len: int) -> dict[str, np.ndarray]:
    """The fields of a row of which nothing is stored."""
    fields = store.format.fields().items()
    return {name: np.zeros((seq_len, *shape), dtype) for name, (dtype, shape) in fields}


def empty(form: Format | Mapping[str, Format], seq_len: int) -> dict[str, Any]:
    """What a row of padding carries of a stored teacher, or of several by their names."""

    def of(one: Format) -> dict[str, np.ndarray]:
        fields = one.batch_fields().items()
        return {name: np.zeros((seq_len, *shape), dtype) for name, (dtype, shape) in fields}

    alone = isinstance(form, Format)
    return {LEAF: of(form) if alone else {name: of(one) for name, one in form.items()}}


def beside(dataset: Dataset, store: Store | Mapping[str, Store], tokenizer: Any) -> TaughtDataset:
    """The data set with the entries of a store, all of them there.

    Args:
      dataset: the rows.
      store: what was captured; of several teachers by the names of those that are stored.
      tokenizer: of what the teacher reads, to show what is missing.

    Raises:
      DataError: if segments are missing: how many, and the first.
    """
    names: tuple[str, ...] = ()
    stores: dict[int, Store] = {}
    if isinstance(store, Store):
        stores[0] = store
    else:
        names = tuple(name for name, _, _ in dataset.teachers)
        stores |= {names.index(name) + 1: one for name, one in store.items()}
    read = dataset if dataset.second is None else second_rows(dataset)
    entries = np.full(len(read.arrays["segments"]), -1, np.int64)
    lacking: dict[int, _Lacking] = {}
    count = dict.fromkeys(stores, 0)
    for row, segment in segments.of(read):
        route = dataset.route(row) if names else 0
        if route not in stores:
            continue
        count[route] += 1
        if not segment.mask.any():
            continue
        stored = stores[route].find(segment.key, segment.mask)
        if stored is None:
            one = lacking.setdefault(route, _Lacking(row, segment))
            one.missing += 1
            one.other |= stores[route].has(segment.key)
        else:
            entries[segment.number] = stored
    if lacking:
        lines = [
            _told(one, read, tokenizer, stores[route], count[route], _name(names, route))
            for route, one in lacking.items()
        ]
        raise DataError("\n".join(lines))
    plain = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(Dataset)}
    return TaughtDataset(**plain, stores=stores, names=names, entries=entries)


def _name(names: tuple[str, ...], route: int) -> str | None:
    return names[route - 1] if names else None


@dataclasses.dataclass
class _Lacking:
    """What a store lacks of a data set.

    Attributes:
      row, first: the first segment, and where it is.
      missing: how many segments.
      other: whether other positions of one of them are there.
    """

    row: int
    first: segments.Segment
    missing: int = 0
    other: bool = False


def _told(
    lacking: _Lacking,
    dataset: Dataset,
    tokenizer: Any,
    store: Store,
    count: int,
    name: str | None,
) -> str:
    """What is missing, the first example, and why that may be."""
    segment = lacking.first
    text = tokenizer.decode(segment.tokens.tolist())
    shown = text[:_SHOWN] + ("..." if len(text) > _SHOWN else "")
    reasons = ""
    captured = store.notes.get("seq_len")
    if captured != dataset.seq_len:
        reasons += (
            f"; it was captured with data.seq_len = {captured}, here it is {dataset.seq_len}: "
            "another length makes other windows of longer documents"
        )
    if lacking.other:
        reasons += f"; it was captured with loss_on: {store.notes.get('loss_on')}, other positions"
    key = teacher_key(name)
    command = "teacher cache" if name is None else f"teacher cache --teacher {name}"
    return (
        f"data.{dataset.name}: {key}.cache = {store.place} lacks {lacking.missing} of {count} "
        f"segments; the first is {shown!r} (row {lacking.row}, {len(segment.tokens)} tokens)"
        f"{reasons}: `jaxdistill {command}` with this configuration adds what is missing"
    )
