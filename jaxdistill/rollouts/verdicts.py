"""What answers earned, decided once: judged by one process, written down before it is used."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxdistill import agree
from jaxdistill.data import store
from jaxdistill.errors import StorageError
from jaxdistill.reasoning.judging import REASONS, Judges, Question, Verdict
from jaxdistill.rollouts.answers import Answer
from jaxdistill.safe import json_file

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
    """

    def __init__(
        self,
        make: Callable[[], Judges],
        decode: Callable[[Sequence[int]], str],
        folder: Path,
        verifiers: int,
    ):
        self._make, self._decode, self._path = make, decode, folder / FILE
        self._verifiers = verifiers
        self._judges: Judges | None = None
        # Of a long run only the places are kept: its verdicts would fill the memory.
        self._places: dict[str, int] | None = None

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict for each answer, the same in all processes.

        Raises:
          StorageError: where they cannot be read, or written down.
        """
        said = agree.by_leader(lambda: self._decided(answers))
        return [Verdict(reward, tuple(values), why) for reward, values, why in said]

    def _decided(self, answers: Sequence[Answer]) -> list[list[Any]]:
        """(reward, values, reason) of each answer, as JSON holds them; in one process."""
        name = _digest(answers)
        if self._places is None:
            self._places = {one[0]: place for place, one in self._lines(0)}
        if name in self._places:
            _, found = next(self._lines(self._places[name]), (0, ("", [])))
            if found[0] == name and len(found[1]) == len(answers):
                return found[1]
        if self._judges is None:
            self._judges = self._make()
        said = self._judges([self._question(one) for one in answers])
        decided = [[one.reward, list(one.values), one.reason] for one in said]
        self._places[name] = _append(self._path, {"answers": name, "verdicts": decided})
        return decided

    def _lines(self, place: int) -> Iterator[tuple[int, tuple[str, list[list[Any]]]]]:
        """(place, (answers, verdicts)) of the file's lines from a place on.

        What a kill or damage left is no verdict, and is judged again.
        """
        if not self._path.exists():
            return
        try:
            if not self._path.is_file():
                raise OSError("it is no regular file")
            with self._path.open("rb") as file:
                file.seek(place)
                while line := file.readline(json_file.MAX_BYTES):
                    with contextlib.suppress(ValueError):
                        yield place, _read(line, self._verifiers)
                    place = file.tell()
        except OSError as error:
            raise StorageError(
                f"{self._path}: cannot be read: {error.strerror or error}: make it readable"
            ) from error

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


def _read(line: bytes, verifiers: int) -> tuple[str, list[list[Any]]]:
    """The answers of a line, and their verdicts; ValueError where it holds none."""
    record = json_file.parse(line)
    json_file.check(record, {"answers": str, "verdicts": list})
    if not all(_sound(one, verifiers) for one in record["verdicts"]):
        raise ValueError("it holds what is no verdict")
    return record["answers"], record["verdicts"]


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


def _append(path: Path, record: dict[str, Any]) -> int:
    """Adds a line behind whatever is there, on the disk when it returns; its place."""
    with store.writing(path), path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        torn = end and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        return end + bool(torn)
