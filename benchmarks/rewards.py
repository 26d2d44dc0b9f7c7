"""Do rewards teach a half-trained student its sums? Reward, teacher, and both, at equal rollouts.

    python -m benchmarks.rewards --save rewards_sums_cpu
    python -m benchmarks.rewards --smoke              # minutes: everything runs

Sums of two numbers modulo a base, as text. A small student learns half of the questions from right
answers; a teacher of the same shape learns all of them. From the student's checkpoint three runs go
on with the other half as prompts, and with the same number of answers to each, updates and learning
rate: GRPO by the reward alone, by the teacher alone (exact reverse KL on its own answers), and by
both. Accuracy is greedy, and maj@8 and pass@8, on the prompts and on questions that nobody was
trained on. Means and ranges are over seeds.
"""

import argparse
import json
import pathlib
import time

import numpy as np

from benchmarks import duel

BASE = 20  # numbers in a sum, and so is their sum modulo it
SIZES = {"half": (400, 2), "teacher": (1500, 3), "updates": (120, 2)}
SHAPE = "{random: {layers: 2, embed: 64, mlp: 192, heads: 4, initializer_range: 0.1},"
RUN = """
seed: {seed}
run: {{name: student, dir: '{out}'}}
student: {student}
tokenizer: {{from: bytes}}
data:
  eval: [{{path: '{held_out}'}}]
  seq_len: 16
  loss_on: completion
  cache_dir: '{cache}'
  {data}
{more}
checkpoint: {{every: {{steps: null, minutes: 1000000}}}}
eval: {{batch_size: 8, max_rows: 8, samples: 0}}
logging: {{progress: none, tensorboard: false}}
"""
SFT = """method: {{name: sft}}
optimizer: {{lr: 3e-3, schedule: cosine, warmup: 0.05, weight_decay: 0.01}}
train: {{steps: {steps}, batch_size: 32, eval_every: null}}"""
OWN = """rollout: {{prompts_per_step: 16, samples: 8, max_new_tokens: 4}}
optimizer: {{lr: 3e-4, schedule: constant, warmup: 0}}
train: {{steps: {steps}, eval_every: null, log_every: 1}}
{arm}"""
REWARD = "reward: {verifiers: [{verifier: exact}]}\n"
TEACHER = "teacher: {{source: '{teacher}', dtype: float32}}\n"
ARMS = {
    "reward": REWARD + "method: {name: grpo}",
    "teacher": TEACHER + "method: {{name: reverse_kd, alpha: 0.0}}",
    "both": TEACHER + REWARD.replace("{", "{{").replace("}", "}}")
    + "method: {{name: grpo, teacher_weight: 1.0}}",
}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/rewards"))
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--save", default="")
    options.add_argument("--smoke", action="store_true")
    given = options.parse_args()
    size = {name: pair[given.smoke] for name, pair in SIZES.items()}
    began, found, times = time.time(), {}, []
    given.folder.mkdir(parents=True, exist_ok=True)
    files = questions(given.folder)
    for seed in range(1 if given.smoke else given.seeds):
        for name, model, split in students(given.folder, files, size, seed):
            on = {"held_out": "judged", "prompts": "prompts"}
            numbers = [(where, judged(model, files[file])) for where, file in on.items()]
            both = {f"{where}_{key}": n for where, row in numbers for key, n in row.items()}
            found.setdefault(name, []).append(both)
            times += split
            print(seed, name, found[name][-1], flush=True)
            result = {"sizes": size, "base": BASE, "accuracy": over_seeds(found), "times": times}
            result |= {"seconds": round(time.time() - began)}
            if given.save:
                duel.save(given.save, result)


def questions(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Files of records, prompts and held-out questions; no question is on both sides."""
    rng = np.random.default_rng(5)
    numbers = rng.permutation(BASE * BASE).tolist()
    text = lambda n: (f"{n // BASE}+{n % BASE}=", str((n // BASE + n % BASE) % BASE))
    pairs = [text(n) for n in numbers]
    held, rest = pairs[:100], pairs[100:]
    half = len(rest) // 2
    rows = {
        "half": [{"prompt": q, "completion": a} for q, a in rest[:half]],
        "teacher": [{"prompt": q, "completion": a} for q, a in rest],
        "prompts": [{"prompt": q, "answer": a} for q, a in rest[half:]],
        "held_out": [{"prompt": q, "completion": a} for q, a in held],
        "judged": [{"prompt": q, "answer": a} for q, a in held],
    }
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, records in rows.items():
        files[name].write_text("".join(json.dumps(one) + "\n" for one in records))
    return files


def students(folder, files, size, seed):
    """(name, model, times of the updates) of every student of a seed."""
    fill = {"held_out": files["held_out"], "cache": folder / "cache", "seed": seed}
    random = SHAPE + " compute_dtype: float32}"
    made = {}
    for name, whose in (("half", seed), ("teacher", 0)):  # one teacher teaches all
        more, steps = SFT.format(steps=size[name]), size[name]
        place = folder / f"{name}-{whose}"
        given = f"train: [{{path: '{files[name]}'}}]"
        own = {**fill, "seed": whose, "student": random, "data": given, "more": more}
        made[name] = trained(place, steps, **own)
        if whose == seed:
            yield name, made[name], []
    asked = f"train: []\n  prompts: [{{path: '{files['prompts']}'}}]"
    student = f"{{source: '{made['half']}', compute_dtype: float32}}"
    for name, arm in ARMS.items():
        arm = arm if name == "reward" else arm.format(teacher=made["teacher"])
        more = OWN.format(steps=size["updates"], arm=arm)
        out = folder / f"{name}-arm-{seed}"
        model = trained(out, size["updates"], student=student, data=asked, more=more, **fill)
        yield f"after {name}", model, [split(out, name)]


def trained(out: pathlib.Path, steps: int, **fill) -> str:
    """The name of a trained student; a finished one is kept."""
    from jaxdistill import api, config

    if not (out / "checkpoints" / str(steps)).exists():
        api.train(config.loads(RUN.format(out=out, **fill)))
    return f"{out}@latest"


def split(out: pathlib.Path, name: str) -> dict:
    """Seconds of an update, and of the writing in it."""
    from jaxdistill.report import read_metrics

    records = [one for one in read_metrics(out) if "perf/rollout_seconds" in one]
    writing = np.median([one["perf/rollout_seconds"] for one in records])
    times = np.median(np.diff([one["time"] for one in records]))
    return {"arm": name, "update_seconds": float(times), "writing_seconds": float(writing)}


def judged(model: str, file: pathlib.Path) -> dict[str, float]:
    """Accuracy on questions, see `accuracy`."""
    from jaxdistill.references import load_any

    loaded = load_any(model, dtype="float32")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    prompts = [loaded.tokenizer(one["prompt"])["input_ids"] for one in records]
    text = lambda ids: loaded.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return accuracy(loaded, prompts, [one["answer"] for one in records], text, 4)


def accuracy(model, prompts, golds, final, longest: int) -> dict[str, float]:
    """Accuracy, greedy, and of eight answers by vote and at best.

    Args:
      model: that is asked.
      prompts: token ids of each.
      golds: the right answers.
      final: token ids of an answer -> what it says.
      longest: tokens of an answer.
    """
    from jaxdistill.reasoning import votes

    greedy = [final(ids) for ids in model.generate(prompts, max_new_tokens=longest)]
    drawn = model.generate(
        [ids for ids in prompts for _ in range(8)], max_new_tokens=longest, temperature=1.0, seed=1
    )
    said = [final(ids) for ids in drawn]
    groups = [said[at : at + 8] for at in range(0, len(said), 8)]
    share = lambda right: float(np.mean(list(right)))
    pairs = lambda answers: zip(answers, golds, strict=True)
    return {
        "greedy": share(answer == gold for answer, gold in pairs(greedy)),
        "maj_at_8": share(votes.majority(group) == gold for group, gold in pairs(groups)),
        "pass_at_8": share(gold in group for group, gold in pairs(groups)),
    }


def over_seeds(found: dict) -> dict:
    """Of every student and number the values of the seeds, their mean, smallest and largest."""
    result = {}
    for name, rows in found.items():
        each = {key: [row[key] for row in rows] for key in rows[0]}
        result[name] = {
            key: {"mean": float(np.mean(v)), "min": min(v), "max": max(v), "seeds": v}
            for key, v in each.items()
        }
    return result


if __name__ == "__main__":
    main()
