"""Does a model learn sums from itself, shown the solution, and what does it forget by them?

    python -m benchmarks.self_distillation --save self_distillation
    python -m benchmarks.self_distillation --smoke              # a minute: everything runs

A tiny model reads the documentation of Python as bytes, and generated sums modulo a base: behind
the sum worked out, whose numbers may be wrong, it repeats the last one, and without it guesses. It
knows no sum then, but how to use a solution. From there three runs learn the same questions with as
many rows in as many updates: plain fine-tuning on the right answers, and the model on answers of
its own, by forward KL to itself behind the worked sum, with its first weights or their moving
average. Accuracy is greedy, without a solution; what was forgotten is the cross-entropy of held-out
documentation, in nats per byte. All begin with one model; a seed is of the order of questions and
of the answers drawn. Means and ranges are over seeds.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import numpy as np

from benchmarks import duel
from benchmarks.rewards import over_seeds

BASE = 20  # numbers in a sum of the first model, and so is their sum modulo it
ASKED = 10  # numbers in the sums that are learned
SIZES = {"base": (650, 3), "updates": (250, 2), "rows": (128, 4)}
CONTEXT = "[{solution}]{prompt}"
STUDENT = "random: {layers: 2, embed: 96, mlp: 256, heads: 4, kv_heads: 2}"
RUN = """
run: {{name: student, dir: '{out}'}}
seed: {seed}
student: {{{student}, compute_dtype: float32}}
tokenizer: {{from: bytes}}
data: {{eval: [{{path: "{held_out}"}}], cache_dir: '{cache}', {data}}}
{more}
checkpoint: {{every: {{steps: null, minutes: 1000000}}, keep: {{latest: 1}}}}
eval: {{batch_size: 8, max_rows: 8, samples: 0}}
logging: {{progress: none, tensorboard: false}}
mesh: {{data: 1, fsdp: 1}}
"""
TRAIN = "train: {{steps: {steps}, batch_size: 32, eval_every: null, log_every: 10}}\n"
FIRST = (
    TRAIN
    + """method: {{name: sft}}
optimizer: {{lr: 3e-3, schedule: cosine, warmup: 0.05}}"""
)
ALIKE = TRAIN + "optimizer: {{lr: 5e-4, schedule: cosine, warmup: 0.1}}\n"
TUNED = ALIKE + "method: {{name: sft}}"
ITSELF = (
    ALIKE
    + """method: {{name: kd, divergence: forward_kl, alpha: 0.0}}
rollout: {{prompts_per_step: 32, samples: 1, max_new_tokens: 4}}
teacher: {{self: {{weights: {weights}, context: "{context}", seq_len: 48}}}}"""
)
ARMS = ("fine-tuning", "frozen", "ema")


def main() -> None:
    """Trains and measures seed after seed, saves after each student, and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("/tmp/self_distillation")
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    size = {name: pair[options.smoke] for name, pair in SIZES.items()}
    began, found = time.time(), {}
    options.folder.mkdir(parents=True, exist_ok=True)
    files = questions(options.folder)
    for seed in range(1 if options.smoke else options.seeds):
        for who, model in students(options.folder, files, size, seed):
            found.setdefault(who, []).append(measured(model, files, size, options.folder))
            print(seed, who, found[who][-1], flush=True)
            result = {"sizes": size, "base": BASE, "students": over_seeds(found)}
            result |= {"seconds": round(time.time() - began)}
            if options.save:
                duel.save(options.save, result)


def questions(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Files of records: guesses for the first model, questions to learn, and held-out ones."""
    rng = np.random.default_rng(5)
    two = lambda number: f"{number:02}"
    asked = lambda n: f"{two(n // BASE)}+{two(n % BASE)}="
    worked = lambda n, total, rest: f"{asked(n)}{two(total)}-{two(total - rest)}={two(rest)}"

    def guess(n: int) -> dict[str, str]:
        answer = int(rng.integers(BASE))
        if rng.random() < 0.3:
            return {"text": f"{asked(n)}{two(answer)}"}
        solution = worked(n, answer + BASE * int(rng.integers(2)), answer)
        return {"text": f"{CONTEXT.format(prompt=asked(n), solution=solution)}{two(answer)}"}

    def question(n: int) -> dict[str, str]:
        total = n // BASE + n % BASE
        solution = worked(n, total, total % BASE)
        return {"prompt": asked(n), "completion": two(total % BASE), "solution": solution}

    numbers = [BASE * n + m for n, m in rng.permutation(list(np.ndindex(ASKED, ASKED))).tolist()]
    rows = {
        "guesses": [guess(int(n)) for n in rng.integers(BASE * BASE, size=20_000)],
        "learned": [question(n) for n in numbers[25:]],
        "held_out": [question(n) for n in numbers[:25]],
    }
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, records in rows.items():
        files[name].write_text("".join(json.dumps(one) + "\n" for one in records))
    return files


def students(folder: pathlib.Path, files: dict, size: dict, seed: int):
    """(name, model) of every student of a seed; the first one is where the others begin."""
    source = lambda path, more="": f"{{path: '{path}'{more}}}"
    docs, guesses = source("python:docs?split=train"), source(files["guesses"], ", weight: 5")
    given = f"train: [{docs}, {guesses}], seq_len: 96"
    first, fill = folder / "before", {"seed": seed, "cache": folder / "cache"}
    if not seed:
        more = FIRST.format(steps=size["base"])
        held_out = "python:docs?split=held_out"
        how = {"student": STUDENT, "data": given, "held_out": held_out, "more": more}
        trained(first, size["base"], **how, **fill)
        yield "before", f"{first}@latest"
    fill["held_out"] = files["held_out"]
    asked = "seq_len: 16, packing: none, loss_on: completion, "
    for arm in ARMS:
        data = f"{asked}train: [{source(files['learned'])}]"
        more = TUNED.format(steps=size["updates"])
        if arm != "fine-tuning":
            data = f"{asked}train: [], prompts: [{source(files['learned'])}]"
            more = ITSELF.format(steps=size["updates"], weights=arm, context=CONTEXT)
        out = folder / f"{arm}-{seed}"
        yield (
            arm,
            trained(
                out,
                size["updates"],
                student=f"source: '{first}@latest'",
                data=data,
                more=more,
                **fill,
            ),
        )


def trained(out: pathlib.Path, steps: int, **fill: Any) -> str:
    """The name of a trained student; a finished one is kept."""
    from jaxdistill import api, config

    if not (out / "checkpoints" / str(steps)).exists():
        api.train(config.loads(RUN.format(out=out, **fill)))
    return f"{out}@latest"


def measured(model: str, files: dict, size: dict, folder: pathlib.Path) -> dict[str, float]:
    """Accuracy on learned and held-out questions, and nats per byte of documentation."""
    from jaxdistill import commands
    from jaxdistill.evaluate import perplexity
    from jaxdistill.references import load_any

    loaded = load_any(model, dtype="float32")
    right = {}
    for name in ("learned", "held_out"):
        records = [json.loads(line) for line in files[name].read_text().splitlines()]
        for shown in ("", "shown the solution, ") if name == "held_out" else ("",):
            asked = [CONTEXT.format(**one) if shown else one["prompt"] for one in records]
            prompts = [loaded.tokenizer(one)["input_ids"] for one in asked]
            said = [
                loaded.tokenizer.decode(ids, skip_special_tokens=True)
                for ids in loaded.generate(prompts, max_new_tokens=4)
            ]
            pairs = zip(said, records, strict=True)
            right[f"{shown}{name}"] = float(np.mean([a == one["completion"] for a, one in pairs]))
    text = commands.Evaluate(
        data=("python:docs?split=held_out",),
        seq_len=96,
        loss_on="all",
        max_rows=size["rows"],
        cache_dir=str(folder / "cache"),
    )
    return right | {"documentation": perplexity.evaluate(model, text)["eval/ce"]}


if __name__ == "__main__":
    main()
