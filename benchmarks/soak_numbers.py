"""A thousand batches that go wrong, in whole runs: nothing of it may reach a checkpoint.

    python -m benchmarks.soak_numbers

Loss and gradient are made NaN or infinite at random, half of the batches, so that single steps are
skipped, rows are run again, and runs roll back. Every checkpoint is kept and read back afterwards.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
import time
import warnings

import numpy as np

KINDS = ("nan", "inf", "gradient")
# Between them they keep every kind of state: t with its memory, a balance, projectors, schedules.
METHODS = ("{name: taid, alpha: 0.1, mode: scaled}", "{name: hidden, balance: true}")
CONFIG = """
version: 1
run: {{name: soak, dir: {folder}/run}}
teacher: {{random: {{layers: 2, embed: 16, mlp: 24, heads: 2}}, dtype: float32}}
student: {{from: teacher, layers: [0], compute_dtype: float32}}
tokenizer: {{from: bytes}}
data:
  train: [{{path: {folder}/train.txt, format: paragraphs}}]
  eval: [{{path: {folder}/eval.txt, format: paragraphs}}]
  seq_len: 16
  cache_dir: {folder}/cache
method: {method}
train: {{steps: {steps}, batch_size: 8, eval_every: null, log_every: 10}}
checkpoint: {{every: {{steps: 10}}, keep: {{latest: 1000}}}}
guards: {{nonfinite: {{max_consecutive: 4, max_rollbacks: 1000}}}}
logging: {{progress: none, tensorboard: false}}
eval: {{max_rows: 8, samples: 0}}
"""


def soak_numbers(folder: pathlib.Path, injected: int = 1000) -> dict:
    """Runs every method until together they met `injected` bad batches; counts what came of it.

    Args:
      folder: an empty one.
      injected: how many batches go wrong, shared equally among the methods.
    """
    began, share = time.perf_counter(), -(-injected // len(METHODS))
    total = dict.fromkeys(
        ("steps", "injected", "skipped", "reruns", "rollbacks", "checkpoints", "values_checked"), 0
    )
    total["nonfinite_values_in_any_checkpoint"] = 0
    for number, method in enumerate(METHODS):
        place = folder / str(number)
        place.mkdir()
        for name, count in _run(place, method, share, seed=number).items():
            total[name] += count
    return total | {"seconds": round(time.perf_counter() - began, 1)}


def _run(folder: pathlib.Path, method: str, injected: int, seed: int) -> dict:
    from jaxdistill import api, config
    from jaxdistill.report import read_metrics
    from tests import inject

    rng = np.random.default_rng(seed)
    bad = np.sort(rng.choice(2 * injected, injected, replace=False))
    kinds = rng.choice(KINDS, injected)
    plan = ",".join(f"{kind}@{batch}" for kind, batch in zip(kinds, bad, strict=True))
    for name, lines in (("train", 400), ("eval", 20)):
        text = "\n\n".join(" ".join(map(str, row)) for row in rng.integers(0, 99, (lines, 8)))
        (folder / f"{name}.txt").write_text(text)
    # Rolled back runs leave batches out: these steps reach behind the last bad batch at the latest.
    text = CONFIG.format(folder=folder, method=method, steps=2 * injected)
    with contextlib.redirect_stdout(sys.stderr):
        loaded = config.loads(text, "soak.yaml")
        run = api.train(loaded, hooks=inject.Poison(plan)).run_dir
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    events = [one["kind"] for one in lines]
    assert read_metrics(run)[-1]["step"] == 2 * injected
    count = {"skipped": events.count("skipped"), "reruns": events.count("rerun")}
    count |= {"steps": 2 * injected, "injected": injected, "rollbacks": events.count("rollback")}
    return count | _read_back(run / "checkpoints")


def _read_back(folder: pathlib.Path) -> dict:
    """How many checkpoints and numbers there are, and how many of the numbers are not finite."""
    from orbax.checkpoint import v1 as ocp

    steps = sorted(int(one.name) for one in folder.iterdir() if one.name.isdecimal())
    values = wrong = 0
    for step in steps:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it restores to where it was saved from
            tree = ocp.load(folder / str(step), checkpointable_name="state")
        for array in map(np.asarray, tree.values()):
            values += array.size
            wrong += array.size - np.isfinite(array).sum().item()
    return {
        "checkpoints": len(steps),
        "values_checked": values,
        "nonfinite_values_in_any_checkpoint": wrong,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(soak_numbers(pathlib.Path(scratch)), indent=2))
