"""Adapters beside kernels in float32, bfloat16, int8 and int4: the step in turn, and its memory.

    python -m benchmarks.qlora --save qlora_cpu

The recipe `qlora`: a copy of SmolLM2-135M-Instruct learns by adapters of rank 16 from the model
that it was. Each form of the frozen kernels has a process of its own; they take turns, so that
other work on the machine meets all alike. Ratios are to float32, of neighbours in a round. Bytes of
the frozen weights are those that the step is given; the peak is of the whole process, teacher and
head among it, while it steps.
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

FORMS = {
    "float32": ("student.base=null",),
    "bfloat16": ("student.base=null", "student.param_dtype=bfloat16"),
    "int8": ("student.base=int8",),
    "int4": ("student.base=int4",),
}
RECIPE = pathlib.Path(__file__).parents[1] / "configs" / "qlora.yaml"


def main() -> None:
    """Measures and prints; with --save it also writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--worker", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with tempfile.TemporaryDirectory() as folder:
            return worker(options.worker, folder)
    result = measure(options.rounds)
    print(json.dumps(result, indent=2))
    if options.save:
        print(duel.save(options.save, result))


def measure(rounds: int) -> dict:
    """Medians over rounds in which each form makes one step."""
    command = [sys.executable, "-m", "benchmarks.qlora", "--worker"]
    workers, facts = {}, {}
    for name in FORMS:  # one after the other: compiling takes all cores
        workers[name] = duel.Worker([*command, name])
        facts[name] = workers[name].read()
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(rounds):
        for name, one in workers.items():
            time.sleep(0.3)
            seconds[name].append(one.ask("step")["seconds"])
    found = {}
    for name, one in workers.items():
        pairs = [a / b for a, b in zip(seconds[name], seconds["float32"], strict=True)]
        peak = one.ask("memory")["peak_bytes"]
        found[name] = facts[name] | {
            "step_seconds": statistics.median(seconds[name]),
            "time_ratio": statistics.median(pairs),
            "peak_mib": round(peak / 2**20),
        }
        one.close()
    return {
        "baseline": "adapters beside float32 kernels",
        "rounds": rounds,
        "load_average": os.getloadavg(),
        "forms": found,
    }


def worker(form: str, folder: str) -> None:
    """One form's step on one batch, again and again."""
    import jax
    import numpy as np

    from jaxdistill import config
    from jaxdistill.evaluate import speed
    from jaxdistill.run import setup
    from jaxdistill.train.step import place
    from jaxdistill.types import Batch

    own = (f"run.dir={folder}/run", f"data.cache_dir={folder}/data", *FORMS[form])
    loaded = config.loads(config.read(str(RECIPE)), str(RECIPE), own)
    mesh = setup.mesh_of(loaded)
    began = time.perf_counter()
    step, state, teacher = setup.build(loaded, mesh)
    built = time.perf_counter() - began
    rows, length = loaded.train.batch_size, loaded.data.seq_len
    tokens = np.random.default_rng(0).integers(0, 40000, (rows, length)).astype(np.int32)
    ones = np.ones_like(tokens)
    batch = place(
        Batch(tokens, np.roll(tokens, -1, 1), ones > 0, ones.cumsum(1, np.int32) - 1, ones), mesh
    )
    held = {"state": state}

    def once() -> float:
        held["state"], means = step(held["state"], teacher, batch)
        return float(jax.block_until_ready(means)["loss/total"].value)

    frozen = jax.tree.leaves(state.frozen)
    facts = {
        "frozen_mib": round(sum(map(speed.leaf_bytes, frozen)) / 2**20, 1),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(state.params["student"])),
        "start_and_compile_seconds": round(built, 1),
    }
    del state, frozen
    once()
    duel.serve(once, facts)


if __name__ == "__main__":
    main()
