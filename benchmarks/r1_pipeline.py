"""DeepSeek-R1's steps as one workflow, on sums: what each stage is worth, and what a kill costs.

    python -m benchmarks.r1_pipeline --save r1_pipeline_sums_cpu
    python -m benchmarks.r1_pipeline --seeds 1 2 --save r1_pipeline_sums_seeds_cpu    # no kills
    python -m benchmarks.r1_pipeline --smoke          # minutes: everything runs, nothing is learned

The workflow is configs/r1_pipeline.yaml with the paths and sizes of this file. Sums of three digits
modulo 10, asked in a chat. The base knows how to answer, and half of the questions by heart; the
reasoner works sums out in two additions, in thinking tags. Accuracy is of what the number verifier
finds, on questions that nobody was trained on: greedy, and of eight answers by vote and at best.

The workflow runs as a command. One run is killed (SIGKILL) once in every step, within seconds of
its beginning, and called again; a second one is left alone. Both must leave the same weights.
Called once more, every step is skipped.
"""

import argparse
import copy
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
import yaml

from benchmarks import duel, rewards, soak_faults
from benchmarks.warm import ROOT

BASE, TEST = 10, 100  # numbers in a sum, and so is their sum modulo it; questions of the test
SOON = 3.0  # seconds into a step at which it is killed, or half way
STAGES = ("cold", "reinforced", "second", "final")
# (as meant, in a smoke test)
SIZES = {
    "base": (300, 3), "reasoner": (500, 3), "cold": (150, 2), "second": (300, 3),
    "updates": (60, 2), "rows": (16, 4), "asked": (300, 12), "prompts": (8, 2),
}  # fmt: skip
CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
SHAPE = "{random: {layers: 2, embed: 64, mlp: 192, heads: 4, initializer_range: 0.1},"
# What every run has, over what the recipe says.
RUN = """
seed: {seed}
data: {{seq_len: 64, cache_dir: '{cache}', eval: [{{path: '{held_out}', format: messages}}]}}
optimizer: {{lr: 3e-3, schedule: cosine, warmup: 0.05, weight_decay: 0.01}}
checkpoint: {{every: {{steps: 20}}}}
eval: {{max_rows: 8, samples: 0, batch_size: 8}}
logging: {{progress: none, tensorboard: false}}
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/r1_pipeline"))
    options.add_argument("--save", default="")
    options.add_argument("--smoke", action="store_true")
    for name in ("cold", "second"):
        options.add_argument(f"--{name}", type=int, help=f"steps of {name}")
    options.add_argument("--seeds", type=int, nargs="+", default=(), help="accuracy of each alone")
    given = options.parse_args()
    size = {name: pair[given.smoke] for name, pair in SIZES.items()}
    size |= {name: n for name in ("cold", "second") if (n := getattr(given, name)) is not None}
    began = time.time()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.seeds:
        return seeds(given, size)
    files = questions(given.folder, size)
    made = models(given.folder, files, size)
    accuracy = {name: judged(model, files["test"]) for name, model in made.items()}
    left, killed = (
        _Workflow(given.folder, name, files, made, size) for name in ("left_alone", "killed")
    )
    left.called()
    for stage in STAGES:
        accuracy[stage] = judged(f"{left.out / stage}@latest", files["test"])
        print(stage, accuracy[stage], flush=True)
    result = {
        "sizes": size,
        "accuracy": accuracy,
        "kept": {name: len(left.lines(name)) for name in ("rationales", "sampled")},
        "seconds_of_steps": left.seconds(),
        "skipped_when_called_again": left.called()[0].count(": unchanged"),
        "due_after_the_questions_changed": left.planned_after_a_change(files["questions"]),
        "page_kilobytes": round((left.out / "report.html").stat().st_size / 1e3),
    }
    save = lambda: given.save and duel.save(given.save, result)
    save()  # the kills take as long again
    result["kills"] = killed.with_kills(left.seconds())
    result |= {
        "equal_after_kills": {stage: left.same(killed, stage) for stage in STAGES},
        "equal_texts": {n: left.lines(n) == killed.lines(n) for n in ("rationales", "sampled")},
        "total_seconds": round(time.time() - began),
    }
    print(json.dumps(result, indent=1))
    return save()


def seeds(given: argparse.Namespace, size: dict[str, int]) -> None:
    """The accuracy of each stage with other questions, first weights and draws."""
    result: dict[str, Any] = {"sizes": size, "accuracy": {}, "seconds_of_steps": {}}
    for seed in given.seeds:
        folder = given.folder / f"seed{seed}"
        folder.mkdir(exist_ok=True)
        files = questions(folder, size, seed)
        made = models(folder, files, size, seed)
        flow = _Workflow(folder, "left_alone", files, made, size, seed)
        flow.called()
        places = made | {stage: f"{flow.out / stage}@latest" for stage in STAGES}
        found = {name: judged(place, files["test"]) for name, place in places.items()}
        print(seed, json.dumps(found), flush=True)
        result["accuracy"][seed] = found
        result["seconds_of_steps"][seed] = flow.seconds()
        if given.save:
            duel.save(given.save, result)


def worked(question: str) -> tuple[str, int]:
    """How a sum is worked out, and what it is."""
    a, b, c = map(int, question.rstrip("=").split("+"))
    first, last = (a + b) % BASE, (a + b + c) % BASE
    return f"{a}+{b}={first} {first}+{c}={last}", last


def questions(folder: pathlib.Path, size: dict[str, int], seed: int = 0) -> dict[str, pathlib.Path]:
    """Files of questions and answers; none is of two of test, base and reasoner."""
    numbers = np.random.default_rng(5 + seed).permutation(BASE**3).tolist()
    texts = [f"{n // BASE**2}+{n // BASE % BASE}+{n % BASE}=" for n in numbers]
    test, rest = texts[:TEST], texts[TEST:]
    half, shown = rest[:300], rest[300:]
    asked = half[: size["asked"]]
    user = lambda text: {"role": "user", "content": text}
    chat = lambda text, answer: {"messages": [user(text), {"role": "assistant", "content": answer}]}
    thought = lambda t: "<think>\n{}\n</think>\n\nThe answer is {}.".format(*worked(t))
    said = lambda text: f"The answer is {worked(text)[1]}."
    answered = lambda text: {"answer": str(worked(text)[1])}
    rows = {
        "base": [chat(t, said(t)) for t in half],
        "reasoner": [chat(t, thought(t)) for t in shown],
        "questions": [{"question": t, **answered(t)} for t in asked],
        "prompts": [{"messages": [user(t)], **answered(t)} for t in half],
        "held_out": [chat(t, thought(t)) for t in test],
        "test": [{"messages": [user(t)], **answered(t)} for t in test],
    }
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, records in rows.items():
        files[name].write_text("".join(json.dumps(one) + "\n" for one in records))
    tokenizer(folder / "tokenizer", [thought(t) for t in shown])
    return files


def tokenizer(folder: pathlib.Path, texts: list[str]) -> None:
    """A byte-level BPE of the words of these texts, with a chat template; digits stand alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d|[^\d]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[0])
    made.chat_template = CHAT
    made.save_pretrained(folder)


def models(
    folder: pathlib.Path, files: dict, size: dict[str, int], seed: int = 0
) -> dict[str, str]:
    """The base and the reasoner, as model folders."""
    from jaxdistill import api, commands, config
    from jaxdistill.run.export import export

    made = {}
    for name in ("base", "reasoner"):
        run, place = folder / f"{name}-run", folder / name
        if not (run / "checkpoints" / str(size[name])).exists():
            tree = yaml.safe_load(RUN.format(cache=folder / "cache", seed=seed, **files))
            tree |= {
                "run": {"name": name, "dir": str(run)},
                "student": yaml.safe_load(SHAPE + " compute_dtype: float32}"),
                "tokenizer": {"from": str(folder / "tokenizer")},
                "method": {"name": "sft"},
                "train": {"steps": size[name], "batch_size": size["rows"], "eval_every": None},
            }
            tree["data"] |= {"train": [{"path": str(files[name]), "format": "messages"}]}
            tree["data"]["loss_on"] = "assistant"
            api.train(config.loads(yaml.safe_dump(tree)))
        if not place.exists():
            export(f"{run}@latest", place, commands.Export())
        made[name] = str(place)
    return made


class _Workflow:
    """A workflow of configs/r1_pipeline.yaml in a folder, called as a command."""

    def __init__(
        self, folder: pathlib.Path, name: str, files: dict, made: dict, size: dict, seed: int = 0
    ):
        self.out, self.path = folder / name, folder / f"{name}.yaml"
        self.log = folder / f"{name}.log"
        tree = yaml.safe_load((ROOT / "configs" / "r1_pipeline.yaml").read_text())
        self.path.write_text(
            yaml.safe_dump(fitted(tree, self.out, folder, files, made, size, seed))
        )

    def call(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "jaxdistill", "workflow", str(self.path)]
        with self.log.open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def called(self) -> tuple[str, float]:
        """What a call that must succeed says, and its seconds."""
        began, before = time.perf_counter(), self.log.stat().st_size if self.log.exists() else 0
        code = self.call().wait()
        said = self.log.read_text()[before:]
        assert code == 0, f"{self.path}: ended with {code}: {said[-2000:]}"
        return said, time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """What is noted of the steps."""
        try:
            return json.loads((self.out / "workflow.json").read_text())["steps"]
        except OSError:
            return {}

    def seconds(self) -> dict[str, float]:
        return {name: one["seconds"] for name, one in self.state().items()}

    def with_kills(self, seconds: dict[str, float]) -> dict[str, str]:
        """Calls until all is done, killed once in each step; step -> how it was killed and went on.

        Args:
          seconds: that each step takes.
        """
        found = {}
        for name in seconds:
            before = self.log.stat().st_size if self.log.exists() else 0
            process = self.call()
            while f"] {name} (" not in self.log.read_text()[before:]:
                assert process.poll() is None, self.log.read_text()[-2000:]
                time.sleep(0.05)
            time.sleep(min(seconds[name] / 2, SOON))  # it may be quicker than it was
            process.kill()
            code = process.wait()
            found[name] = f"exit {code}, {self.state().get(name, {}).get('status')}"
        self.called()
        return found

    def lines(self, step: str) -> list[str]:
        """What a step that generates leaves to train on."""
        return (self.out / step / "train_think.jsonl").read_text().splitlines()

    def same(self, other: "_Workflow", stage: str) -> bool:
        """Whether a stage left the same arrays and records in both."""
        return soak_faults.same(*(soak_faults.result(one.out / stage) for one in (self, other)))

    def planned_after_a_change(self, path: pathlib.Path) -> dict[str, str]:
        """What would be done about each step if the questions were others."""
        from jaxdistill.run import workflow

        before = path.read_text()
        try:
            path.write_text("".join(before.splitlines(keepends=True)[1:]))
            return {one.step.name: one.action for one in workflow.plan(self.path)}
        finally:
            path.write_text(before)


def fitted(tree: dict, out: pathlib.Path, folder: pathlib.Path, files, made, size, seed=0) -> dict:
    """The recipe with the paths and sizes of this experiment."""
    tree = copy.deepcopy(tree) | {"dir": str(out)}
    own = yaml.safe_load(RUN.format(cache=folder / "cache", seed=seed, **files))
    tree["base"]["seed"] = own.pop("seed")
    for section, values in own.items():
        tree["base"][section] = tree["base"].get(section, {}) | values
    steps = {step["name"]: step["config"] for step in tree["steps"]}
    for name in ("rationales", "sampled"):
        teacher = steps[name]["teacher"]
        teacher |= {"dtype": "float32", "slots": 64}
        steps[name]["task"] = f"{files['questions']}?kind=number"
        steps[name]["sampling"]["max_new_tokens"] = 32
    steps["rationales"]["teacher"]["source"] = made["reasoner"]
    for name in ("cold", "second"):
        steps[name]["student"]["source"] = made["base"]
        steps[name]["train"] = {"steps": size[name], "batch_size": size["rows"]}
    for name in ("reinforced", "final"):
        steps[name]["data"]["prompts"] = [{"path": str(files["prompts"])}]
        steps[name]["rollout"] |= {"prompts_per_step": size["prompts"], "max_new_tokens": 32}
        steps[name]["optimizer"]["lr"] = 3e-4
        steps[name]["train"] = {"steps": size["updates"], "log_every": 1}
    for name in STAGES:
        steps[name]["student"]["compute_dtype"] = "float32"
        steps[name]["train"]["eval_every"] = None
    return tree


def judged(model: str, file: pathlib.Path) -> dict[str, float]:
    """Accuracy on questions, greedy, and of eight answers by vote and at best."""
    from jaxdistill.reasoning import extract
    from jaxdistill.references import load_any

    loaded = load_any(model, dtype="float32")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    prompts = [
        loaded.tokenizer(
            loaded.tokenizer.apply_chat_template(
                one["messages"], tokenize=False, add_generation_prompt=True
            )
        )["input_ids"]
        for one in records
    ]

    def final(ids):
        text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
        return extract.canonical(extract.answer(text, "number"), "number")

    return rewards.accuracy(loaded, prompts, [one["answer"] for one in records], final, 32)


if __name__ == "__main__":
    main()
