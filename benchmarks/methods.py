"""Every method on one student, the same steps, on real models and text: what each one buys.

    python -m benchmarks.methods --save methods_smollm2
    python -m benchmarks.methods --times --save methods_smollm2     # on a machine that does no more

Each recipe of configs/ trains the quickstart's student (SmolLM2-135M-Instruct with 22 of its 30
layers) from the same start with the same batches; perplexity, KL and agreement are of held-out
text. `--times` trains only as long as step times need; `step_ratio` is a step's time over plain
KD's, medians without the first steps. What was saved of other methods stays.
"""

import argparse
import json
import pathlib
import statistics
import tempfile

from benchmarks import duel

ROOT = pathlib.Path(__file__).resolve().parents[1]
KD = "quickstart"  # the recipe, and what the times are measured by
RECIPES = {
    "kd": (KD, []),
    "kd T=2": (KD, ["method.temperature=2.0"]),
    "sft": (KD, ["method={name: sft}"]),
} | {
    name: (name, [])
    for name in (
        "smoothed_kd", "taid", "ctkd", "hidden", "minilm", "ted", "reverse_kd", "jsd",
        "total_variation", "distillm", "akl", "alphanet", "dkd", "abkd",
    )
}  # fmt: skip
QUALITY = {
    "perplexity": "eval/perplexity",
    "kl_to_teacher": "eval/kl_t1",
    "agreement": "eval/agree_top1",
}


def main() -> None:
    """Trains them one after the other, saves after each, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=24, help="held-out rows")
    parser.add_argument("--times", action="store_true", help="only step times, from 8 steps each")
    parser.add_argument("--only", nargs="*", choices=RECIPES, help="default: all")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json, or add to it")
    options = parser.parse_args()
    if options.times:
        options.steps, options.rows = 8, 4
    rows = _saved(options.save)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or RECIPES:
            found = _train(name, pathlib.Path(folder), options)
            rows[name] = rows.get(name, {}) | found
            if options.save:
                print(duel.save(options.save, _table(rows)), found, flush=True)
    print(json.dumps(_table(rows), indent=1))


def _saved(name: str | None) -> dict:
    path = duel.RESULTS / f"{name}.json"
    return json.loads(path.read_text())["methods"] if path.exists() else {}


def _table(rows: dict) -> dict:
    base = rows.get("kd", {}).get("step_seconds")
    for row in rows.values():
        if base and "step_seconds" in row:
            row["step_ratio"] = row["step_seconds"] / base
    ordered = sorted(rows, key=lambda name: rows[name].get("kl_to_teacher", 0.0))
    return {"baseline": "kd", "methods": {name: rows[name] for name in ordered}}


def _train(name: str, folder: pathlib.Path, options: argparse.Namespace) -> dict:
    import jaxdistill

    recipe, overrides = RECIPES[name]
    overrides = [
        *overrides,
        f"run.dir={folder / name.replace(' ', '_')}",
        f"train.steps={options.steps}",
        "train.log_every=1",
        f"eval.max_rows={options.rows}",
        "eval.samples=0",
        "eval.compare=false",
    ]
    result = jaxdistill.distill(ROOT / "configs" / f"{recipe}.yaml", overrides)
    if options.times:
        lines = (pathlib.Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
        seconds = [json.loads(line).get("perf/step_seconds") for line in lines]
        seconds = [value for value in seconds if value is not None]
        return {"step_seconds": statistics.median(seconds[2:])}
    return {"steps": options.steps} | {key: result.metrics[of] for key, of in QUALITY.items()}


if __name__ == "__main__":
    main()
