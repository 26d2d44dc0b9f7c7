"""What answers earned, decided once: judged by one process, written down before it is used."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxdistill import agree
from jaxdistill.data import store
from jaxdistill.reasoning.judging import REASONS, Judges, Question, Verdict
from jaxdistill.rollouts.answers import Answer

FILE = "verdicts.jsonl"


class Verdicts:
    """Judges answers, or reads what was said of the same answers before.

    A verdict may be decided by the clock, so that it would not come again. It is forced to the disk
    before an update learns from it; a resumed run, whose answers are the same, reads it.

    Args:
      make: makes the judges, when they are first needed.
      decode: token ids -> text.
      folder: of the training; its file is written by one process.
    """

    def __init__(
        self, make: Callable[[], Judges], decode: Callable[[Sequence[int]], str], folder: Path
    ):
        self._make, self._decode, self._path = make, decode, folder / FILE
        self._judges: Judges | None = None
        self._known: dict[str, Any] | None = None

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict for each answer, the same in all processes.

        Raises:
          StorageError: where it cannot be written down.
        """
        said = agree.by_leader(lambda: self._decided(answers))
        return [Verdict(reward, tuple(values), why) for reward, values, why in said]

    def _decided(self, answers: Sequence[Answer]) -> list[list[Any]]:
        """(reward, values, reason) of each answer, as JSON holds them; in one process."""
        name = _digest(answers)
        if self._known is None:
            self._known = _read(self._path)
        if name not in self._known:
            if self._judges is None:
                self._judges = self._make()
            said = self._judges([self._question(one) for one in answers])
            self._known[name] = [[one.reward, list(one.values), one.reason] for one in said]
            _append(self._path, {"answers": name, "verdicts": self._known[name]})
        return self._known[name]

    def _question(self, answer: Answer) -> Question:
        ids = answer.tokens[: len(answer.tokens) - answer.ended].tolist()
        prompt = self._decode(answer.prompt.tokens.tolist())
        return Question(prompt, self._decode(ids), answer.prompt.notes)


def _digest(answers: Sequence[Answer]) -> str:
    """A hash of prompts and answers."""
    digest = hashlib.blake2b(digest_size=16)
    for one in answers:
        for ids in (one.prompt.tokens, one.tokens):
            digest.update(len(ids).to_bytes(8, "big") + ids.astype("<i4").tobytes())
        digest.update(json.dumps(dict(one.prompt.notes), sort_keys=True).encode())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """The verdicts of a file by their answers; lines that a kill or damage left are no verdicts."""
    found: dict[str, Any] = {}
    if not path.exists():
        return found
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            verdicts = record["verdicts"]
            assert all(_sound(one) for one in verdicts)
            found[str(record["answers"])] = verdicts
        except (ValueError, TypeError, KeyError, AssertionError, RecursionError):
            continue
    return found


def _sound(verdict: Any) -> bool:
    reward, values, reason = verdict
    number = lambda value: value is None or type(value) in (int, float)
    return number(reward) and all(map(number, values)) and reason in (None, *REASONS)


def _append(path: Path, record: dict[str, Any]) -> None:
    """Adds a line behind whatever is there, on the disk when it returns."""
    with store.writing(path), path.open("a+b") as file:
        torn = file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
