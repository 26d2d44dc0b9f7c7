"""Log-probabilities by TRL's and Liger's functions, where some Python here has torch and either.

Each runs in a process of its own, `peer_logprobs_worker`, which reads no module of ours. All solve
the problem of `token_cases.logprobs`: mean_i a_i log q_i of given tokens, and its gradients by
hidden states and head.
"""

import contextlib
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdistill.bench import cases, timing, token_cases
from jaxdistill.bench.liger import PeerProcess, Skipped
from jaxdistill.bench.shapes import Shape

WORKER = pathlib.Path(__file__).with_name("peer_logprobs_worker.py")
ARRAYS = ("hidden", "head", "ids", "advantages")


class Peer(NamedTuple):
    """Who is measured beside ours: a name, and the package that it comes in."""

    name: str
    package: str


PEERS = {"trl": Peer("TRL", "trl"), "liger": Peer("Liger", "liger-kernel")}


def there(python: str | None, notice: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """The peers that a Python has, with their versions; of each other one a notice says why not.

    Args:
      python: that may have torch, trl and liger-kernel; None: this one.
      notice: receives one line for each peer that is left out.

    Returns:
      By key of `PEERS`, {package: version}.
    """
    seconds = {}
    for key, peer in PEERS.items():
        with tempfile.TemporaryDirectory(prefix="jaxdistill-peer-") as name:
            try:
                with _worker(key, python, pathlib.Path(name)) as worker:
                    seconds[key] = worker.ask(do="begin")
            except Skipped as reason:
                notice(
                    f"log q, {peer.name}: left out: {str(reason)[:200]}; --peers-python PYTHON "
                    f"names one that has torch and {peer.package}"
                )
    return seconds


def rows(
    key: str, shape: Shape, rounds: int, python: str | None, notice: Callable[[str], None]
) -> list[dict[str, Any]]:
    """What a peer takes on a shape, in turn with naive log_softmax here; none where it fails.

    Args:
      key: of `PEERS`, which `there` has found.
      shape: of the problem.
      rounds: of timing.
      python: as in `there`.
      notice: receives a line where the peer fails on this shape.
    """
    name = f"log q, {PEERS[key].name}"
    with tempfile.TemporaryDirectory(prefix="jaxdistill-peer-") as folder:
        try:
            with _worker(key, python, pathlib.Path(folder)) as worker:
                worker.ask(do="begin")
                return [
                    {"function": name, **_measured(worker, pathlib.Path(folder), shape, rounds)}
                ]
        except Skipped as reason:
            notice(f"{name}: failed on {shape.name}, left out: {str(reason)[:200]}")
            return []


@contextlib.contextmanager
def _worker(key: str, python: str | None, folder: pathlib.Path) -> Iterator[PeerProcess]:
    worker = PeerProcess(python or sys.executable, folder, WORKER, key)
    try:
        yield worker
    finally:
        worker.close()


def _measured(
    worker: PeerProcess, folder: pathlib.Path, shape: Shape, rounds: int
) -> dict[str, Any]:
    case = token_cases.logprobs(shape)
    truth, small = cases.exact(case)
    for name, array in zip(ARRAYS, small.arguments, strict=True):
        wide = array if np.issubdtype(array.dtype, np.integer) else array.astype("float32")
        np.save(folder / f"{name}.npy", np.asarray(wide))
    error = abs(worker.ask(do="answer", dtype=shape.dtype)["value"] / truth - 1)
    naive = jax.jit(case.functions[case.naive]).lower(*case.arguments).compile()
    jax.block_until_ready(naive(*case.arguments))
    told = worker.ask(
        do="prepare", tokens=shape.tokens, vocab=shape.vocab, width=shape.student, dtype=shape.dtype
    )
    ours, theirs = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(naive(*case.arguments))
        ours.append(time.perf_counter() - began)
        theirs.append(worker.ask(do="step")["seconds"])
    taken, beside = timing.summary(theirs, "wall"), timing.summary(ours, "wall")
    return {
        "ms": taken.median * 1e3,
        "ms_p10": taken.low * 1e3,
        "ms_p90": taken.high * 1e3,
        "ratio": taken.over(beside),
        "gb_per_second": None,
        "percent_of_peak": None,
        "tflop_per_second": case.flops / taken.median / 1e12,
        "temporary_mib": told["peak_mib"],
        "error": error,
        "clock": "wall",
    }
