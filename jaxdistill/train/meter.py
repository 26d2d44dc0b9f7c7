"""What a run spends: tokens and FLOPs a second, shares of time, memory."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import jax

from jaxdistill import chips


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of one device, or None where it is not known."""
    chip = chips.of_kind(device.device_kind)
    return None if chip is None else chip.flops


def memory_gib(devices: list[jax.Device]) -> float:
    """Highest use so far: of the fullest local device, or of the process where devices are CPUs."""
    stats = [device.memory_stats() for device in devices]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat]
    if peaks:
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Meter:
    """Wall time since the last reading, split by what the host waited for.

    Args:
      tokens_per_row: positions of a row.
      flops_per_row: matrix FLOPs of the step per row, teacher included, by formula.
      teacher_share: the teacher's share of those FLOPs. The teacher's time inside one compiled
        program cannot be measured, so this share of the computing time is reported for it.
      devices: of the mesh.

    Attributes:
      overlaps: whether the host should read a step's numbers while the next one runs.
    """

    def __init__(
        self,
        tokens_per_row: int,
        flops_per_row: float,
        teacher_share: float,
        devices: list[jax.Device],
    ):
        self._tokens = tokens_per_row
        self._flops = flops_per_row
        self._teacher_share = teacher_share
        self._devices = devices
        peak = peak_flops(devices[0])
        self._peak = None if peak is None else peak * len(devices)
        # A CPU has no queue worth filling: a step runs when it is called, and reading the numbers
        # of the one before would book its time on the wrong step.
        self.overlaps = devices[0].platform != "cpu"
        self._local = [d for d in devices if d.process_index == jax.process_index()]
        self.restart()

    def restart(self) -> None:
        """Begins a new reading."""
        self._began = time.perf_counter()
        self._taught, self._steps = 0, 0
        self._waited = {"data": 0.0, "checkpoint": 0.0, "other": 0.0}

    def asked(self, teacher: bool) -> None:
        """Notes that a step is dispatched, and whether it asks the teacher; unnoted ones do."""
        self._steps, self._taught = self._steps + 1, self._taught + teacher

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Books the time inside as spent on `what`: data, checkpoint or other.

        Time on `other` (evaluation, samples) is no part of a step's time.
        """
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited[what] += time.perf_counter() - began

    def read(self, steps: int, rows: int) -> dict[str, float]:
        """Rates over the `steps` since the last reading, of `rows` in all; begins a new one."""
        seconds = time.perf_counter() - self._began - self._waited["other"]
        waited = self._waited
        taught = self._taught / self._steps if self._steps else 1.0
        flops = self._flops * (1 - self._teacher_share * (1 - taught))
        share = self._flops * self._teacher_share * taught / flops if flops else 0.0
        self.restart()
        if steps < 1 or seconds <= 0:
            return {}
        rate = flops * rows / seconds
        result = {
            "perf/step_seconds": seconds / steps,
            "perf/tokens_per_second": self._tokens * rows / seconds,
            "perf/tflops_per_second": rate / 1e12,
            "perf/data_share": waited["data"] / seconds,
            "perf/checkpoint_share": waited["checkpoint"] / seconds,
            "perf/memory_gib": memory_gib(self._local),
        }
        if share:
            computing = 1 - (waited["data"] + waited["checkpoint"]) / seconds
            result["perf/teacher_share"] = share * max(computing, 0.0)
        if self._peak is not None:
            result["perf/mfu"] = rate / self._peak
        return result
