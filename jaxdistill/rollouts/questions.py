"""Held-out questions: how often the student is right now, of several answers to each."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdistill.data.prompts import Prompts
from jaxdistill.reasoning import extract, votes
from jaxdistill.reasoning.judging import Verdict
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.writing import Writer

# Random streams of their own: prompts of training count from 0, stand-ins from 2**31 - 1 down.
FIRST_PLACE = 2**30
SHOWN = 6  # questions whose answers are shown


class Questions:
    """Asks held-out questions at each evaluation, always by the same random streams.

        eval/pass_at_1     share of all answers that the first verifier gives 1
        eval/pass_at_k     share of questions with a right one among k answers
        eval/maj_at_k      share of questions whose most frequent final answer is right

    Attributes:
      shown: of a few questions, as they were last answered, a right and a wrong answer side by
        side, those that have both before the others: rows of `MetricsWriter.samples`.

    Args:
      prompts: what is asked.
      writer: answers.
      judge: answers -> verdicts, the same in all processes.
      decode: token ids -> text.
      samples: answers to each question, k.
      kind: of the final answers that vote, a kind of `extract.answer`; None: nobody votes.
    """

    def __init__(
        self,
        prompts: Prompts,
        writer: Writer,
        judge: Callable[[Sequence[Answer]], list[Verdict]],
        decode: Callable[[Sequence[int]], str],
        *,
        samples: int,
        kind: str | None,
    ):
        self._asked = {FIRST_PLACE + i: one for i, one in enumerate(prompts.prompts)}
        self._writer, self._judge, self._decode = writer, judge, decode
        self._samples, self._kind = samples, kind
        self.shown: list[dict[str, str]] = []

    def measure(self, params: Any, step: int) -> dict[str, float]:
        """What the student's answers are worth with these parameters.

        Args:
          params: the student's, adapters in place.
          step: the updates that made them.
        """
        began = time.perf_counter()
        answers = self._writer.write(params, step, self._asked)
        assert answers is not None, "its writer is not asked to stop"
        verdicts = self._judge(answers)
        rewards = [one.reward for one in verdicts if one.reward is not None]
        k = self._samples
        right = np.asarray([one.values[0] is not None and one.values[0] >= 1 for one in verdicts])
        right = right.reshape(-1, k)
        self.shown = self._side_by_side(answers, right)
        shares = {
            "eval/questions": float(len(self._asked)),
            "eval/reward_mean": float(np.mean(rewards)) if rewards else 0.0,
            "eval/answer_length": float(np.mean([len(one.tokens) for one in answers])),
            "eval/pass_at_1": float(right.mean()),
            f"eval/pass_at_{k}": float(right.any(axis=1).mean()),
        }
        if self._kind is not None:
            shares[f"eval/maj_at_{k}"] = self._majority(answers)
        return shares | {"perf/questions_seconds": time.perf_counter() - began}

    def _side_by_side(self, answers: Sequence[Answer], right: np.ndarray) -> list[dict[str, str]]:
        """A right and a wrong answer to each of a few questions, where it has them."""
        mixed = [number for number, row in enumerate(right) if row.any() and not row.all()]
        alike = [number for number in range(len(right)) if number not in mixed]
        rows = []
        for number in (mixed + alike)[:SHOWN]:
            first = number * self._samples
            prompt = answers[first].prompt
            row = {"prompt": self._decode(prompt.tokens.tolist())}
            row |= {"wanted": prompt.notes["answer"]} if "answer" in prompt.notes else {}
            for name, wanted in (("right", True), ("wrong", False)):
                chosen = np.flatnonzero(right[number] == wanted)
                row |= {name: self._text(answers[first + chosen[0]])} if len(chosen) else {}
            rows.append(row)
        return rows

    def _majority(self, answers: Sequence[Answer]) -> float:
        kind, k = str(self._kind), self._samples
        said = [extract.canonical(extract.answer(self._text(one), kind), kind) for one in answers]
        rows = [said[at : at + k] for at in range(0, len(said), k)]
        golds = [one.notes.get("answer") for one in self._asked.values()]
        wanted = [extract.canonical(gold, kind) for gold in golds]
        return float(votes.maj_at_k(rows, wanted, k).mean())

    def _text(self, answer: Answer) -> str:
        return self._decode(answer.tokens[: len(answer.tokens) - answer.ended].tolist())
