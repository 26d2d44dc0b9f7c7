"""Notices a loss that jumps up: by median and MAD, whatever the loss's own slope is."""

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

_RECENT = 16  # losses whose median is what the next loss is expected to be
_LEAST = 32  # surprises that must be known before one is judged
_FLOOR = 0.01  # of the expected loss: a smaller spread than this counts as this
_JUMP = (
    0.1  # a knob that moves by more than this share of max(1, itself) changes the loss by design
)


class LossSpike(NamedTuple):
    """A loss far above what was expected.

    Attributes:
      loss: of the step.
      expected: the median of the losses before it.
      spread: the usual distance between the two.
    """

    loss: float
    expected: float
    spread: float


class Spikes:
    """Judges the losses of a run, one after the other.

        surprise = loss - median(last 16 losses)
        spread = max(1.4826 MAD(surprises of the window), 1 % of that median)
        a spike: surprise > median(surprises of the window) + factor * spread

    A loss that falls in the warmup, or rises slowly because alpha or TAID's t moves, is as far from
    its recent median in one step as in the next: its slope is part of the median surprise. A knob
    that jumps (TED's second stage) starts the window anew. Losses that stay up are one spike, and
    after some steps the new normal. Until 32 surprises are known nothing is judged.

    Args:
      window: surprises that are remembered.
      factor: how many spreads make a spike.
    """

    def __init__(self, window: int, factor: float):
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=_RECENT)
        self._surprises: deque[float] = deque(maxlen=window)
        self._knobs: dict[str, float] = {}
        self._above = False

    def see(self, loss: float, knobs: Mapping[str, float]) -> LossSpike | None:
        """Takes a step's finite loss and its knobs; returns a spike at its first step."""
        if any(_jumped(self._knobs.get(name, value), value) for name, value in knobs.items()):
            self._losses.clear()
            self._surprises.clear()
        self._knobs = dict(knobs)
        spike = None
        if len(self._losses) == _RECENT:
            expected = statistics.median(self._losses)
            spike = self._judge(loss, expected)
            self._surprises.append(loss - expected)
        self._losses.append(loss)
        begins, self._above = spike is not None and not self._above, spike is not None
        return spike if begins else None

    def _judge(self, loss: float, expected: float) -> LossSpike | None:
        if len(self._surprises) < _LEAST:
            return None
        usual = statistics.median(self._surprises)
        mad = statistics.median(abs(surprise - usual) for surprise in self._surprises)
        spread = max(1.4826 * mad, _FLOOR * abs(expected))
        if loss - expected - usual <= self._factor * spread:
            return None
        return LossSpike(loss, expected, spread)

    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON can hold it."""
        return {
            "losses": list(self._losses),
            "surprises": list(self._surprises),
            "knobs": self._knobs,
            "above": self._above,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Remembers what `state` returned, and nothing else."""
        self._losses = deque(state.get("losses", ()), _RECENT)
        self._surprises = deque(state.get("surprises", ()), self._surprises.maxlen)
        self._knobs = dict(state.get("knobs", {}))
        self._above = bool(state.get("above", False))


def _jumped(old: float, new: float) -> bool:
    return abs(new - old) > _JUMP * max(1.0, abs(old))
