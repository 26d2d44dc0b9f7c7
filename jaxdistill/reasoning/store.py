"""Samples on disk, one line each, added as they come; a killed run resumes where it was."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.errors import ConfigError, DamagedError, StorageError
from jaxdistill.reasoning.bill import Bill
from jaxdistill.reasoning.rationales import Sample
from jaxdistill.safe import json_file, whole_file
from jaxdistill.safe.redact import redacted

_FIELDS = set(Sample.__dataclass_fields__)
_NONE = type(None)
_SHAPE: json_file.FieldTypes = {
    **dict.fromkeys(("id", "question", "gold", "completion", "rationale", "reason"), str),
    **{"sample": int, "tokens": int, "answer": (str, _NONE), "correct": (bool, _NONE)},
    "logprob": (int, float, _NONE),
}


class AnswerStore:
    """The samples of one configuration on disk. One process at a time writes a folder.

    samples.jsonl    one sample a line
    asked.json       what was asked: model, task, prompt and sampling
    spent.json       requests, tokens and cost of all runs together

    Args:
      folder: created if it is missing.
      asked: what decides the samples; a folder with another asked.json is refused.

    Raises:
      ConfigError: if the folder holds samples of another configuration, another process writes it,
        or a file is damaged. A torn last line, left by a kill, is dropped.
      StorageError: if it cannot be written.
    """

    def __init__(self, folder: str | pathlib.Path, asked: Mapping[str, Any]):
        self.folder = pathlib.Path(folder)
        self.path = self.folder / "samples.jsonl"
        self.samples: dict[tuple[str, int], Sample] = {}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)  # what fails once fails no second time
            try:
                self._hold()
                self._check(redacted(dict(asked)))
                self._read()
                self._bill = Bill(self.folder / "spent.json", "the samples")
            except BaseException:
                self._file.close()
                raise

    def _hold(self) -> None:
        """Locks the folder, so that no other process asks for the same samples until this ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.folder}: is being written by another process: wait until it ends, or give "
                "another `output`"
            ) from None

    def _check(self, asked: dict[str, Any]) -> None:
        note = self.folder / "asked.json"
        try:
            before = json_file.read(note, missing=None)
        except DamagedError as error:
            raise ConfigError(
                f"{error}: it says what the samples beside it answer: restore it, or remove the "
                "folder"
            ) from error
        if before is None and self.path.stat().st_size:
            raise ConfigError(
                f"{note}: is missing, and says what the samples beside it answer: restore it, or "
                "remove the folder"
            )
        if before is not None:
            changed = [name for name in asked if before.get(name) != asked[name]]
            if changed:
                raise ConfigError(
                    f"{self.folder}: holds answers to another configuration ({', '.join(changed)} "
                    "changed): give another `output`, or remove the folder"
                )
        whole_file.write_text(note, json.dumps(asked, indent=2, ensure_ascii=False) + "\n")

    def _read(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                row = json_file.parse(line)
                json_file.check(row, _SHAPE)
                negative = [name for name in ("sample", "tokens") if row[name] < 0]
                if negative:
                    raise ValueError(f"its field {negative[0]!r} is negative")
                sample = Sample(**{name: row[name] for name in _FIELDS})
            except ValueError as error:
                raise ConfigError(
                    f"{self.path}:{number}: is no sample: {error}: remove the line"
                ) from error
            self.samples.setdefault((sample.id, sample.sample), sample)

    def add(self, sample: Sample) -> bool:
        """Keeps a sample, without what looks like a key; False where it is there already."""
        key = (sample.id, sample.sample)
        if key in self.samples:
            return False
        texts = {name: redacted(value) for name, value in sample.json().items() if name != "id"}
        sample = dataclasses.replace(sample, **texts)
        with writing(self.path):
            self._append((json.dumps(sample.json(), ensure_ascii=False) + "\n").encode())
        self.samples[key] = sample
        return True

    def _append(self, record: bytes) -> None:
        """Adds a line, all of it or nothing."""
        end, rest = os.fstat(self._file.fileno()).st_size, memoryview(record)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def spend(self, now: Mapping[str, float]) -> dict[str, float]:
        """Records what was spent since the store was opened; returns the sum over all runs."""
        return self._bill.spend(now)

    def missing(self, name: str, count: int) -> list[tuple[int, int]]:
        """(first, how many) of each run of samples that a question still lacks.

        Only samples below `count` are wanted.
        """
        runs: list[tuple[int, int]] = []
        for number in range(count):
            if (name, number) in self.samples:
                continue
            if runs and sum(runs[-1]) == number:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((number, 1))
        return runs

    def close(self) -> None:
        """Ends writing."""
        self._file.close()

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@contextlib.contextmanager
def writing(place: pathlib.Path):
    """Turns a failure to write into a StorageError that names the place."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{place}: cannot be written: {error.strerror or error}") from error


def write_records(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON Lines, whole or not at all.

    Raises:
      StorageError: if it cannot be written.
    """
    with writing(path):
        whole_file.write_text(
            path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
