"""Makes the numbers of chosen batches go wrong, for tests; off unless a variable asks for it.

    JAXDISTILL_POISON="nan@12,inf@30x1,gradient@41"

Batch 12 has the loss NaN, batch 30 an infinite one the first time that it is read and never again,
batch 41 a finite loss whose gradient is NaN. One token of one row is marked, by a position below 0:
what goes wrong begins on one device, in one micro-batch, and spreads as it would in earnest.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.errors import ConfigError
from jaxdistill.types import Batch, Mean

VARIABLE = "JAXDISTILL_POISON"
_MARKS = {"nan": -1, "inf": -2, "gradient": -3}
_ENTRY = re.compile(rf"({'|'.join(_MARKS)})@(\d+)(?:x(\d+))?")


class Poison:
    """Which batches go wrong, how, and how often.

    Args:
      text: as in the example above.

    Raises:
      ConfigError: if the text is not of this form.
    """

    def __init__(self, text: str):
        self._plan: dict[int, tuple[int, int | None]] = {}
        self._given: collections.Counter[int] = collections.Counter()
        for entry in text.split(","):
            found = _ENTRY.fullmatch(entry.strip())
            if found is None:
                raise ConfigError(
                    f"{VARIABLE}: {entry!r}: must be KIND@BATCH or KIND@BATCHxTIMES, KIND one of "
                    f"{', '.join(_MARKS)}"
                )
            kind, index, times = found.groups()
            self._plan[int(index)] = _MARKS[kind], None if times is None else int(times)

    def mark(self, index: int, batch: Batch) -> Batch:
        """The batch, marked in one place where it is its turn to go wrong."""
        if index not in self._plan:
            return batch
        mark, times = self._plan[index]
        self._given[index] += 1
        if times is not None and self._given[index] > times:
            return batch
        positions: Any = np.array(batch.positions)
        positions[index % len(positions), 0] = mark
        return dataclasses.replace(batch, positions=positions)


def from_environment() -> Poison | None:
    """What the variable asks for; nothing, as a rule."""
    text = os.environ.get(VARIABLE)
    return Poison(text) if text else None


def poisoned(loss: Any) -> Any:
    """The same loss, but for what marked tokens do to it."""

    def wrapped(params: Any, signal: Any, batch: Batch, knobs: Mapping[str, Array]) -> dict:
        marks = batch.positions
        sound = dataclasses.replace(batch, positions=jnp.maximum(marks, 0))
        means = loss(params, signal, sound, knobs)
        wrong = jnp.where(marks == _MARKS["nan"], jnp.nan, 0.0)
        wrong = jnp.where(marks == _MARKS["inf"], jnp.inf, wrong)
        total = means["loss"].total + wrong.sum() + _nan_gradient(params, marks)
        return means | {"loss": Mean(total, means["loss"].count)}

    return wrapped


def _nan_gradient(params: Any, marks: Array) -> Array:
    """0, whose gradient is NaN if a token is marked for it: that of sqrt at 0, times 0."""
    marked = jnp.any(marks == _MARKS["gradient"])
    nothing = 0.0 * jax.tree.leaves(params)[0].sum().astype(jnp.float32)
    return jnp.sqrt(nothing + jnp.where(marked, 0.0, 1.0)) - jnp.where(marked, 0.0, 1.0)
