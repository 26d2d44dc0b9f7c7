"""Our head loss beside Liger's chunked one, where some Python here has torch and liger-kernel.

Liger runs in a process of its own, `liger_worker`, which reads no module of ours: its errors and
its memory are its own. Both compute alpha CE + (1 - alpha) KL(softmax(t / T) || softmax(s / T)),
without T^2, which Liger does not have, and the gradients of the student's hidden states and head.
"""

import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import kernels
from jaxdistill.bench.cases import log_softmax64
from jaxdistill.bench.shapes import Shape, label

ALPHA, TEMPERATURE = 0.5, 2.0
WORKER = pathlib.Path(__file__).with_name("liger_worker.py")
ARRAYS = ("hidden", "head", "teacher_hidden", "teacher_head", "labels")


class Skipped(Exception):
    """Liger cannot be asked here; the message says why."""


class PeerProcess:
    """A peer's process, Liger's where nothing is said: it answers one question after the other.

    Args:
      python: that has torch and the peer.
      folder: where arrays are exchanged.
      script: that it runs.
      more: words behind the folder.
    """

    def __init__(
        self, python: str, folder: pathlib.Path, script: pathlib.Path = WORKER, *more: str
    ):
        self._told = folder / "stderr.txt"
        with self._told.open("w") as stderr:
            self._process = subprocess.Popen(
                [python, str(script), str(folder), *more],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            )  # fmt: skip

    def ask(self, **words: Any) -> dict[str, Any]:
        """Its answer to a question.

        Raises:
          Skipped: where it ended instead, with its last line.
        """
        assert self._process.stdin is not None and self._process.stdout is not None, "are pipes"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
            while line := self._process.stdout.readline():
                if line.startswith("{"):
                    return json.loads(line)
        code, lines = self._process.wait(), self._told.read_text().strip().splitlines()
        raise Skipped(lines[-1] if lines else f"its process ended with {code}")

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def run(shape: Shape, rounds: int, python: str | None = None) -> dict[str, Any]:
    """Both on a small problem against float64, then in turn on a shape.

    Args:
      shape: of what is timed.
      rounds: of timing.
      python: that has torch and liger-kernel; None: this one.

    Returns:
      {"ok", "error": of ours and Liger's, "rows", "versions"}, or {"ok": True, "skipped": why}.
    """
    with tempfile.TemporaryDirectory(prefix="jaxdistill-liger-") as name:
        folder = pathlib.Path(name)
        worker = PeerProcess(python or sys.executable, folder)
        try:
            versions = worker.ask(do="begin", alpha=ALPHA, temperature=TEMPERATURE)
            facts = {"versions": versions, **_compared(worker, folder)}
            return facts | {"rows": _timed(worker, shape, rounds)}
        except Skipped as reason:
            return {"ok": True, "skipped": str(reason)[:500]}
        finally:
            worker.close()


def _compared(worker: PeerProcess, folder: pathlib.Path) -> dict[str, Any]:
    """The largest errors of values and gradients in float32, relative to the largest number."""
    arrays = _arrays(Shape("small", 64, 640, 32, 64, "float32"))
    for name, array in zip(ARRAYS, arrays, strict=True):
        np.save(folder / f"{name}.npy", np.asarray(array))
    (folder / "answers").mkdir()
    value = worker.ask(do="answer")["value"]
    load = lambda name: np.load(folder / "answers" / f"{name}.npy", allow_pickle=False)
    theirs = value, load("hidden"), load("head")
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(jax.value_and_grad(_loss, argnums=(0, 1)))(*arrays)
    exact = _definition(*(np.asarray(x) for x in arrays))
    off = lambda got, want: float(np.abs(np.float64(got) - want).max() / np.abs(want).max())
    errors = {
        "jaxdistill": max(map(off, (ours[0], *ours[1]), exact)),
        "liger": max(map(off, theirs, exact)),
    }
    # What Liger makes is told, and is no fault of ours.
    return {"ok": errors["jaxdistill"] < 2e-5, "error": errors}


def _timed(worker: PeerProcess, shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """A row for each, in turn: neither works while the other does."""
    arrays = _arrays(shape)
    program = jax.jit(jax.value_and_grad(_loss, argnums=(0, 1))).lower(*arrays).compile()
    jax.block_until_ready(program(*arrays))
    problem = {name: value for name, value in shape._asdict().items() if name != "name"}
    worker.ask(do="prepare", **problem)
    seconds: dict[str, list[float]] = {"jaxdistill": [], "liger": []}
    peak = None
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        seconds["jaxdistill"].append(time.perf_counter() - began)
        told = worker.ask(do="step")
        seconds["liger"].append(told["seconds"])
        peak = told["peak_mib"]
    memory = program.memory_analysis()
    temporary = {
        "jaxdistill": memory.temp_size_in_bytes / 2**20 if memory else None,
        "liger": peak,
    }
    pairs = zip(seconds["jaxdistill"], seconds["liger"], strict=True)
    ratio = {"jaxdistill": statistics.median(a / b for a, b in pairs), "liger": 1.0}
    return [
        {
            "shape": label(shape),
            "function": f"{name} beside Liger",
            "ms": statistics.median(taken) * 1e3,
            "ratio": ratio[name],
            "temporary_mib": temporary[name],
            "clock": "wall",
        }
        for name, taken in seconds.items()
    ]


def _arrays(shape: Shape) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    normal = lambda key, *dims: jax.random.normal(key, dims, jnp.dtype(shape.dtype))
    scaled = lambda key, *dims: (normal(key, *dims) / np.sqrt(dims[-1])).astype(shape.dtype)
    return (
        normal(keys[0], shape.tokens, shape.student),
        scaled(keys[1], shape.vocab, shape.student),
        normal(keys[2], shape.tokens, shape.teacher),
        scaled(keys[3], shape.vocab, shape.teacher),
        jax.random.randint(keys[4], (shape.tokens,), 0, shape.vocab),
    )


def _loss(hidden, head, teacher_hidden, teacher_head, labels):
    return kernels.linear_divergence(
        hidden, head, teacher_hidden, teacher_head, labels=labels, alpha=ALPHA,
        temperature=TEMPERATURE, scale_by_t2=False, monitor=False,
    )[0]  # fmt: skip


def _definition(hidden, head, teacher_hidden, teacher_head, labels) -> tuple[Any, ...]:
    """Value and both gradients in float64."""
    given = (hidden, head, teacher_hidden, teacher_head)
    h, w, ht, wt = (np.asarray(x, np.float64) for x in given)
    s, t, rows = h @ w.T, ht @ wt.T, np.arange(len(h))
    log_q, log_p = log_softmax64(s / TEMPERATURE), log_softmax64(t / TEMPERATURE)
    p, plain = np.exp(log_p), log_softmax64(s)
    kl, ce = (p * (log_p - log_q)).sum(1), -plain[rows, labels]
    by_ce = np.exp(plain)
    by_ce[rows, labels] -= 1
    slope = ALPHA * by_ce + (1 - ALPHA) / TEMPERATURE * (np.exp(log_q) - p)
    slope /= len(h)
    return (ALPHA * ce + (1 - ALPHA) * kl).mean(), slope @ w, slope.T @ h
