"""What a server says of the student's answers: asked once, written down before it is used."""

import base64
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill import agree
from jaxdistill.data.records import TEACHER, teacher_key
from jaxdistill.errors import ModelError
from jaxdistill.reasoning.bill import Bill
from jaxdistill.reasoning.scored import Scorer
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.decisions import Decisions, hash_of
from jaxdistill.safe import json_file
from jaxdistill.train.hooks import NO_HOOKS, Hooks

FILE, BILL = "scores.jsonl", "spent.json"
KnownLogprobs = dict[int, np.ndarray]  # number of an answer -> float32, log p of its tokens


class Scores:
    """Asks a server for log p of each token of answers, or reads what it said of them before.

    A server may say something else when it is asked again: its sums depend on who else asks. What
    it says is forced to the disk before an update learns from it; a resumed run, whose answers are
    the same, reads it. Where some answers fail, what came of the others is kept.

    Attributes:
      seconds: that the last call took.
      tokens: of answers that the server was asked about in the last call.
      cost: of all that the run asked for so far, by the prices of the configuration.

    Args:
      make: makes the client, when it is first needed.
      folder: of the training; its files are written by one process.
      model: the server's name for the model, which the numbers are of.
      teacher: its name among several, which the files have too; None: it is alone.
      most: tokens at the beginning of an answer that are asked about; None: all.
      stop: whether this process was asked to stop.
      hooks: what the caller handed in.
    """

    def __init__(
        self,
        make: Callable[[], Scorer],
        folder: Path,
        *,
        model: str,
        teacher: str | None = None,
        most: int | None = None,
        stop: Callable[[], bool] = lambda: False,
        hooks: Hooks = NO_HOOKS,
    ):
        self._make, self._model, self._most = make, model, most
        self._stop, self._hooks = stop, hooks
        self._key = teacher_key(teacher)
        self._decisions = Decisions(folder / named(FILE, teacher), _read)
        self._bill_at = folder / named(BILL, teacher)
        self._client: tuple[Scorer, Bill] | None = None
        self.seconds, self.tokens, self.cost = 0.0, 0, 0.0

    def __call__(self, answers: Sequence[Answer]) -> list[np.ndarray] | None:
        """log p of the tokens of each answer, the same in all processes; None: one is to stop.

        Raises:
          ModelError: if the server does not answer, or not with log-probabilities of the tokens.
          StorageError: where they cannot be read, or written down.
          ConfigError: if what was spent cannot be read.
        """
        began = time.perf_counter()
        told = agree.by_leader(lambda: self._decided(answers))
        if told is None:
            return None
        self._hooks.at("rollout.scored")
        self.seconds, self.tokens, self.cost = time.perf_counter() - began, *told.pop("asked")
        scores = _unpacked(told)
        return [scores[number] for number in range(len(answers))]

    def _decided(self, answers: Sequence[Answer]) -> dict[str, Any] | None:
        """What is written down of the answers, once all are; in one process. None: to stop."""
        name = hash_of(answers, of=self._model)
        texts = [one.tokens[: self._most] for one in answers]
        kept = self._decisions.find(name) or {}
        known = {n: one for n, one in kept.items() if n < len(texts) and len(one) == len(texts[n])}
        lacking = [number for number in range(len(answers)) if number not in known]
        failed: list[str] = []
        if lacking:
            before = len(known)
            try:
                failed = self._ask(answers, texts, lacking, known)
            finally:
                if len(known) > before:
                    self._decisions.add(name, _packed(known, len(answers)))
        if failed:
            raise ModelError(
                f"{self._key}.api: {len(failed)} of {len(answers)} answers of the student were not "
                f"scored ({failed[0]}): nothing was learned from them, and what was received is "
                "kept: mend the server and resume the run"
            )
        if len(known) < len(answers):
            return None
        asked = sum(len(texts[number]) for number in lacking)
        return {**_packed(known, len(answers)), "asked": [asked, self.cost]}

    def _ask(
        self,
        answers: Sequence[Answer],
        texts: Sequence[np.ndarray],
        lacking: Sequence[int],
        known: KnownLogprobs,
    ) -> list[str]:
        """Adds what the server says to `known`; why the others failed."""
        if self._client is None:
            self._client = self._make(), Bill(self._bill_at, "the teacher's log-probabilities")
        scorer, bill = self._client
        prompts = {number: answers[number].prompt.tokens.tolist() for number in lacking}
        jobs = [(number, prompts[number] + texts[number].tolist()) for number in lacking]
        failed = []
        try:
            for one in scorer.score(jobs):
                number = one.job.tag[0]
                if one.failed:
                    failed.append(one.reason)
                else:
                    assert one.own is not None
                    known[number] = one.own[len(prompts[number]) - 1 :]
                if self._stop():
                    break
        finally:
            self.cost = bill.spend(scorer.spent())["cost"]
        return failed


class RoutedScores:
    """Asks of each answer the server of its prompt's teacher, where that is one.

    Attributes:
      seconds, tokens: of all servers in the last call, one after the other.
      cost: of all that the run asked them for so far.

    Args:
      servers: by the names of the teachers.
    """

    def __init__(self, servers: Mapping[str, Scores]):
        self._servers = servers
        self.seconds, self.tokens, self.cost = 0.0, 0, 0.0

    def __call__(self, answers: Sequence[Answer]) -> list[np.ndarray | None] | None:
        """As `Scores`; None of an answer whose teacher is no server."""
        scores: list[np.ndarray | None] = [None] * len(answers)
        self.seconds, self.tokens = 0.0, 0
        for name, server in self._servers.items():
            own = [n for n, one in enumerate(answers) if one.prompt.notes[TEACHER] == name]
            if not own:
                continue
            said = server([answers[number] for number in own])
            if said is None:
                return None
            for number, logprobs in zip(own, said, strict=True):
                scores[number] = logprobs
            self.seconds, self.tokens = self.seconds + server.seconds, self.tokens + server.tokens
        self.cost = sum(server.cost for server in self._servers.values())
        return scores


def named(file: str, teacher: str | None) -> str:
    """The name of a file, or that of one of several teachers."""
    stem, _, ending = file.partition(".")
    return file if teacher is None else f"{stem}-{teacher}.{ending}"


def _packed(known: KnownLogprobs, count: int) -> dict[str, Any]:
    """Numbers as JSON holds them; of an answer that lacks them the size is 0."""
    held = [known.get(number, np.zeros(0, np.float32)) for number in range(count)]
    data = np.concatenate(held).astype("<f4").tobytes()
    return {
        "sizes": [len(one) for one in held],
        "logprobs": base64.b64encode(data).decode(),
        "crc32": zlib.crc32(data),
    }


def _unpacked(stored: dict[str, Any]) -> KnownLogprobs:
    """What `_packed` was given."""
    sizes = stored["sizes"]
    flat = np.frombuffer(base64.b64decode(stored["logprobs"], validate=True), "<f4")
    parts = np.split(flat.astype(np.float32), np.cumsum(sizes)[:-1])
    return {number: part for number, part in enumerate(parts) if len(part)}


def _read(record: dict[str, Any]) -> KnownLogprobs:
    """The numbers of a line; ValueError where it holds none, or others than were written."""
    json_file.check(record, {"sizes": list, "logprobs": str, "crc32": int})
    data = base64.b64decode(record["logprobs"], validate=True)
    sizes = record["sizes"]
    counts = all(type(size) is int and size >= 0 for size in sizes)
    if not counts or 4 * sum(sizes) != len(data) or zlib.crc32(data) != record["crc32"]:
        raise ValueError("it holds other numbers than were written")
    return _unpacked(record)
