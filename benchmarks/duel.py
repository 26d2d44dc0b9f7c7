"""Times two worker processes in turn, A B A B ..., and keeps each one's peak memory apart."""

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

RESULTS = pathlib.Path(__file__).parent / "results"


class Worker:
    """A process of its own that makes one step each time it is asked.

    Args:
      command: starts a program that calls `serve`.
    """

    def __init__(self, command: list[str]):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )

    def read(self) -> dict:
        """The worker's next answer."""
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self._process.args}: ended with {self._process.wait()}")

    def ask(self, word: str) -> dict:
        """Sends one word and waits for the answer."""
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """Ends the worker."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve(step: Callable[[], float], facts: dict) -> None:
    """The worker's side: answers `step` with seconds and value, `memory` with peak bytes.

    The peak counts from here on: what importing, compiling and warming up left behind is given back
    to the system first, where it can be.
    """
    _forget_peak()
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        if line.strip() == "step":
            began = time.perf_counter()
            value = step()
            answer = {"seconds": time.perf_counter() - began, "value": value}
        else:
            answer = {"peak_bytes": _peak_bytes()}
        print(json.dumps(answer), flush=True)


def _forget_peak() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # Linux: restart the high-water mark


def _peak_bytes() -> int:
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def duel(ours: Worker, theirs: Worker, rounds: int) -> dict:
    """Steps in turn; medians of the seconds, the median ratio of neighbours, peak memory."""
    seconds, peaks = in_turn({"ours": ours, "theirs": theirs}, rounds)
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds_range": {name: [min(v), max(v)] for name, v in seconds.items()},
        "time_ratio": ratio(seconds["ours"], seconds["theirs"]),
        "peak_mib": {name: round(peak / 2**20) for name, peak in peaks.items()},
        "memory_ratio": peaks["ours"] / peaks["theirs"],
    }


def in_turn(
    workers: dict[str, Worker], rounds: int, between: Callable[[], object] = lambda: None
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each worker's steps, one of each a round, and its peak bytes after all of them.

    Args:
      workers: by name.
      rounds: of all workers.
      between: is called once a round, while no worker works.
    """
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            time.sleep(0.3)  # a thread pool may spin for a while after its step
            seconds[name].append(worker.ask("step")["seconds"])
        time.sleep(0.3)
        between()
    return seconds, {name: worker.ask("memory")["peak_bytes"] for name, worker in workers.items()}


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median ratio of the steps of a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def save(name: str, result: dict) -> pathlib.Path:
    """Writes a result with date, machine and versions to results/."""
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "cpu": _cpu()}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    versions["python"] = platform.python_version()
    stamp = {"date": datetime.date.today().isoformat(), **machine, "versions": versions}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**stamp, **result}, indent=2) + "\n")
    return path


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
