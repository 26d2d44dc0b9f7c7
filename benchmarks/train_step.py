"""Our training step beside torch's on the same models and tokens, in turn, in one run.

    python -m benchmarks.train_step --torch-python PYTHON --baseline eager compiled liger_chunked

All train the same student from the same teacher (Llama shapes, random float32 weights that torch
makes and saves): loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), AdamW. Compilation
and two steps come before the clock and before the high-water mark of memory. Every round makes one
step of each and measures once what no step can do without, see `benchmarks.floor`: other work on
the machine slows all of them alike.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

from benchmarks import duel, floor

# Our own step, and what is different in another: an XLA option in place of one of `xla_options`, a
# malloc that keeps the step's temporaries, so that no step touches new pages of memory, or what
# the backward pass keeps. Ours keeps the layers' inputs alone; `all_kept` keeps all, as torch does.
_KEPT = "mmap_threshold=8589934592", "trim_threshold=17179869184", "arena_max=1"
OURS = {
    "ours": {},
    "all_kept": {"REMAT": "none"},
    "vectors_256": {"XLA_FLAGS": "--xla_cpu_prefer_vector_width=256"},
    "moments_copied": {"XLA_FLAGS": "--xla_cpu_copy_insertion_use_region_analysis=false"},
    "pages_kept": {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{one}" for one in _KEPT)},
}
BASELINES = ("eager", "compiled", "liger_chunked", "liger_compiled", *list(OURS)[1:])
RECORDED = 10  # ours makes its metrics in every tenth step, as `train.log_every` has it; torch none
VOCAB, BATCH, LENGTH = 32_000, 4, 256
ALPHA, TEMPERATURE, LEARNING_RATE = 0.5, 2.0, 1e-4
SHAPES = {
    "teacher": {"embed": 512, "layers": 8, "heads": 8, "mlp": 1408},
    "student": {"embed": 256, "layers": 4, "heads": 4, "mlp": 704},
}


def main() -> None:
    """Starts all workers and prints times, memory and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--baseline", nargs="+", choices=BASELINES, default=["eager"])
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--worker", choices=("models", "ours", *BASELINES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options.worker, options.folder, options.length)
    with tempfile.TemporaryDirectory() as folder:
        result = _race(folder, options)
    print(json.dumps(result, indent=2))
    _check_alike({name: row["first_loss"] for name, row in result["rows"].items()})
    if options.save:
        print(duel.save(options.save, result))
    return None


def _race(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """All workers and the floor in turn, round after round."""
    arguments = ["-m", "benchmarks.train_step", "--folder", folder]
    arguments += ["--length", str(options.length), "--worker"]
    maker = duel.Worker([options.torch_python, *arguments, "models"])
    maker.read()
    maker.close()
    workers, facts = {}, {}
    for name in ("ours", *options.baseline):
        workers[name] = duel.Worker([*_python(name, options.torch_python), *arguments, name])
        facts[name] = workers[name].read()
    torch = duel.Worker([options.torch_python, "-m", "benchmarks.floor"])
    torch.read()
    least = floor.Floor(SHAPES, VOCAB, BATCH, options.length, torch)
    load = [os.getloadavg()[0]]
    seconds, peaks = duel.in_turn(workers, options.rounds, between=least.measure)
    load.append(os.getloadavg()[0])
    for worker in (*workers.values(), torch):
        worker.close()
    found = least.result()
    return {
        "shapes": SHAPES | {"vocab": VOCAB, "batch": BATCH, "length": options.length},
        "vector_bits": found["vector_bits"],
        "rounds": options.rounds,
        "load_average": {"before": load[0], "after": load[1], "of_all_workers": True},
        "rows": {
            name: facts[name]
            | {
                "seconds": statistics.median(taken),
                "seconds_range": [min(taken), max(taken)],
                "over_floor": statistics.median(taken) / found["total"],
                "peak_mib": round(peaks[name] / 2**20),
            }
            for name, taken in seconds.items()
        },
        "ours_as_a_part_of": {
            name: {
                "time": duel.ratio(seconds["ours"], seconds[name]),
                "peak": peaks["ours"] / peaks[name],
            }
            for name in options.baseline
        },
        "floor": found,
    }


def _python(name: str, torch_python: str) -> list[str]:
    """The command of a worker's Python, with what differs in its environment."""
    if name not in OURS:
        return [torch_python]
    given = os.environ.get("XLA_FLAGS", "")
    changes = {
        variable: f"{given} {value}" if variable == "XLA_FLAGS" else value
        for variable, value in OURS[name].items()
    }
    return ["env", *(f"{name}={value}" for name, value in changes.items()), sys.executable]


def _check_alike(losses: dict[str, float]) -> None:
    """Fails unless all first losses are one."""
    apart = max(abs(loss / losses["ours"] - 1) for loss in losses.values())
    assert apart < 1e-4, f"not all compute the same loss: {losses}"


def _work(name: str, folder: pathlib.Path, length: int) -> None:
    """What a worker does: it makes the models, or steps each time it is asked."""
    if name in OURS:
        return _our_worker(folder, length)
    from benchmarks.peers import torch_step

    if name == "models":
        torch_step.make_models(SHAPES, VOCAB, folder)
        return print(json.dumps({}), flush=True)
    made = torch_step.make(name, folder, _tokens(length), ALPHA, TEMPERATURE, LEARNING_RATE)
    return _serve(*made)


def _serve(step, facts: dict) -> None:
    """Warms up by two steps, then answers."""
    began = time.perf_counter()
    first = step()
    facts |= {"first_loss": first, "first_step_seconds": time.perf_counter() - began}
    step()
    duel.serve(step, facts)


def _tokens(length: int):
    import numpy as np

    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, length + 1))


def _our_worker(folder: pathlib.Path, length: int) -> None:
    import jax
    import numpy as np

    from jaxdistill import models, optim, teachers
    from jaxdistill.methods import kd
    from jaxdistill.sharding import make_mesh
    from jaxdistill.train import state as states
    from jaxdistill.train import step as steps
    from jaxdistill.types import Batch

    mesh = make_mesh()
    load = lambda name: models.load(folder / name, dtype="float32", mesh=mesh, tokenizer=False)
    teacher, student = load("teacher"), load("student")
    objective = kd.objective(vocab=VOCAB)
    signal = teachers.online(teacher.config, compute_dtype="float32")
    tx = optim.optimizer(
        LEARNING_RATE,
        knobs={"alpha": ALPHA, "temperature": TEMPERATURE},
        clip_norm=None,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
    )
    remat = os.environ.get("REMAT", "full")
    loss = steps.make_loss(student.config, objective, compute_dtype="float32", remat=remat)
    state = states.create(student.params, {}, tx, 0, mesh)
    tokens = _tokens(length)
    ones = np.ones((BATCH, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
    batch = steps.place(
        Batch(
            tokens[:, :-1].astype(np.int32),
            tokens[:, 1:].astype(np.int32),
            ones.astype(bool),
            positions,
            ones,
        ),
        mesh,
    )
    began = time.perf_counter()
    made = steps.make(loss, signal, tx, monitor=steps.recorded(RECORDED, 10**6))
    program = steps.compiled(made, state, teacher.params, batch, mesh)
    compile_seconds = time.perf_counter() - began
    del student
    held = {"state": state}

    def step() -> float:
        held["state"], means = program(held["state"], teacher.params, batch)
        jax.block_until_ready(held["state"])
        return float(means["loss/total"].value)

    del state
    memory = program.memory_analysis()
    facts = {"versions": {"jax": jax.__version__}, "compile_seconds": compile_seconds}
    facts |= {"remat": remat, "metrics_every": RECORDED}
    facts["temporary_mib"] = round(memory.temp_size_in_bytes / 2**20)
    _serve(step, facts)


if __name__ == "__main__":
    main()
