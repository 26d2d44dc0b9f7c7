"""A race of one problem: a worker for each library, in turn, on the same arrays.

Compilation and two calls come before the clock and before the high-water mark of memory. All
workers must find the same value.
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
    check_alike({name: entry["value"] for name, entry in result["losses"].items()})
    if options.save:
        print(duel.save(options.save, result))


def check_alike(values: dict[str, float]) -> None:
    """Fails unless all losses have one value, sign included."""
    ours = values["jaxdistill"]
    apart = max(abs(value - ours) for value in values.values())
    assert apart < 1e-4 * abs(ours), f"not the same: {values}"


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
    start = rng.integers(0, options.vocab, (options.tokens, 1))
    np.save(folder / "known_ids.npy", (start + 37 * np.arange(64)) % options.vocab)
    z = 3 * rng.standard_normal((options.tokens, 64))
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True)) + np.log(0.95)
    np.save(folder / "known_logprobs.npy", log_p.astype(np.float32))


def _in_turn(module: str, folder: str, names: tuple[str, ...], options: argparse.Namespace) -> dict:
    """All workers in turn, round after round."""
    workers, facts = {}, {}
    peers = [name for name in names if name != "jaxdistill"]
    for name in names:
        python = sys.executable if name == "jaxdistill" else options.peers_python
        command = [python, "-m", f"benchmarks.peers.{module}", "--folder", folder]
        workers[name] = duel.Worker([*command, "--worker", name])
        facts[name] = workers[name].read()
    seconds, peaks = duel.in_turn(workers, options.rounds)
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
    fastest = min(peers, key=lambda name: losses[name]["seconds"])
    smallest = min(peers, key=lambda name: losses[name]["peak_mib"])
    return {
        "shape": {k: getattr(options, k) for k in ("tokens", "vocab", "student", "teacher")},
        "losses": losses,
        "time_ratios": {name: duel.ratio(seconds["jaxdistill"], seconds[name]) for name in peers},
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
