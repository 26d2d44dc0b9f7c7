"""Sparse, narrower and four-bit students beside each other: quality, memory and time, three seeds.

    python -m benchmarks.compression --save compression_smollm2     # about 16 minutes on two cores
    python -m benchmarks.compression --draw compression_smollm2     # the picture of what was saved
    python -m benchmarks.compression --tiny                         # random models, no claim

The student is the quickstart's, 22 of SmolLM2-135M-Instruct's 30 layers. It learns the beginnings
of documents inside the installed Python, from that model or from the text alone, by equal batches
and steps:

    dense KD                all weights
    2:4 KD, 2:4 SFT         two of every four weights of the layers become 0 in the first half
    narrower KD             an MLP of 512 of 1,536 neurons, chosen by importance: as many weights
                            as 2:4 leaves
    adapters on float, on int4   rank 16, beside frozen kernels in float32 and in four bits
    25 %, 50 %, 75 % KD     the smallest weights of each matrix become 0: one seed, for the picture

Every row is a process of its own: its memory is its high-water mark, and the time of a step the
median of those after the first. Quality is measured on held-out text, beside SmolLM2. The baseline
of the ratios is `dense KD`, of adapters those on float. Each row is printed and saved as measured.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import duel
from benchmarks.cache import TINY, texts

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "quickstart.yaml"
NARROW = 512  # 3 * 576 * 512 weights of an MLP are half a layer's 3.54 million less attention
RAMP = "begin: 0, end: 0.5, every: 2"
LORA = "student.lora={rank: 16, alpha: 32.0}"
ADAPTERS = (LORA, "optimizer.lr=1e-3")
SFT = ("method={name: sft}", "eval.compare=false")
SPARSE = f"student.sparsity={{pattern: '2:4', {RAMP}}}"
FORMS: dict[str, tuple[str, ...]] = {
    "dense KD": (),
    "2:4 KD": (SPARSE,),
    "2:4 SFT": (SPARSE, *SFT),
    "narrower KD": (),
    "adapters on float": ADAPTERS,
    "adapters on int4": (*ADAPTERS, "student.base=int4"),
}
CURVE = {
    f"{round(100 * share)} % KD": (
        f"student.sparsity={{pattern: unstructured, share: {share}, {RAMP}}}",
    )
    for share in (0.25, 0.5, 0.75)
}
BASELINES = {"adapters on int4": "adapters on float", "adapters on float": "adapters on float"}
KEYS = {"kl": "kl_t1", "agreement": "agree_top1", "perplexity": "perplexity"}


def main() -> None:
    """Makes the students, then trains and measures them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="random models, to see that it runs")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--draw", metavar="NAME", help="draw results/NAME.json, and run nothing")
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--row", nargs=2, metavar=("FORM", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.draw:
        source = duel.RESULTS / f"{options.draw}.json"
        source.with_suffix(".svg").write_text(draw(json.loads(source.read_text())))
    elif options.make:
        make(options)
    elif options.row:
        print(json.dumps(row(options, options.row[0], int(options.row[1]))), flush=True)
    else:
        with tempfile.TemporaryDirectory() as name:
            options.folder = options.folder or pathlib.Path(name)
            measure(options)


def measure(options: argparse.Namespace) -> None:
    """One process a row; prints and saves after each."""
    result: dict[str, Any] = {
        "steps": options.steps,
        "seeds": options.seeds,
        "load_before": os.getloadavg(),
        "baseline": "dense KD; of adapters, those on float kernels",
    }
    began = time.perf_counter()
    _process(options, "--make")
    result["making_seconds"] = round(time.perf_counter() - began, 1)
    each: dict[str, list[dict[str, float]]] = {}
    jobs = [(form, seed) for seed in options.seeds for form in FORMS]
    jobs += [(form, options.seeds[0]) for form in CURVE]
    for form, seed in jobs:
        began = time.perf_counter()
        found = _process(options, "--row", form, str(seed))
        each.setdefault(form, []).append(found)
        took = time.perf_counter() - began
        print(f"{form}, seed {seed}: {json.dumps(found)} ({took:.0f} s in all)", flush=True)
        result["rows"], result["each"] = summary(each), each
        result["load_after"] = os.getloadavg()
        if options.save:
            duel.save(options.save, result)
    print(json.dumps(result["rows"], indent=1), flush=True)


def summary(each: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float | None]]:
    """Means and deviations over the seeds that are there, with ratios to the baseline's."""
    rows: dict[str, dict[str, float | None]] = {}
    for form, found in each.items():
        values = {key: [one[key] for one in found] for key in found[0]}
        row: dict[str, float | None] = {k: statistics.mean(v) for k, v in values.items()}
        for key in KEYS:
            several = len(found) > 1
            row[f"{key}_deviation"] = statistics.stdev(values[key]) if several else None
        rows[form] = row | {"seeds": len(found)}
    for form, row in rows.items():
        base = rows[BASELINES.get(form, "dense KD")]
        for key in ("step_seconds", "peak_mib"):
            row[f"{key}_ratio"] = row[key] / base[key]
    return rows


def _process(options: argparse.Namespace, *words: str) -> dict[str, Any]:
    """What a process of this module says in its last line."""
    command = [sys.executable, "-m", "benchmarks.compression", "--folder", str(options.folder)]
    command += ["--steps", str(options.steps), *(["--tiny"] if options.tiny else []), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def _config(options: argparse.Namespace, *more: str) -> Any:
    from jaxdistill import config

    folder = options.folder
    data = [f"data.{n}=[{{path: {folder}/{n}.jsonl}}]" for n in ("train", "eval")]
    run = ["eval.compare=false", "eval.samples=0", "eval.max_rows=12", "train.log_every=1"]
    run += [
        "optimizer.warmup=0.1",
        f"data.cache_dir={folder}/rows",
        f"train.steps={options.steps}",
        "train.batch_size=2",
    ]
    models = [one for one in TINY if not one.startswith("student")] if options.tiny else []
    return config.load(RECIPE, [*data, *models, *run, *more])


def make(options: argparse.Namespace) -> None:
    """The texts, the student, and a narrower one of it."""
    from jaxdistill import api, commands, models
    from jaxdistill.compress import importance
    from jaxdistill.run import participants, setup

    folder = options.folder
    texts(folder, 12 if options.tiny else 60)
    loaded = _config(options, *(["student.layers=[0, 1, 2]"] if options.tiny else []))
    mesh = setup.mesh_of(loaded)
    found = participants.load_models(loaded, participants.shapes_of(loaded, mesh), mesh)
    models.save(found.student, folder / "student")
    files = (str(folder / "train.jsonl"),)
    section = commands.Importance(data=files, rows=8 if options.tiny else 32, seq_len=128)
    scores = api.importance(str(folder / "student"), section)
    importance.save(scores, folder / "importance.safetensors")
    small = commands.Prune(importance=str(folder / "importance.safetensors"), mlp=_narrow(options))
    api.prune(str(folder / "student"), folder / "narrower", small)


def _narrow(options: argparse.Namespace) -> int:
    return 64 if options.tiny else NARROW


def row(options: argparse.Namespace, form: str, seed: int) -> dict[str, float]:
    """Trains one student and measures it: quality, size, time of a step, memory of the process."""
    import resource

    from jaxdistill import api
    from jaxdistill.report import read_metrics
    from jaxdistill.run import terminal

    folder = options.folder
    source = folder / ("narrower" if form == "narrower KD" else "student")
    run = folder / f"run-{form.replace(' ', '').replace('%', '')}-{seed}"
    student = f"student={{source: {source}, compute_dtype: float32}}"
    more = (f"run.dir={run}", f"seed={seed}", student, *{**FORMS, **CURVE}[form])
    terminal.write_page = lambda folder: None  # a page a row would take a tenth of the time
    result = api.train(_config(options, *more))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    last = {one["name"]: one for one in result.table}["student after"]
    seconds = [r["perf/step_seconds"] for r in read_metrics(run) if "perf/step_seconds" in r]
    zeros = 0.0 if "adapters" in form else 1.0 - _nonzero(str(run))
    return {
        **{name: last[key] for name, key in KEYS.items()},
        "parameters": last["parameters"],
        "zeros_of_layers": round(zeros, 4),
        "step_seconds": statistics.median(seconds[1:] or seconds),
        "peak_mib": round(peak),
    }


def _nonzero(source: str) -> float:
    """Share of the weights of a student's projections that are not 0."""
    import numpy as np

    from jaxdistill import api
    from jaxdistill.models.quantized import is_projection
    from jaxdistill.train.table import flatten

    params = flatten(api.load(source).params)
    kept = [v for name, v in params.items() if is_projection(name.replace("/", "."))]
    return float(sum(np.count_nonzero(v) for v in kept) / sum(v.size for v in kept))


LEFT, TOP, WIDE, HIGH = 64, 52, 560, 300
COLOURS = {"2:4 KD": "#1f6f8b", "2:4 SFT": "#b5b5b5", "narrower KD": "#d1495b"}


def draw(result: dict[str, Any]) -> str:
    """Share of weights that are gone against KL to the teacher, as SVG text."""
    rows = result["rows"]
    # A narrower MLP has half of the weights of a layer: as many are gone as 2:4 makes 0.
    gone = {form: rows[form]["zeros_of_layers"] for form in rows if "adapters" not in form}
    gone |= {"narrower KD": 0.5} if "narrower KD" in rows else {}
    top = 1.1 * max(rows[form]["kl"] + (rows[form]["kl_deviation"] or 0) for form in gone)
    width, height = LEFT + WIDE + 24, TOP + HIGH + 48
    across = lambda share: LEFT + WIDE * share / 0.8
    down = lambda kl: TOP + HIGH * (1 - kl / top)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        '<text x="12" y="20" font-weight="bold">Share of the layers\' weights that are gone, and '
        "KL to the teacher (less is closer)</text>",
        '<text x="12" y="36" font-size="11" fill="#555">22 of 30 layers of SmolLM2-135M-Instruct, '
        f"{result['steps']} steps, {result['cpus']} cores of an {result['cpu']}, "
        f"{result['date']}</text>",
    ]
    for share in (0, 0.25, 0.5, 0.75):
        x = across(share)
        lines += [
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + HIGH}" stroke="#eee"/>',
            f'<text x="{x:.1f}" y="{TOP + HIGH + 18}" text-anchor="middle">{share:.0%}</text>',
        ]
    for part in range(5):
        kl = top * part / 4
        y = down(kl)
        lines += [
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + WIDE}" y2="{y:.1f}" stroke="#eee"/>',
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{kl:.2f}</text>',
        ]
    curve = [form for form in ("dense KD", *CURVE) if form in rows]
    points = " ".join(f"{across(gone[form]):.1f},{down(rows[form]['kl']):.1f}" for form in curve)
    lines.append(f'<polyline points="{points}" fill="none" stroke="#888" stroke-width="1.5"/>')
    taken: list[tuple[float, float]] = []  # where labels stand: they make room for each other
    for form in sorted(gone, key=lambda form: -rows[form]["kl"]):
        x, y = across(gone[form]), down(rows[form]["kl"])
        at = max([y, *(below + 13 for beside, below in taken if abs(beside - x) < 60)])
        taken.append((x, at))
        colour = COLOURS.get(form, "#888")
        if spread := rows[form]["kl_deviation"]:
            reach = HIGH * spread / top
            lines.append(
                f'<line x1="{x:.1f}" y1="{y - reach:.1f}" x2="{x:.1f}" y2="{y + reach:.1f}" '
                f'stroke="{colour}"/>'
            )
        lines += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>',
            f'<text x="{x + 8:.1f}" y="{at + 4:.1f}" font-size="11">{form} '
            f"{rows[form]['kl']:.3f}</text>",
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    main()
