"""Runs a benchmark over its shapes and returns rows: time, bandwidth, products, memory, error."""

import datetime
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxdistill import device_memory
from jaxdistill.bench import cases, peer_logprobs, timing, token_cases
from jaxdistill.bench.shapes import Shape, label
from jaxdistill.kernels import choice

COLUMNS = (
    "shape", "function", "ms", "ms_p10", "ms_p90", "ratio", "gb_per_second", "percent_of_peak",
    "tflop_per_second", "temporary_mib", "error", "clock",
)  # fmt: skip
KINDS: dict[str, tuple[Callable[[Shape], cases.Case], ...]] = {
    "kernels": (cases.dense,),
    "loss": (
        cases.head,
        token_cases.logprobs,
        token_cases.masses,
        token_cases.known_tokens,
        token_cases.generalized,
        token_cases.sampled,
        token_cases.columns,
    ),
}


def run(
    kind: str,
    shapes: tuple[Shape, ...],
    rounds: int,
    notice: Callable[[str], None],
    peers_python: str | None = None,
) -> dict[str, Any]:
    """Measures every function on every shape.

    Args:
      kind: "kernels" (logits in) or "loss" (hidden states and heads in).
      shapes: of the problems; one that does not fit in memory is noticed and left out.
      rounds: of timing.
      notice: receives one line for each shape, and for each peer that is left out.
      peers_python: of "loss": a Python that may have TRL and Liger; None: this one.

    Returns:
      {"device", "jax", "date", "load", "peers", "rows"}; `peers` are the versions of those that
      are there, `load` is the machine's load average before it
      began, None where there is none; a row's `ratio` is its time over that of naive log_softmax on
      the same problem in the same round, the median of all rounds.
    """
    device = choice.current_device()
    rows: list[dict[str, Any]] = []
    peers = peer_logprobs.there(peers_python, notice) if kind == "loss" else {}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    for shape in shapes:
        try:
            rows += measure(kind, shape, rounds, device)
            for peer in peers:
                peer_rows = peer_logprobs.rows(peer, shape, rounds, peers_python, notice)
                rows += [{"shape": label(shape), **row} for row in peer_rows]
            notice(f"{label(shape)}: measured")
        except jax.errors.JaxRuntimeError as error:
            if not device_memory.is_full(error):
                raise
            notice(f"{label(shape)}: does not fit in this device's memory, left out")
    return {
        "kind": kind,
        "device": device.kind,
        "platform": device.platform,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "rounds": rounds,
        "load": load,
        "peers": peers,
        "rows": rows,
    }


def measure(
    kind: str, shape: Shape, rounds: int, device: choice.Device
) -> Iterator[dict[str, Any]]:
    """The rows of one shape, a row for each function of each case."""
    for make in KINDS[kind]:
        yield from _measure(kind, shape, make(shape), rounds, device)


def _measure(
    kind: str, shape: Shape, case: cases.Case, rounds: int, device: choice.Device
) -> Iterator[dict[str, Any]]:
    compiled = {
        name: jax.jit(function).lower(*case.arguments).compile()
        for name, function in case.functions.items()
    }
    truth, small = cases.exact(case)
    errors = {
        name: abs(float(jax.jit(function)(*small.arguments)[0]) / truth - 1)
        for name, function in small.functions.items()
    }
    calls = {
        name: lambda program=program: program(*case.arguments) for name, program in compiled.items()
    }
    times = timing.in_turn(calls, rounds, device.platform)
    peak = timing.peak_bandwidth(device)
    for name, taken in times.items():
        rate = case.algorithm_bytes / taken.median
        memory = compiled[name].memory_analysis()
        yield {
            "shape": label(shape),
            "function": name,
            "ms": taken.median * 1e3,
            "ms_p10": taken.low * 1e3,
            "ms_p90": taken.high * 1e3,
            "ratio": taken.over(times[case.naive]),
            "gb_per_second": rate / 1e9 if kind == "kernels" else None,
            "percent_of_peak": 100 * rate / peak if peak and kind == "kernels" else None,
            "tflop_per_second": case.flops / taken.median / 1e12 if case.flops else None,
            "temporary_mib": memory.temp_size_in_bytes / 2**20 if memory else None,
            "error": errors[name],
            "clock": taken.clock,
        }
