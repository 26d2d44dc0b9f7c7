"""Injectors: break a run at a named point, or make the numbers of chosen batches go wrong.

    Fault("checkpoint.seal:2:kill")                 the second time a save is about to be sealed
    Poison("nan@12,inf@30x1,gradient@41")

Batch 12 has the loss NaN, batch 30 an infinite one the first time that it is read and never again,
batch 41 a finite loss whose gradient is NaN. One token of one row is marked, by a position below 0:
what goes wrong begins on one device, in one micro-batch, and spreads as it would in earnest.

As a program it is `jaxdistill` with a fault, in every process that `launch` starts:

    python -m tests.inject step.before:13:wait launch -n 2 -- train CONFIG
"""

import collections
import dataclasses
import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill import cli
from jaxdistill.cli import launch
from jaxdistill.train.hooks import POINTS, Hooks
from jaxdistill.types import Batch, Mean


def _full(point: str) -> None:
    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected at {point})")


ACTIONS: dict[str, Callable[[str], None]] = {
    "kill": lambda point: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda point: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda point: os.kill(os.getpid(), signal.SIGINT),
    "full": _full,
    "wait": lambda point: time.sleep(2.0),
}


class Fault(Hooks):
    """Acts once: when a point is reached for the Nth time.

    Args:
      text: POINT:N:ACTION.

    Raises:
      ValueError: if there is no such point or action.
    """

    def __init__(self, text: str):
        point, _, rest = text.partition(":")
        count, _, action = rest.partition(":")
        if point not in POINTS or action not in ACTIONS or not count.isdecimal():
            raise ValueError(
                f"{text!r}: must be POINT:N:ACTION, POINT one of {', '.join(POINTS)}, "
                f"ACTION one of {', '.join(ACTIONS)}"
            )
        self._point, self._left, self._action = point, int(count), ACTIONS[action]

    def at(self, point: str) -> None:
        assert point in POINTS
        if point == self._point:
            self._left -= 1
            if self._left == 0:
                self._action(point)


_MARKS = {"nan": -1, "inf": -2, "gradient": -3}
_ENTRY = re.compile(rf"({'|'.join(_MARKS)})@(\d+)(?:x(\d+))?")


class Poison(Hooks):
    """Which batches go wrong, how, and how often.

    Args:
      text: KIND@BATCH or KIND@BATCHxTIMES, several with commas between.

    Raises:
      ValueError: if the text is not of this form.
    """

    def __init__(self, text: str):
        self._plan: dict[int, tuple[int, int | None]] = {}
        self._given: collections.Counter[int] = collections.Counter()
        for entry in text.split(","):
            match = _ENTRY.fullmatch(entry.strip())
            if match is None:
                raise ValueError(
                    f"{entry!r}: must be KIND@BATCH or KIND@BATCHxTIMES, KIND one of "
                    f"{', '.join(_MARKS)}"
                )
            kind, index, times = match.groups()
            self._plan[int(index)] = _MARKS[kind], None if times is None else int(times)

    def batch(self, index: int, batch: Batch) -> Batch:
        if index not in self._plan:
            return batch
        mark, times = self._plan[index]
        self._given[index] += 1
        if times is not None and self._given[index] > times:
            return batch
        positions: Any = np.array(batch.positions)
        positions[index % len(positions), 0] = mark
        return dataclasses.replace(batch, positions=positions)

    def loss(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        return poisoned(loss)


def poisoned(loss: Callable[..., Any]) -> Callable[..., Any]:
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


if __name__ == "__main__":
    launch.PROGRAM = ("-m", "tests.inject", sys.argv[1])
    sys.exit(cli.main(sys.argv[2:], hooks=Fault(sys.argv[1])))
