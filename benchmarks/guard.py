"""What it costs that non-finite numbers never reach the state: the step with and without, in turn.

    python -m benchmarks.guard --save guard_cpu

Both programs are compiled from the same step; in one of them the choice between the new and the old
state is left out. They take turns in one process, on a batch so small that the optimizer, where the
choice is made, is a large part of the step: that shows what the choice costs. It costs the same
whatever the batch is, so its share is of a step on a batch of usual size, measured after that. The
host's part, judging a step and looking for a spike of the loss, is measured by itself.
"""

import argparse
import json
import statistics
import tempfile
import time
from unittest import mock

import jax
import numpy as np

from benchmarks import duel
from jaxdistill import models, optim, teachers
from jaxdistill.methods import kd
from jaxdistill.report import MetricsWriter, ProgressLine
from jaxdistill.sharding import make_mesh
from jaxdistill.train import state as states
from jaxdistill.train import step as steps
from jaxdistill.train.guard import Guard, GuardPolicy, StepRecord
from jaxdistill.types import Batch, Span

VOCAB = 8192
SMALL, USUAL = (4, 128), (16, 256)  # rows and tokens of each
TEACHER = models.DecoderConfig(
    "llama", vocab_size=VOCAB, embed=384, mlp=1024, layers=6, heads=6, kv_heads=6, head_dim=64
)
STUDENT = models.DecoderConfig(
    "llama", vocab_size=VOCAB, embed=256, mlp=704, layers=4, heads=4, kv_heads=4, head_dim=64
)


def main() -> None:
    """Measures and prints; with --save it also writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    options = parser.parse_args()
    result = measure(options.rounds)
    print(json.dumps(result, indent=2))
    if options.save:
        print(duel.save(options.save, result))


def measure(rounds: int) -> dict:
    """Seconds are of all cores, which other work on the machine disturbs less than the clock's."""
    mesh = make_mesh(devices=jax.devices()[:1])
    guarded = _Program(mesh, *SMALL)
    with mock.patch.object(steps, "_chosen", lambda finite, new, old: new):
        bare = _Program(mesh, *SMALL)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    pairs = [("with", guarded), ("without", bare)]
    for number in range(rounds):
        for name, program in pairs if number % 2 else reversed(pairs):
            seconds[name].append(program.step())
    usual = _Program(mesh, *USUAL)
    step = statistics.median(usual.step() for _ in range(max(3, rounds // 4)))
    differences = [a - b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    cost, host = statistics.median(differences), _host_seconds(guarded.batch)
    small = statistics.median(seconds["without"])
    return {
        "baseline": "the same step without the choice between new and old state",
        "vocab": VOCAB,
        "rounds": rounds,
        "guard_seconds": cost,
        "guard_seconds_quartiles": statistics.quantiles(differences, n=4)[::2],
        "host_seconds": host,
        "small": {"rows_tokens": SMALL, "step_seconds": small, "share": cost / small},
        "usual": {"rows_tokens": USUAL, "step_seconds": step, "share": (cost + host) / step},
        "bytes_accessed": {name: program.cost.get("bytes accessed") for name, program in pairs},
    }


class _Program:
    """A compiled step with a state of its own."""

    def __init__(self, mesh, rows: int, length: int):
        tx = optim.optimizer(1e-4, knobs={"alpha": 0.5, "temperature": 2.0})
        loss = steps.make_loss(STUDENT, kd.objective(vocab=VOCAB), compute_dtype="float32")
        step = steps.make(loss, teachers.online(TEACHER, compute_dtype="float32"), tx)
        self._teacher = models.random(TEACHER, 1, "float32", mesh).params
        student = models.random(STUDENT, 0, "float32", mesh).params
        self._state = states.create(student, {}, tx, 0, mesh)
        self.batch = steps.place(_batch(rows, length), mesh)
        self._step = steps.compiled(step, self._state, self._teacher, self.batch, mesh)
        self.cost = self._step.cost_analysis() or {}
        self.step()

    def step(self) -> float:
        began = time.process_time()
        self._state, means = self._step(self._state, self._teacher, self.batch)
        jax.block_until_ready((self._state, means))
        return time.process_time() - began


def _batch(rows: int, length: int) -> Batch:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    ones = np.ones((rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(bool), positions, ones)


def _host_seconds(batch: Batch, count: int = 2000) -> float:
    """The median time to judge a step, with the window of losses full."""
    losses = 3 + 0.1 * np.random.default_rng(0).normal(size=count)
    seconds = []
    with tempfile.TemporaryDirectory() as folder, MetricsWriter(folder, False) as writer:
        guard, progress = Guard(folder, GuardPolicy()), ProgressLine(count, mode="none")
        for number, loss in enumerate(losses.tolist(), start=1):
            numbers = {"loss/total": loss, "optim/grad_norm": 1.0, "guard/in_a_row": 0}
            numbers |= {"knobs/alpha": 0.5, "knobs/temperature": 2.0}
            began = time.perf_counter()
            record = StepRecord(number, Span(number - 1, number), batch, "data")
            guard.judge(record, numbers, writer, progress)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[count // 2 :])


if __name__ == "__main__":
    main()
