"""The fused head loss beside TRL's chunked divergence, Liger's chunked loss and plain PyTorch.

    python -m venv peers && peers/bin/pip install torch==2.13.0 transformers accelerate datasets
    peers/bin/pip install --no-deps trl==1.16.0 liger-kernel==0.8.5
    python -m benchmarks.peers.linear_loss --peers-python peers/bin/python

KL(softmax(teacher / T) || softmax(student / T)) from hidden states and heads, T = 2, without T^2
(TRL and Liger have none), mean over tokens: value, and gradients of the student's hidden states and
head. All read the same float32 arrays. Compilation and two calls come before the clock and before
the high-water mark of memory.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

from benchmarks import duel

TEMPERATURE = 2.0
NAMES = ("hidden", "head", "teacher_hidden", "teacher_head")
BASELINE = "TRL 1.16 chunked divergence, Liger 0.8.5 chunked loss, plain PyTorch"


def main() -> None:
    """Starts the workers and prints times, memory and ratios."""
    race("linear_loss", __doc__, WORKERS, BASELINE)


def race(module: str, doc: str, workers: dict, baseline: str) -> None:
    """The command of a problem: runs its workers in turn, and saves the result where asked.

    Args:
      module: of `benchmarks.peers`, which this very command starts the workers of.
      doc: what it says of itself.
      workers: name -> function of the folder with the arrays, "jaxdistill" among them.
      baseline: what the peers are.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--student", type=int, default=512)
    parser.add_argument("--teacher", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--worker", choices=workers, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        workers[options.worker](options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_arrays(pathlib.Path(folder), options)
        result = {"baseline": baseline, "load_average": os.getloadavg()[0]}
        result |= _in_turn(module, folder, tuple(workers), options)
    print(json.dumps(result, indent=2))
    values = [entry["value"] for entry in result["losses"].values()]
    assert max(map(abs, values)) / min(map(abs, values)) - 1 < 1e-4, f"not the same: {values}"
    if options.save:
        print(duel.save(options.save, result))


def _write_arrays(folder: pathlib.Path, options: argparse.Namespace) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    shapes = {
        "hidden": (options.tokens, options.student),
        "head": (options.vocab, options.student),
        "teacher_hidden": (options.tokens, options.teacher),
        "teacher_head": (options.vocab, options.teacher),
        "advantages": (options.tokens,),
    }
    for name, shape in shapes.items():
        array = rng.standard_normal(shape, np.float32)
        if "head" in name:
            array *= 2 / shape[1] ** 0.5
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "ids.npy", rng.integers(0, options.vocab, options.tokens))


def _in_turn(module: str, folder: str, names: tuple[str, ...], options: argparse.Namespace) -> dict:
    """All workers in turn, round after round."""
    workers, facts = {}, {}
    peers = [name for name in names if name != "jaxdistill"]
    for name in names:
        python = sys.executable if name == "jaxdistill" else options.peers_python
        command = [python, "-m", f"benchmarks.peers.{module}", "--folder", folder]
        workers[name] = duel.Worker([*command, "--worker", name])
        facts[name] = workers[name].read()
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            time.sleep(0.3)  # a thread pool may spin for a while after its call
            seconds[name].append(worker.ask("step")["seconds"])
    peaks = {name: worker.ask("memory")["peak_bytes"] for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    losses = {
        name: {
            **facts[name],
            "seconds": statistics.median(seconds[name]),
            "seconds_range": [min(seconds[name]), max(seconds[name])],
            "peak_mib": round(peaks[name] / 2**20),
        }
        for name in workers
    }
    ours = losses["jaxdistill"]

    def time_ratio(name: str) -> float:
        pairs = zip(seconds["jaxdistill"], seconds[name], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    fastest = min(peers, key=lambda name: losses[name]["seconds"])
    smallest = min(peers, key=lambda name: losses[name]["peak_mib"])
    return {
        "shape": {k: getattr(options, k) for k in ("tokens", "vocab", "student", "teacher")},
        "losses": losses,
        "time_ratios": {name: time_ratio(name) for name in peers},
        "peak_ratios": {name: ours["peak_mib"] / losses[name]["peak_mib"] for name in peers},
        "fastest_peer": fastest,
        "smallest_peer": smallest,
    }


def _serve(step, facts: dict) -> None:
    """Warms up, then answers."""
    began = time.perf_counter()
    value = step()
    facts |= {"first_call_seconds": time.perf_counter() - began, "value": value}
    step()
    duel.serve(step, facts)


def jax_worker(loss_of, names: tuple[str, ...]):
    """A worker that differentiates a JAX loss of the named arrays by the first two."""

    def work(folder: pathlib.Path) -> None:
        import jax
        import numpy as np

        arrays = [jax.numpy.asarray(np.load(folder / f"{name}.npy")) for name in names]
        program = jax.jit(jax.value_and_grad(loss_of(), argnums=(0, 1))).lower(*arrays).compile()

        def step() -> float:
            value, gradients = program(*arrays)
            jax.block_until_ready(gradients)
            return float(value)

        _serve(step, {"jax": jax.__version__})

    return work


def torch_worker(loss_of, version: str, names: tuple[str, ...]):
    """A worker that differentiates a torch loss of the named arrays by the first two."""

    def work(folder: pathlib.Path) -> None:
        import importlib.metadata

        import numpy as np
        import torch

        hidden, head, *rest = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in names)
        hidden.requires_grad_()
        head.requires_grad_()
        loss = loss_of()

        def step() -> float:
            hidden.grad = head.grad = None
            value = loss(hidden, head, *rest)
            value.backward()
            return value.item()

        _serve(step, {version: importlib.metadata.version(version), "torch": torch.__version__})

    return work


def _ours():
    from jaxdistill.kernels import linear_divergence

    def loss(hidden, head, teacher_hidden, teacher_head):
        return linear_divergence(
            hidden, head, teacher_hidden, teacher_head,
            temperature=TEMPERATURE, scale_by_t2=False,
        )[0]  # fmt: skip

    return loss


def _plain():
    import torch.nn.functional as functional

    def loss(hidden, head, teacher_hidden, teacher_head):
        log_q = functional.log_softmax(hidden @ head.T / TEMPERATURE, -1)
        log_p = functional.log_softmax(teacher_hidden @ teacher_head.T / TEMPERATURE, -1)
        return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return loss


def _trl():
    import torch
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(hidden, head, teacher_hidden, teacher_head):
        mask = torch.ones(1, hidden.shape[0])
        value, _, _ = _chunked_divergence_loss(
            hidden[None], teacher_hidden[None], head, teacher_head, mask, beta=0.0,
            temperature=TEMPERATURE,
        )  # fmt: skip
        return value

    return loss


def _liger():
    import torch
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    def loss(hidden, head, teacher_hidden, teacher_head):
        labels = torch.zeros(hidden.shape[0], dtype=torch.long)
        return LigerFusedLinearJSDFunction.apply(
            hidden, head, teacher_hidden, teacher_head, labels, None, None,
            0.0, 1.0, 0.0, -100, TEMPERATURE, True, 1024,
        )  # fmt: skip

    return loss


WORKERS = {
    "trl": torch_worker(_trl, "trl", NAMES),
    "liger": torch_worker(_liger, "liger-kernel", NAMES),
    "torch": torch_worker(_plain, "torch", NAMES),
    "jaxdistill": jax_worker(_ours, NAMES),
}

if __name__ == "__main__":
    main()
