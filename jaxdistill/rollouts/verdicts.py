"""What answers earned, decided once: judged by one process, written down before it is used."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxdistill import agree
from jaxdistill.reasoning.judging import REASONS, Judges, Question, Verdict
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.decisions import Decisions, hash_of
from jaxdistill.safe import json_file
from jaxdistill.train.hooks import NO_HOOKS, Hooks

FILE = "verdicts.jsonl"
BEYOND = 1e30  # a reward of this size is damage: sums of them are still float32s


class Verdicts:
    """Judges answers, or reads what was said of the same answers before.

    A verdict may be decided by the clock, so that it would not come again. It is forced to the disk
    before an update learns from it; a resumed run, whose answers are the same, reads it.

    Args:
      make: makes the judges, when they are first needed.
      decode: token ids -> text.
      folder: of the training; its file is written by one process.
      verifiers: how many values a verdict has.
      hooks: what the caller handed in.
    """

    def __init__(
        self,
        make: Callable[[], Judges],
        decode: Callable[[Sequence[int]], str],
        folder: Path,
        verifiers: int,
        hooks: Hooks = NO_HOOKS,
    ):
        self._make, self._decode = make, decode
        self._judges: Judges | None = None
        self._hooks = hooks
        self._decisions = Decisions(folder / FILE, lambda record: _read(record, verifiers))

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict for each answer, the same in all processes.

        Raises:
          StorageError: where they cannot be read, or written down.
        """
        said = agree.by_leader(lambda: self._decided(answers))
        return [Verdict(reward, tuple(values), why) for reward, values, why in said]

    def _decided(self, answers: Sequence[Answer]) -> list[list[Any]]:
        """(reward, values, reason) of each answer, as JSON holds them; in one process."""
        name = hash_of(answers, notes=True)
        stored = self._decisions.find(name)
        if stored is not None and len(stored) == len(answers):
            return stored
        if self._judges is None:
            self._judges = self._make()
        said = self._judges([self._question(one) for one in answers])
        decided = [[one.reward, list(one.values), one.reason] for one in said]
        self._hooks.at("rollout.judging")
        self._decisions.add(name, {"verdicts": decided})
        return decided

    def _question(self, answer: Answer) -> Question:
        ids = answer.tokens[: len(answer.tokens) - answer.ended].tolist()
        prompt = self._decode(answer.prompt.tokens.tolist())
        return Question(prompt, self._decode(ids), answer.prompt.notes)


def _read(record: dict[str, Any], verifiers: int) -> list[list[Any]]:
    """The verdicts of a line; ValueError where it holds none."""
    json_file.check(record, {"verdicts": list})
    if not all(_sound(one, verifiers) for one in record["verdicts"]):
        raise ValueError("it holds what is no verdict")
    return record["verdicts"]


def _sound(verdict: Any, verifiers: int) -> bool:
    if not isinstance(verdict, list) or len(verdict) != 3:
        return False
    reward, values, reason = verdict
    if not isinstance(values, list) or len(values) != verifiers:
        return False
    silent = reward is None and reason in REASONS
    return (silent or (_number(reward) and reason is None)) and all(
        value is None or _number(value) for value in values
    )


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < BEYOND
