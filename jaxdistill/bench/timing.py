"""Times compiled functions in turn: the device's own clock where it has one, else the wall's."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxdistill import chips
from jaxdistill.kernels.choice import Device


class Timing(NamedTuple):
    """Seconds of one call.

    Attributes:
      median: of all rounds.
      low: the 10th percentile.
      high: the 90th.
      clock: "cupti" or "wall".
      seconds: of each round.
    """

    median: float
    low: float
    high: float
    clock: str
    seconds: tuple[float, ...]

    def over(self, other: "Timing") -> float:
        """Time over another's of the same rounds: the median of each round's ratio.

        What slows the machine for a while slows both sides of a round, and leaves their ratio.
        """
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def peak_bandwidth(device: Device) -> float | None:
    """Bytes per second of the device's memory, None where no data sheet is known."""
    chip = chips.of_kind(device.kind)
    return None if chip is None else chip.bandwidth


def in_turn(
    functions: Mapping[str, Callable[[], Any]], rounds: int, platform: str
) -> dict[str, Timing]:
    """Every function once a round, so that what slows the machine slows them all."""
    measure, clock = (_cupti(), "cupti") if platform == "gpu" else (None, "wall")
    measure, clock = (measure, clock) if measure else (_wall, "wall")
    for function in functions.values():
        jax.block_until_ready(function())  # compiled already; this warms caches and pools
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(measure(function))
    return {name: summary(values, clock) for name, values in seconds.items()}


def summary(values: list[float], clock: str) -> Timing:
    """The seconds of all rounds, and what they say."""
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    return Timing(statistics.median(ordered), at(0.1), at(0.9), clock, tuple(values))


def _wall(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def _cupti() -> Callable[[Callable[[], Any]], float] | None:
    """Kernel times by CUPTI, None where JAX or the driver does not offer it."""
    try:
        from jax.experimental.mosaic.gpu import profiler

        probe = profiler.Cupti(finalize=False)
    except Exception:  # an optional part of JAX, without a class of its own for its errors
        return None

    def measure(function: Callable[[], Any]) -> float:
        _, milliseconds = probe.measure(function)()
        assert milliseconds is not None, "a measured call has a time"
        return float(milliseconds) / 1e3

    return measure
