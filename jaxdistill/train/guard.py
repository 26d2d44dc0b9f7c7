"""What a run does when its numbers go wrong: run a batch again, roll back and skip, or stop."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.experimental import multihost_utils

from jaxdistill import agree, whole_file
from jaxdistill.errors import DamagedError, DivergedError, StorageError
from jaxdistill.report import MetricsWriter, Progress
from jaxdistill.train.spikes import Spikes
from jaxdistill.types import Batch

FILE = "rollbacks.json"  # in the run folder: every rollback, and which batches it left out for good
CRASH = "crash"  # in the run folder: batches that ended a run

BATCHES, PARAMETERS = "batches", "parameters"


@dataclasses.dataclass(frozen=True)
class Policy:
    """When a run is set back, and how often.

    Attributes:
      max_consecutive: steps in a row that are not finite until the first of them is run again.
      max_rollbacks: how often a run goes back before it stops.
      spike_window, spike_factor: see `Spikes`.
      spike_then: what follows a spike.
    """

    max_consecutive: int = 5
    max_rollbacks: int = 2
    spike_window: int = 200
    spike_factor: float = 10.0
    spike_then: Literal["ignore", "warn", "rollback"] = "warn"


class Judged(NamedTuple):
    """A step whose numbers have been read: its number, the index of its batch, and the batch."""

    step: int
    index: int
    batch: Batch


class Trouble(NamedTuple):
    """Steps that the run must go back from.

    Attributes:
      first, last: the numbers of the steps.
      what: their numbers, in words.
      culprit: the step whose batch stands for all of them.
      action: `rerun` the first of them, or `rollback` behind all of them.
    """

    first: int
    last: int
    what: str
    culprit: Judged
    action: Literal["rerun", "rollback"]


class Guard:
    """Judges every step of a run by its numbers, and keeps what was decided.

    A step that is not finite changes nothing (`train.step`), so that after some of them in a row
    the state is still the one before the first. That one is run again: when it is finite now, the
    machine was at fault, and the run goes on from there as if nothing had been. When it is not,
    the run goes back to its last checkpoint and leaves batches out: those of the row, or, when a
    batch that was fine a moment ago is not finite any more either, all since the checkpoint.

    All that it decides by is summed over all devices, so that every process decides alike.

    Args:
      folder: of the run; rollbacks of earlier attempts are read from it.
      policy: when and how often.

    Raises:
      DamagedError: if the list of rollbacks cannot be read.
    """

    def __init__(self, folder: str | os.PathLike, policy: Policy):
        self.folder = pathlib.Path(folder)
        self.policy = policy
        self.rollbacks: list[dict[str, Any]] = agree.by_leader(lambda: _read(self.folder / FILE))
        self.in_a_row = 0  # steps that were not finite, until now
        self.begun = 0  # the step before which nothing can be run again
        self.good: Batch | None = None  # the last batch whose step was finite
        self._spikes = Spikes(policy.spike_window, policy.spike_factor)
        self._rerun: Trouble | None = None

    @property
    def skips(self) -> list[tuple[int, int]]:
        """Batches left out for good: disjoint ranges (first, end), ascending."""
        return _union((one["first_batch"], one["end_batch"]) for one in self.rollbacks)

    def position(self, step: int) -> int:
        """The index of the batch of a step, steps counted from 0: which is the data position."""
        index = step
        for first, end in self.skips:
            if index >= first:
                index += end - first
        return index

    def stretches(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Ranges of batches for the steps from `start` to before `stop`, counted from 0."""
        first, end = self.position(start), self.position(stop - 1) + 1
        edges = [
            first,
            *(edge for skip in self.skips for edge in skip if first < skip[0] < end),
            end,
        ]
        return list(zip(edges[::2], edges[1::2], strict=True))

    @property
    def alert(self) -> bool:
        """Whether the next step must be judged before another one follows."""
        return bool(self.in_a_row or self._rerun) or self.policy.max_consecutive == 1

    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON can hold it."""
        return {"spikes": self._spikes.state()}

    def begin(self, step: int, meta: Mapping[str, Any]) -> None:
        """Starts from the state of a checkpoint, or from the start, where `meta` is empty."""
        self.begun, self.in_a_row, self._rerun = step, 0, None
        self._spikes.load(meta.get("spikes", {}))

    def judge(
        self, judged: Judged, numbers: Mapping[str, float], writer: MetricsWriter, show: Progress
    ) -> Trouble | None:
        """Notes what is wrong with a step; a Trouble where the run cannot just go on."""
        number = judged.step
        self.in_a_row = int(numbers["guard/in_a_row"])
        row, self._rerun = self._rerun, None
        if row is not None:
            assert number == row.first, "the step after a rerun was asked for is the rerun"
            verdict = "fact" if self.in_a_row else "fluke"
            writer.event("rerun", step=number, batch=judged.index, verdict=verdict)
            show.event(f"step {number} run again: {_VERDICTS[verdict]}")
        if not self.in_a_row:
            self.good = judged.batch
            return self._judge_loss(judged, numbers, writer, show)
        what = f"loss {numbers['loss/total']:g}, gradient norm {numbers['optim/grad_norm']:g}"
        writer.event(
            "skipped", step=number, batch=judged.index, in_a_row=self.in_a_row, numbers=what
        )
        show.event(f"step {number} skipped: {what}")
        if row is not None:
            return row._replace(what=what, culprit=judged, action="rollback")
        if self.in_a_row < self.policy.max_consecutive:
            return None
        first = max(number - self.in_a_row, self.begun) + 1
        return Trouble(first, number, what, judged, "rerun")

    def _judge_loss(
        self, judged: Judged, numbers: Mapping[str, float], writer: MetricsWriter, show: Progress
    ) -> Trouble | None:
        knobs = {name: value for name, value in numbers.items() if name.startswith("knobs/")}
        spike = self._spikes.see(numbers["loss/total"], knobs)
        then, number = self.policy.spike_then, judged.step
        if spike is None or then == "ignore":
            return None
        writer.event("spike", step=number, batch=judged.index, then=then, **spike._asdict())
        what = f"loss {spike.loss:g} where {spike.expected:g} was expected"
        show.event(f"step {number} loss spike: {what}")
        if then == "warn":
            return None
        return Trouble(number, number, what, judged, "rollback")

    def judge_evaluation(
        self, number: int, metrics: Mapping[str, float], writer: MetricsWriter, show: Progress
    ) -> None:
        """Notes what is not finite; `Checkpoints` never ranks such an evaluation as the best."""
        wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
        if wrong:
            writer.event("evaluation", step=number, nonfinite=wrong)
            show.event(f"step {number} evaluation not finite: {', '.join(wrong)}")

    def run_again(self, trouble: Trouble) -> None:
        """The next step to be judged is the first of these, once more."""
        self._rerun = trouble

    def check_may_roll_back(self, trouble: Trouble, blamed: str) -> None:
        """Counts the rollbacks.

        Raises:
          DivergedError: when there were enough, with the path of the saved batch and the remedy.
        """
        if len(self.rollbacks) < self.policy.max_rollbacks:
            return
        saved = save_batch(self.folder, trouble.culprit)
        raise DivergedError(
            f"step {trouble.culprit.step} (batch {trouble.culprit.index}): {trouble.what}; "
            f"{_told(trouble)}, and {len(self.rollbacks)} rollbacks are spent "
            f"(guards.nonfinite.max_rollbacks = {self.policy.max_rollbacks}). None of it reached "
            f"a checkpoint: the last one is sound. {saved}. {_REMEDIES[blamed]}; then change "
            "config.resolved.yaml in the run folder and resume, or start a new run"
        )

    def rolled_back(self, trouble: Trouble, blamed: str, to: int, writer: MetricsWriter) -> None:
        """Leaves the batches at fault out for good, now that the run is back at step `to`.

        Raises:
          StorageError: if that cannot be written down.
        """
        begin = to if blamed == PARAMETERS else trouble.first - 1
        entry = {
            "step": trouble.last,
            "to": to,
            "first_batch": self.position(begin),
            "end_batch": self.position(trouble.last - 1) + 1,
            "blamed": blamed,
            "numbers": trouble.what,
        }
        self.rollbacks.append(entry)
        agree.by_leader(lambda: _write(self.folder / FILE, self.rollbacks))
        writer.event("rollback", count=len(self.rollbacks), **entry)


_VERDICTS = {
    "fluke": "finite this time: the machine was at fault, the run goes on from here",
    "fact": "the same once more: the batch or the parameters are at fault",
}
_REMEDIES = {
    BATCHES: "Look at the data of that batch, compute in float32 (student.compute_dtype, "
    "teacher.dtype), or lower optimizer.lr",
    PARAMETERS: "A batch that had been fine is not finite any more either: lower optimizer.lr, "
    "lengthen optimizer.warmup, clip harder (optimizer.clip_norm), or compute in float32 "
    "(student.compute_dtype)",
}


def _told(trouble: Trouble) -> str:
    count = trouble.last - trouble.first + 1
    if count == 1:
        return "the step is one too many"
    return f"steps {trouble.first} to {trouble.last} in a row went wrong"


def save_batch(folder: pathlib.Path, judged: Judged) -> str:
    """Writes a batch as arrays by name into crash/; a sentence that says where it is.

    Called by all processes. A disk that is full must not hide what ended the run.
    """
    whole = multihost_utils.process_allgather(judged.batch, tiled=True)
    path = folder / CRASH / f"batch_{judged.index:08d}.npz"
    if agree.leads():
        fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
        arrays: dict[str, Any] = {
            name: np.asarray(value) for name, value in fields.items() if value is not None
        }
        try:
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **arrays, step=judged.step, index=judged.index)
        except OSError as error:
            return f"The batch could not be saved ({error})"
    return f"The batch is in {path} (numpy.load)"


def _union(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers as disjoint ranges, ascending."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((first, end))
    return merged


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for one in found:
            assert 0 <= int(one["first_batch"]) < int(one["end_batch"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise DamagedError(
            f"{path}: the list of rollbacks cannot be read ({error!r}), and with it which batches "
            "are left out: restore the file, or start a new run"
        ) from error
    return found


def _write(path: pathlib.Path, content: Any) -> None:
    """Keeps the list of rollbacks where a resumed run finds it."""
    try:
        whole_file.write_text(path, json.dumps(content, indent=1))
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error}): without it a resumed run would meet the same "
            "batches again. Free space or mend the folder, then resume"
        ) from error
