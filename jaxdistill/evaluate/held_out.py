"""A set of held-out rows: read once per measurement, in order, on the mesh."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxdistill.commands import EvalData
from jaxdistill.data import batching, pipeline
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.sources import open_source
from jaxdistill.evaluate import meter, speed
from jaxdistill.sharding import local_rows
from jaxdistill.train.step import place
from jaxdistill.types import Batch


class HeldOut:
    """Held-out rows, and how models are measured on them.

    Attributes:
      name: what the rows are, for the table.
      mesh: where they are put.
      dataset: the data that they are of.
      available: rows that the data has, measured or not.
      by_teacher: of several teachers that have rows, those of each, which share max_rows equally.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        max_rows: int | None,
        mesh: Mesh,
        name: str,
        placed: Callable[[Batch], Batch] | None = None,
    ):
        """Rows of a data set; `placed` puts a batch on the mesh, None being `step.place`."""
        self.dataset = dataset
        self._batch_size = batch_size
        self.available = len(dataset)
        self._rows = len(dataset) if max_rows is None else min(max_rows, len(dataset))
        self.mesh = mesh
        self._placed = placed or functools.partial(place, mesh=mesh)
        self.by_teacher = self._by_teacher(max_rows)
        if self.by_teacher:
            self._rows = sum(one._rows for one in self.by_teacher.values())
        self.name = f"{name}, {self._rows} rows of {dataset.seq_len} tokens"

    def _by_teacher(self, max_rows: int | None) -> dict[str, "HeldOut"]:
        """The parts of a data set for several teachers; {} of another."""
        names = [name for name, rows, _ in self.dataset.teachers if rows]
        if len(names) < 2:
            return {}
        most = None if max_rows is None else -(-max_rows // len(names))
        return {
            name: HeldOut(self.dataset.of_teacher(name), self._batch_size, most, self.mesh, name)
            for name in names
        }

    def replaced(self, dataset: Dataset, mesh: Mesh | None = None) -> "HeldOut":
        """The same rows of another data set, which has as many; on another mesh, where given.

        They carry what the data set has, and no more.
        """
        same = HeldOut(dataset, self._batch_size, self._rows, mesh or self.mesh, "")
        same.name = self.name
        return same

    def batches(self) -> Iterator[Batch]:
        """Every row once, in order; whole batches, so up to batch_size - 1 rows more.

        Of several teachers each batch is for one.
        """
        for part in self.by_teacher.values():
            yield from part.batches()
        if self.by_teacher:
            return
        feed = batching.eval_batches(
            self.dataset,
            batch_size=self._batch_size,
            rows=local_rows(self.mesh, self._batch_size),
        )
        for index, batch in feed:
            if index * self._batch_size >= self._rows:
                return
            yield self._placed(batch)

    def text_bytes(self, tokenizer: Any) -> int:
        """Bytes of UTF-8 that the counted tokens of all measured rows stand for.

        Special tokens stand for none. Where a window cuts a character in two, both halves count
        as the tokenizer decodes them.
        """
        total = 0
        for row in self._measured():
            for number in np.unique(row["segment_ids"][row["mask"]]):
                own = row["targets"][row["mask"] & (row["segment_ids"] == number)]
                text = tokenizer.decode(own.tolist(), skip_special_tokens=True)
                total += len(text.encode("utf-8", "replace"))
        return total

    def documents(self, tokenizer: Any) -> list[str]:
        """The texts of all measured rows, windows of long ones apart."""
        return [
            tokenizer.decode(
                row["tokens"][row["segment_ids"] == number].tolist(), skip_special_tokens=True
            )
            for row in self._measured()
            for number in np.unique(row["segment_ids"])
            if number
        ]

    def _measured(self) -> Iterator[dict[str, np.ndarray]]:
        """The rows that `batches` has, padding left out."""
        batches = -(-self._rows // self._batch_size)
        for index in range(min(batches * self._batch_size, len(self.dataset))):
            yield self.dataset[index]

    def measure(
        self,
        step: meter.MeterStep,
        params: Any,
        teacher_params: Any = None,
        knobs: Any = None,
        *,
        text_bytes: int | None = None,
    ) -> dict[str, Any]:
        """What one program of the meter measures of one model; see `meter.run`."""
        return meter.run(
            step,
            params,
            teacher_params,
            self.batches(),
            knobs or {},
            self.mesh,
            text_bytes=text_bytes,
        )

    def speed(self, step: meter.MeterStep, params: Any) -> float:
        """Tokens a second of scoring one batch by a model alone."""
        return speed.tokens_per_second(step, params, next(self.batches()), self.mesh)

    def beginnings(self, count: int, tokens: int) -> list[list[int]]:
        """The first tokens of the first document of `count` rows, spread over the set."""
        chosen = range(0, self._rows, max(1, self._rows // max(1, count)))[:count]
        beginnings = []
        for index in chosen:
            row = self.dataset[index]
            length = min(tokens, int((row["segment_ids"] == 1).sum()) // 2 + 1)
            beginnings.append([int(token) for token in row["tokens"][:length]])
        return beginnings


def open_rows(
    options: EvalData,
    tokenizer: Any,
    mesh: Mesh,
    *,
    seq_len: int,
    max_rows: int | None = None,
    name: str = "eval",
    **reading: Any,
) -> HeldOut:
    """Rows of files or named sources, tokenised for a model.

    Args:
      options: the text, and how many rows are read at a time.
      tokenizer: of the model.
      mesh: where batches are put.
      seq_len: tokens in a row.
      max_rows: use only so many; None: all.
      name: of the set, for messages.
      reading: further options of `pipeline.build`, such as loss_on.

    Raises:
      DataError, ConfigError, ModelError, StorageError: as `pipeline.build`.
    """
    dataset = pipeline.build(
        [open_source(path, format=options.format) for path in options.data],
        tokenizer,
        seq_len=seq_len,
        cache_dir=options.cache_dir,
        max_bad_fraction=options.max_bad_fraction,
        name=name,
        **reading,
    )
    return HeldOut(dataset, options.batch_size, max_rows, mesh, ", ".join(options.data))
