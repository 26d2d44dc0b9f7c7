"""A built data set: rows of packed tokens, assembled on demand from arrays on disk."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data import arrays, quarantine
from jaxdistill.data.encode import Beside


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of tokens by index; the arrays stay on disk.

    Attributes:
      name: what the user calls it, `train`.
      folder: where the arrays lie.
      fingerprint: changes with any byte of the sources, the tokenizer, the template, the settings.
      kind: of its records: text, messages, completion, dialogue, pairs, dialogue_pairs.
      seq_len: the length of a row.
      pad: the token that fills rows.
      num_rows, num_tokens, num_loss_tokens: rows; tokens of documents; predictions that count.
      num_documents: documents, the pieces of long texts counted singly.
      records, used: records found = used + quarantined + empty + too_long + unlearned + unaligned.
      quarantined: broken records.
      empty, too_long, unlearned: records without text, without anything to learn within seq_len,
        and those that are marked as not learned.
      unaligned: records of which nothing can be compared with the tokens of a second model.
      without_context: records that hold nothing for the teacher's prompt.
      truncated: documents cut to seq_len.
      notices: what the user should know about how it was built.
      sources: names of what it was built from.
      origins: (first token, who wrote what follows) in order; empty where all of it is data.
      second: (length, padding) of rows in the tokens of a second model; None: there is none.
      teachers: of several, in the order of routes, the name of each with its rows and tokens, which
        lie one behind the other; empty where there are not several.
    """

    name: str
    folder: Path
    fingerprint: str
    kind: str
    seq_len: int
    pad: int
    num_rows: int
    num_tokens: int
    num_loss_tokens: int
    num_documents: int
    records: int
    used: int
    quarantined: int
    empty: int
    too_long: int
    unlearned: int
    unaligned: int
    truncated: int
    without_context: int = 0
    notices: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    origins: tuple[tuple[int, int], ...] = ()
    second: tuple[int, int] | None = None
    teachers: tuple[tuple[str, int, int], ...] = ()
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`.

        Returns:
          `tokens`, `targets`, `positions`, `segment_ids`: int32 [L]; `mask`: bool [L]; `origin`:
          int32 [L], only where a source is the teacher's or the student's own text; `groups` and
          `second`, see `types.Batch`, only where there is a second model; `route`, int32, only
          where there are several teachers. The target of a position
          is the next token of its own document; the last token of a document, or of a window of a
          long one, predicts nothing.

        Raises:
          IndexError: if there is no such row.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        row = self.empty_row()
        first, last = self.arrays["rows"][index : index + 2]
        place = 0
        for number, (start, length) in enumerate(self.arrays["segments"][first:last], start=1):
            here = slice(place, place + length)
            predicting = slice(place, place + length - 1)
            row["tokens"][here] = self.arrays["tokens"][start : start + length]
            row["targets"][predicting] = self.arrays["tokens"][start + 1 : start + length]
            row["mask"][predicting] = self.arrays["loss"][start + 1 : start + length]
            row["positions"][here] = np.arange(length)
            row["segment_ids"][here] = number
            if self.origins:
                row["origin"][here] = [code for first, code in self.origins if first <= start][-1]
            place += length
        if self.teachers:
            row["route"] = np.asarray(self.route(index), np.int32)
        if self.second is not None:
            self._fill_second(row, slice(first, last))
        return row

    def _fill_second(self, row: dict[str, Any], segments: slice) -> None:
        """The documents of a row in the tokens of the second model, and what is aligned of them."""
        arrays, place, other, groups = self.arrays, 0, 0, 0
        both = zip(arrays["segments"][segments], arrays["second_segments"][segments], strict=True)
        for number, ((start, length), (begin, count)) in enumerate(both, start=1):
            beside = Beside(
                arrays["groups"][start : start + length],
                arrays["second_tokens"][begin : begin + count],
                arrays["second_groups"][begin : begin + count],
            )
            put_second(row, beside, place, other, number, groups)
            place, other = place + int(length), other + int(count)
            groups += int(beside.groups.max())

    def empty_row(self) -> dict[str, Any]:
        """A row of padding with the fields that this data set's rows have."""
        row = empty_row(self.seq_len, self.pad, bool(self.origins))
        row |= empty_route() if self.teachers else {}
        return row if self.second is None else row | empty_second(self.seq_len, *self.second)

    def route(self, index: int) -> int:
        """Which of several teachers row `index` is for, from 1."""
        return int(self.arrays["row_routes"][index : index + 1][0])

    def of_teacher(self, name: str) -> "Dataset":
        """The rows for one of several teachers, in order."""
        place = [one for one, _, _ in self.teachers].index(name)
        first = sum(rows for _, rows, _ in self.teachers[:place])
        _, rows, tokens = self.teachers[place]
        arrays = self.arrays | {
            "rows": self.arrays["rows"][first : first + rows + 1],
            "row_routes": self.arrays["row_routes"][first : first + rows],
        }
        return dataclasses.replace(
            self,
            num_rows=rows,
            num_tokens=tokens,
            teachers=(self.teachers[place],),
            arrays=arrays,
        )

    def in_epoch(self, row: dict[str, Any], epoch: int) -> dict[str, Any]:
        """What a batch carries of a row in an epoch, counted from 0; here the row itself."""
        return row

    def write_left_out(self, path: Path) -> None:
        """Lists the records that were left out, as JSONL of file, line and reason, if any.

        Raises:
          StorageError: if the file cannot be written.
        """
        quarantine.export(self.folder, self.sources, path)

    def fill(self) -> float:
        """The share of the rows' positions that hold tokens."""
        return self.num_tokens / (self.num_rows * self.seq_len)


def empty_row(seq_len: int, pad: int, origins: bool = False) -> dict[str, np.ndarray]:
    """A row of padding: segment 0, nothing counted; with `origins` it says who wrote each token."""
    row = {
        "tokens": np.full(seq_len, pad, np.int32),
        "targets": np.full(seq_len, pad, np.int32),
        "mask": np.zeros(seq_len, bool),
        "positions": np.zeros(seq_len, np.int32),
        "segment_ids": np.zeros(seq_len, np.int32),
    }
    return row | ({"origin": np.zeros(seq_len, np.int32)} if origins else {})


def empty_route() -> dict[str, np.ndarray]:
    """What a row of padding has of several teachers: it is for none."""
    return {"route": np.zeros((), np.int32)}


def empty_second(seq_len: int, length: int, pad: int) -> dict[str, Any]:
    """What a row of padding has of a second model: nothing is aligned."""
    zeros = lambda: np.zeros(length, np.int32)
    second = {name: zeros() for name in ("positions", "segment_ids", "groups")}
    tokens = np.full(length, pad, np.int32)
    return {"groups": np.zeros(seq_len, np.int32), "second": {"tokens": tokens, **second}}


def put_second(
    row: dict[str, Any], beside: Beside, place: int, other: int, segment: int, groups: int
) -> None:
    """Writes a document into the tokens of the second model, and its groups into both views.

    Args:
      row: with the document itself from `place` on.
      beside: the document in the second model's tokens.
      place: where it begins in the first view.
      other: the same in the second.
      segment: its number in both.
      groups: how many those before it have.
    """
    second, count = row["second"], len(beside.ids)
    numbered = lambda own: np.where(own > 0, own + groups, 0)
    row["groups"][place : place + len(beside.groups)] = numbered(beside.groups)
    here = slice(other, other + count)
    second["tokens"][here] = beside.ids
    second["groups"][here] = numbered(beside.other_groups)
    second["positions"][here] = np.arange(count)
    second["segment_ids"][here] = segment


def open_dataset(
    folder: Path, facts: dict, name: str, notices: tuple[str, ...], sources: tuple[str, ...]
) -> Dataset:
    """Opens a verified folder; `sources` are the names of what it was built from."""
    counts = facts["counts"]
    origins = tuple((first, code) for first, code in facts.get("origins", ()))
    second = facts.get("second")
    return Dataset(
        name=name,
        folder=folder,
        fingerprint=facts["fingerprint"],
        kind=facts["kind"],
        seq_len=facts["seq_len"],
        pad=facts["pad"],
        notices=notices,
        sources=sources,
        origins=origins if any(code for _, code in origins) else (),
        second=(second["seq_len"], second["pad"]) if second else None,
        teachers=tuple((name, rows, tokens) for name, rows, tokens in facts.get("teachers", ())),
        arrays=arrays.of_rows(folder, [folder.parent / shard for shard in facts["shards"]]),
        **counts,
    )
