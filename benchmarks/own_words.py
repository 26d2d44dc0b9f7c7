"""What a student learns from its own words: on-policy distillation beside given answers.

    python -m benchmarks.own_words SELF_INSTRUCT --save own_words_smollm2
    python -m benchmarks.own_words SELF_INSTRUCT --updates 1 --warm 1 --tokens 8 --tests 4

SELF_INSTRUCT holds seed_tasks.jsonl and user_oriented_instructions.jsonl, whose instructions are
the prompts. The teacher is SmolLM2-135M-Instruct, the student has 22 of its 30 layers. The teacher
answers every prompt once, at T = 1; the student first learns from these answers for `--warm` steps,
and every arm goes on from there for as many updates of as many answers:

- sft: the teacher's answers; kd: the same, with its probabilities;
- share 0.5, share 1.0: generalised JSD (beta 0.5), half of the updates, or all, on own answers;
- reverse: exact reverse KL on own answers; taid: TAID on own answers;
- replay: skew KL with DistiLLM's adaptive share and buffer.

Of prompts that nobody trained on it measures, in nats a token: KL(p || q) and KL(q || p) on the
teacher's answers and on the student's own, both drawn at T = 1; how much larger the first is on own
answers (excess, the exposure bias of Arora et al. 2022, arXiv 2204.01171); and ROUGE-L (F1 of words
in common order) of greedy answers with the human's. What is saved is saved after every arm.
"""

import argparse
import itertools
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from benchmarks import duel

RECIPE = pathlib.Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
OFFLINE = {"sft": "{name: sft}", "kd": "{name: kd, alpha: 0.0}"}
# arm -> (method, settings of rollout)
ON_POLICY = {
    "share 0.5": ("{name: jsd, parameters: {beta: 0.5}, alpha: 0.0}", "share: 0.5"),
    "share 1.0": ("{name: jsd, parameters: {beta: 0.5}, alpha: 0.0}", "share: 1.0"),
    "reverse": ("{name: reverse_kd, alpha: 0.0}", "share: 1.0"),
    "taid": ("{name: taid, mode: linear, t_start: 0.4, alpha: 0.0}", "share: 1.0"),
    "replay": (
        "{name: distillm, divergence: skew_reverse_kl, alpha: 0.0}",
        "share: 0.0, replay: {capacity: 64, tolerance: 0.0}",
    ),
}
ARMS = (*OFFLINE, *ON_POLICY)
SIZES = {
    "updates": (20, "of an arm"),
    "warm": (20, "steps before the arms part"),
    "answers": (16, "of an update"),
    "tokens": (64, "of an answer at most"),
    "tests": (48, "prompts that nobody trains on"),
}
ROWS = 4  # of logits at a time


def main() -> None:
    """Trains every arm of every seed, measures it, and saves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="with the two files of self-instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, (size, text) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=text)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--work", type=pathlib.Path, help="keeps models and what was measured")
    parser.add_argument("--arm", choices=("given", "start", *ARMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        return _Bench(options).measure(options.arm, options.seeds[0])
    with tempfile.TemporaryDirectory() as name:
        work = options.work or pathlib.Path(name)
        work.mkdir(parents=True, exist_ok=True)
        sizes = {name: getattr(options, name) for name in SIZES}
        kept = work / "sizes.json"
        if kept.exists() and json.loads(kept.read_text()) != sizes:
            raise SystemExit(f"{work} has other sizes: {kept.read_text()}")
        kept.write_text(json.dumps(sizes))
        command = [sys.executable, "-m", "benchmarks.own_words", str(options.folder)]
        command += ["--work", str(work), *(f"--{name}={size}" for name, size in sizes.items())]
        each: dict[str, list[dict[str, float]]] = {}
        for seed, arm in (
            (0, "given"),
            *itertools.product(options.seeds, ("start", *options.only)),
        ):
            measured = work / f"{arm}{seed}.json".replace(" ", "")
            if not measured.exists():
                subprocess.run([*command, "--arm", arm, "--seeds", str(seed)], check=True)
            found = json.loads(measured.read_text())
            print(seed, arm, json.dumps(found), flush=True)
            each.setdefault(arm, []).append(found)
            result = {"sizes": sizes, "seeds": options.seeds, "mean": _means(each), "each": each}
            if options.save:
                duel.save(options.save, result)
    return None


class _Bench:
    """Prompts, the teacher's answers to them, and the two models."""

    def __init__(self, options: argparse.Namespace):
        from jaxdistill import models

        self.folder, self.options = options.work, options
        self.source = yaml.safe_load(RECIPE.read_text())["teacher"]["source"]
        self.teacher = models.load(self.source, dtype="float32")
        records = _records(options.folder)
        order = np.random.default_rng(0).permutation(len(records))
        records = [records[number] for number in order]
        self.test, self.train = records[: options.tests], records[options.tests :]

    def measure(self, arm: str, seed: int) -> None:
        """Makes the model of an arm, and writes down what is measured of it."""
        began = time.time()
        if arm == "given":
            self._give()
            found = {"rouge_l": self._rouge_l(self.teacher)}
        else:
            model = self._warm(seed) if arm == "start" else self._arm(arm, seed)
            found = self._measured(model, seed)
        found["seconds"] = round(time.time() - began)
        path = self.folder / f"{arm}{seed}.json".replace(" ", "")
        path.write_text(json.dumps(found))

    def _give(self) -> None:
        """The teacher's answers to all prompts."""
        self._write("train", self.train, self._answers(self.teacher, self.train, 0))
        theirs = self._answers(self.teacher, self.test, 1)
        self._write("eval", self.test, theirs)
        (self.folder / "theirs.json").write_text(json.dumps(theirs))
        lines = [json.dumps({"messages": [_user(prompt)]}) for prompt, _ in self.train]
        (self.folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")

    def _write(self, name: str, records: Sequence, answers: Sequence[Sequence[int]]) -> None:
        decode = lambda ids: self.teacher.tokenizer.decode(ids, skip_special_tokens=True)
        lines = [
            {"messages": [_user(prompt), {"role": "assistant", "content": decode(ids).strip()}]}
            for (prompt, _), ids in zip(records, answers, strict=True)
        ]
        lines = [json.dumps(one) for one in lines if one["messages"][1]["content"]]
        (self.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def _ids(self, records: Sequence) -> list[list[int]]:
        tokenizer = self.teacher.tokenizer
        return [
            tokenizer(
                tokenizer.apply_chat_template(
                    [_user(prompt)], tokenize=False, add_generation_prompt=True
                )
            )["input_ids"]
            for prompt, _ in records
        ]

    def _answers(self, model: Any, records: Sequence, seed: int, **drawing: Any) -> list[list[int]]:
        drawing = {"temperature": 1.0, "seed": seed} | drawing
        done = model.complete(
            self._ids(records), max_new_tokens=self.options.tokens, logprobs=False, slots=16,
            **drawing,
        )  # fmt: skip
        return [list(row[0].tokens) for row in done]

    def _train(self, run: pathlib.Path, seed: int, *settings: str) -> Any:
        from jaxdistill import api, config
        from jaxdistill.references import load_any

        shutil.rmtree(run, ignore_errors=True)  # what a killed process left
        data = "train: [{path: %s, format: messages}], eval: [{path: %s, format: messages}]"
        data %= (self.folder / "train.jsonl", self.folder / "eval.jsonl")
        api.train(
            config.load(
                RECIPE,
                [
                    f"run.dir={run}", f"seed={seed}",
                    "eval={compare: false, samples: 0, max_rows: 8}",
                    f"data={{{data}, seq_len: 256, loss_on: assistant, "
                    f"cache_dir: {self.folder / 'cache'}}}",
                    "optimizer={lr: 1e-4, warmup: 0.1}",
                    "logging={progress: none, tensorboard: false}",
                    *settings,
                ],
            )
        )  # fmt: skip
        model = load_any(f"{run}@latest", dtype="float32")
        shutil.rmtree(run)  # a gigabyte each
        return model

    def _warm(self, seed: int) -> Any:
        """The student after the steps that all arms share."""
        from jaxdistill import models

        steps = f"train={{steps: {self.options.warm}, batch_size: 4, eval_every: null}}"
        model = self._train(self.folder / f"warm{seed}", seed, steps, f"method={OFFLINE['kd']}")
        models.save(model, self.folder / f"start{seed}")
        return model

    def _arm(self, name: str, seed: int) -> Any:
        """The student after the updates of an arm."""
        run = self.folder / f"{name.replace(' ', '')}{seed}"
        source = f"student={{source: {self.folder / f'start{seed}'}, compute_dtype: float32}}"
        updates, answers = self.options.updates, self.options.answers
        if name in OFFLINE:
            steps = f"train={{steps: {updates}, batch_size: {answers}, eval_every: null}}"
            one = "data.packing=none"  # as many answers in an update as the student would write
            return self._train(run, seed, source, steps, one, f"method={OFFLINE[name]}")
        method, rollout = ON_POLICY[name]
        every = max(updates // 4, 1) if name == "replay" else "null"
        sizes = f"prompts_per_step: {answers}, samples: 1, max_new_tokens: {self.options.tokens}"
        settings = [
            source,
            f"train={{steps: {updates}, eval_every: {every}}}",
            f"method={method}",
            f"rollout={{{rollout}, {sizes}}}",
            f"data.prompts=[{{path: {self.folder / 'prompts.jsonl'}}}]",
        ]
        if rollout == "share: 1.0":
            settings.append("data.train=[]")
        return self._train(run, seed, *settings)

    def _rouge_l(self, model: Any) -> float:
        greedy = self._answers(model, self.test, 0, temperature=0.0)
        decode = lambda ids: self.teacher.tokenizer.decode(ids, skip_special_tokens=True)
        pairs = zip(greedy, self.test, strict=True)
        return statistics.fmean(rouge_l(decode(ids), gold) for ids, (_, gold) in pairs)

    def _measured(self, model: Any, seed: int) -> dict[str, float]:
        """A student on the test's prompts."""
        found = {"rouge_l": self._rouge_l(model)}
        own = self._answers(model, self.test, 100 + seed)
        theirs = json.loads((self.folder / "theirs.json").read_text())
        for place, answers in (("given", theirs), ("own", own)):
            rows = self._rows(answers)
            forward, reverse = _divergences(
                self._logits(model, rows), self._logits(self.teacher, rows)
            )
            found |= {f"forward_kl_{place}": forward, f"reverse_kl_{place}": reverse}
        found["excess"] = found["forward_kl_own"] / found["forward_kl_given"] - 1
        found["own_tokens"] = statistics.fmean(map(len, own))
        return found

    def _rows(self, answers: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the test's prompts with answers, and which positions predict one of those."""
        rows = [
            (prompt, answer)
            for prompt, answer in zip(self._ids(self.test), answers, strict=True)
            if answer
        ]
        length = -(-max(len(prompt) + len(answer) for prompt, answer in rows) // 32) * 32
        tokens = np.zeros((-(-len(rows) // ROWS) * ROWS, length), np.int32)
        counted = np.zeros(tokens.shape, bool)
        for number, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            tokens[number, :end] = prompt + answer
            counted[number, len(prompt) - 1 : end - 1] = True
        return tokens, counted

    def _logits(self, model: Any, rows: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
        """Of the counted positions, some rows at a time: [places, vocab] each."""
        tokens, counted = rows
        vocab = len(self.teacher.tokenizer)
        parts = [slice(first, first + ROWS) for first in range(0, len(tokens), ROWS)]
        return [np.asarray(model.logits(tokens[p])[..., :vocab])[counted[p]] for p in parts]


def _divergences(q: list[np.ndarray], p: list[np.ndarray]) -> tuple[float, float]:
    """KL(p || q) and KL(q || p) from logits, means of all places."""
    totals, count = np.zeros(2), 0
    for q_NV, p_NV in zip(q, p, strict=True):
        logq, logp = jax.nn.log_softmax(q_NV), jax.nn.log_softmax(p_NV)
        forward = (jnp.exp(logp) * (logp - logq)).sum()
        reverse = (jnp.exp(logq) * (logq - logp)).sum()
        totals += float(forward), float(reverse)
        count += len(q_NV)
    forward, reverse = totals / count
    return float(forward), float(reverse)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _records(folder: pathlib.Path) -> list[tuple[str, str]]:
    """(prompt, a human's answer), shorter than 400 characters each."""
    found = []
    for name in ("seed_tasks", "user_oriented_instructions"):
        for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines():
            one = json.loads(line)
            instance = one["instances"][0]
            prompt = "\n\n".join(filter(None, (one["instruction"], instance["input"])))
            if len(prompt) < 400 and instance["output"].strip():
                found.append((prompt, instance["output"]))
    return found


def rouge_l(answer: str, gold: str) -> float:
    """F1 of the longest common subsequence of words, lower case and without a stemmer."""
    ours, theirs = (re.findall(r"[a-z0-9]+", text.lower())[:200] for text in (answer, gold))
    if not ours or not theirs:
        return 0.0
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for place, other in enumerate(theirs, 1):
            corner, before = before, lengths[place]
            lengths[place] = corner + 1 if word == other else max(before, lengths[place - 1])
    same = lengths[-1]
    return 2 * same / (len(ours) + len(theirs))


def _means(each: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """arm -> measure -> mean, least and largest over the seeds."""
    return {
        arm: {
            name: [f([one[name] for one in seeds]) for f in (statistics.fmean, min, max)]
            for name in seeds[0]
        }
        for arm, seeds in each.items()
    }


if __name__ == "__main__":
    main()
