"""A set of held-out rows: read once per measurement, in order, on the mesh."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxdistill import evaluate
from jaxdistill.data import pipeline
from jaxdistill.data.dataset import Dataset
from jaxdistill.train.step import place
from jaxdistill.types import Batch


class HeldOut:
    """Held-out rows, and how models are measured on them.

    Attributes:
      name: what the rows are, for the table.
      mesh: where they are put.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, max_rows: int | None, mesh: Mesh, name: str
    ):
        self._dataset = dataset
        self._batch_size = batch_size
        self._rows = len(dataset) if max_rows is None else min(max_rows, len(dataset))
        self.mesh = mesh
        self.name = f"{name}, {self._rows} rows of {dataset.seq_len} tokens"

    def batches(self) -> Iterator[Batch]:
        """Every row once, in order; whole batches, so up to batch_size - 1 rows more."""
        feed = pipeline.eval_batches(
            self._dataset,
            batch_size=self._batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for index, batch in feed:
            if index * self._batch_size >= self._rows:
                return
            yield place(batch, self.mesh)

    def measure(
        self, step: evaluate.EvalStep, params: Any, teacher_params: Any, knobs: Any
    ) -> dict[str, float]:
        """The metrics of one model by one program."""
        return evaluate.run(step, params, teacher_params, self.batches(), knobs, self.mesh)

    def speed(self, step: evaluate.EvalStep, params: Any) -> float:
        """Tokens a second of scoring one batch by a model alone."""
        return evaluate.tokens_per_second(step, params, next(self.batches()), self.mesh)

    def beginnings(self, count: int, tokens: int) -> list[list[int]]:
        """The first tokens of the first document of `count` rows, spread over the set."""
        chosen = range(0, self._rows, max(1, self._rows // max(1, count)))[:count]
        found = []
        for index in chosen:
            row = self._dataset[index]
            length = min(tokens, int((row["segment_ids"] == 1).sum()) // 2 + 1)
            found.append([int(token) for token in row["tokens"][:length]])
        return found
