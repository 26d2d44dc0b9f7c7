"""Every method on one student, the same steps, on real models and text: what each one buys.

    python -m benchmarks.methods --steps 20 --save methods_smollm2

The quickstart's pair (SmolLM2-135M-Instruct, and a copy with 22 of its 30 layers) and its data.
Each method trains from the same start with the same batches; perplexity, KL and agreement are of
held-out text. `step_ratio` is a step's time over plain KD's, medians without the first steps.
"""

import argparse
import json
import pathlib
import statistics
import tempfile

from benchmarks import duel

ROOT = pathlib.Path(__file__).resolve().parents[1]
KD = {"name": "kd", "alpha": 0.2}
PAIRS = [[11, 11], [12, 20], [21, 29]]  # around the cut, and the last: student, teacher
METHODS = {
    "kd": KD,
    "sft": {"name": "sft"},
    "kd T=2": KD | {"temperature": 2.0},
    "smoothed_kd": {"name": "smoothed_kd"},
    "taid": {"name": "taid", "alpha": 0.2, "mode": "scaled"},
    "ctkd": {"name": "ctkd", "alpha": 0.2, "t_range": 4.0, "temperature_lr": 0.05},
    "hidden": {"name": "hidden", "alpha": 0.2, "layers": PAIRS, "balance": True},
    "minilm": {"name": "minilm", "alpha": 0.2},
    "ted": {"name": "ted", "alpha": 0.2, "temperature": 1.0, "layers": PAIRS},
} | {
    name: {"name": name, "alpha": 0.2}
    for name in (
        "reverse_kd", "jsd", "total_variation", "distillm", "akl", "alphanet", "dkd", "abkd",
    )
}  # fmt: skip


def main() -> None:
    """Trains them one after the other and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=24, help="held-out rows")
    parser.add_argument("--only", nargs="*", choices=METHODS, help="default: all")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = options.only or list(METHODS)
        rows = {name: _train(name, pathlib.Path(folder), options) for name in names}
    base = rows.get("kd")
    for row in rows.values():
        row["step_ratio"] = row["step_seconds"] / base["step_seconds"] if base else None
    result = {"baseline": "kd", "steps": options.steps, "methods": rows}
    print(json.dumps(result, indent=1))
    if options.save:
        print(duel.save(options.save, result))


def _train(name: str, folder: pathlib.Path, options: argparse.Namespace) -> dict:
    import jaxdistill

    overrides = [
        f"run.dir={folder / name.replace(' ', '_')}",
        f"method={json.dumps(METHODS[name])}",
        f"train.steps={options.steps}",
        "train.log_every=1",
        f"eval.max_rows={options.rows}",
        "eval.samples=0",
        "eval.compare=false",
    ]
    result = jaxdistill.distill(ROOT / "configs" / "quickstart.yaml", overrides)
    lines = (pathlib.Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line).get("perf/step_seconds") for line in lines]
    seconds = [value for value in seconds if value is not None]
    print(name, result.metrics, flush=True)
    return {
        "perplexity": result.metrics["eval/perplexity"],
        "kl_to_teacher": result.metrics.get("eval/kl_t1"),
        "agreement": result.metrics.get("eval/agree_top1"),
        "step_seconds": statistics.median(seconds[2:] or seconds),
    }


if __name__ == "__main__":
    main()
