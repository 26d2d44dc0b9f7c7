"""What a run does when its numbers go wrong: run a batch again, roll back and skip, or stop."""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.experimental import multihost_utils

from jaxdistill import agree
from jaxdistill.errors import DamagedError, DivergedError, StorageError
from jaxdistill.report import MetricsWriter, ProgressLine
from jaxdistill.safe import json_file, whole_file
from jaxdistill.train.spikes import Spikes
from jaxdistill.train.table import flatten
from jaxdistill.types import DATA, ORIGINS, STUDENT, Batch, Span

FILE = "rollbacks.json"  # in the run folder: every rollback, and which rows it left out for good
CRASH = "crash"  # in the run folder: batches that ended a run

BATCHES, PARAMETERS = "batches", "parameters"
# Who wrote the text of a step -> the name of what its losses were, in a checkpoint's meta.
_SPIKES = {ORIGINS[DATA]: "spikes", ORIGINS[STUDENT]: "spikes_student"}


@dataclass(frozen=True)
class GuardPolicy:
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


class StepRecord(NamedTuple):
    """A step that was dispatched: its number, the rows it learns from, their batch, its writer."""

    step: int
    span: Span
    batch: Batch
    origin: str  # a value of `types.ORIGINS`: the losses of each are judged apart

    @property
    def rows(self) -> int:
        """The number of rows of the global batch."""
        return self.batch.tokens.shape[0]


class Incident(NamedTuple):
    """Steps that the run must go back from.

    Attributes:
      first, last: the steps; the first stands for all of them.
      numbers: what went wrong, for people.
      action: `rerun` the first step, or `rollback` to a checkpoint and leave the rows out.
    """

    first: StepRecord
    last: StepRecord
    numbers: str
    action: Literal["rerun", "rollback"]


class Guard:
    """Judges every step of a run by its numbers, and decides what the run does about them.

    A step with a loss or gradient that is not finite leaves the state as it was (`train.step`).
    With max_consecutive = 3, and a checkpoint after step 40:

        step 51  finite
        step 52  nan                     skipped, training continues
        step 53  nan                     skipped, training continues
        step 54  nan                     the third in a row: step 52 is run again
        step 52  finite this time        transient: the machine was at fault, training continues
        step 52  nan again               reproducible: the run rolls back to step 40

    After a rollback the rows of steps 52 to 54 are left out for good. There is one exception: the
    batch of step 51, which was finite, is run once more before the state is given up. If it is not
    finite any more, the parameters are at fault, and all rows since the checkpoint are left out.

    Every number that decides is a sum over all devices, so all processes decide alike.

    Args:
      folder: of the run; the rollbacks of earlier attempts are read from it.
      policy: when and how often.
      rows_per_batch: reads a list of rollbacks that counts batches, as earlier versions wrote it.

    Raises:
      DamagedError: if the list of rollbacks cannot be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        policy: GuardPolicy,
        rows_per_batch: Callable[[], int] | None = None,
    ):
        self.folder = pathlib.Path(folder)
        self.policy = policy
        self.rollbacks: list[dict[str, Any]] = agree.by_leader(
            lambda: _read(self.folder / FILE, rows_per_batch)
        )
        self.in_a_row = 0  # steps that were not finite, until now
        self.last_good: Batch | None = None  # the last batch whose step was finite
        self._first_bad: StepRecord | None = None  # of the steps in a row, as far as we saw them
        self._spikes = {who: Spikes(policy.spike_window, policy.spike_factor) for who in _SPIKES}
        self._rerun: Incident | None = None

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """Rows left out for good: disjoint ranges (first, end), ascending."""
        return _union((one["first_row"], one["end_row"]) for one in self.rollbacks)

    @property
    def alert(self) -> bool:
        """Whether the next step must be judged before another one follows."""
        return bool(self.in_a_row or self._rerun) or self.policy.max_consecutive == 1

    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps of the guard, as JSON can hold it."""
        spikes = {_SPIKES[who]: one.state() for who, one in self._spikes.items()}
        return {**spikes, "rollbacks": len(self.rollbacks)}

    def begin(self, meta: Mapping[str, Any]) -> None:
        """Starts from the state of a checkpoint, or from the start, where `meta` is empty.

        Raises:
          DamagedError: if the checkpoint knows of more rollbacks than the list has.
        """
        if len(self.rollbacks) < meta.get("rollbacks", 0):
            raise DamagedError(
                f"{self.folder / FILE}: holds {len(self.rollbacks)} rollbacks, and the checkpoint "
                f"was made after {meta['rollbacks']}: rows that were left out for good would be "
                "met again: restore the file, or start a new run"
            )
        self.in_a_row, self._first_bad, self._rerun = 0, None, None
        for who, one in self._spikes.items():
            one.load(meta.get(_SPIKES[who], {}))

    def judge(
        self,
        record: StepRecord,
        numbers: Mapping[str, float],
        writer: MetricsWriter,
        show: ProgressLine,
    ) -> Incident | None:
        """Reports what is wrong with a step; an Incident where the run must go back."""
        number = record.step
        self.in_a_row = int(numbers["guard/in_a_row"])
        rerun, self._rerun = self._rerun, None
        if rerun is not None:
            assert number == rerun.first.step, "the step after a rerun was asked for is the rerun"
            verdict = "reproducible" if self.in_a_row else "transient"
            writer.event("rerun", step=number, **record.span._asdict(), verdict=verdict)
            show.event(f"step {number} run again: {_VERDICTS[verdict]}")
        if not self.in_a_row:
            self.last_good, self._first_bad = record.batch, None
            return self._judge_loss(record, numbers, writer, show)
        what = f"loss {numbers['loss/total']:g}, gradient norm {numbers['optim/grad_norm']:g}"
        rows = record.span._asdict()
        writer.event("skipped", step=number, **rows, in_a_row=self.in_a_row, numbers=what)
        show.event(f"step {number} skipped: {what}")
        if rerun is not None:
            return rerun._replace(numbers=what, action="rollback")
        if self._first_bad is None:
            self._first_bad = record
        if self.in_a_row < self.policy.max_consecutive:
            return None
        return Incident(self._first_bad, record, what, "rerun")

    def _judge_loss(
        self,
        record: StepRecord,
        numbers: Mapping[str, float],
        writer: MetricsWriter,
        show: ProgressLine,
    ) -> Incident | None:
        knobs = {name: value for name, value in numbers.items() if name.startswith("knobs/")}
        spike = self._spikes[record.origin].see(numbers["loss/total"], knobs)
        then, number = self.policy.spike_then, record.step
        if spike is None or then == "ignore":
            return None
        rows = record.span._asdict()
        writer.event("spike", step=number, **rows, then=then, **spike._asdict())
        what = f"loss {spike.loss:g} where {spike.expected:g} was expected"
        show.event(f"step {number} loss spike: {what}")
        return Incident(record, record, what, "rollback") if then == "rollback" else None

    def judge_evaluation(
        self, number: int, metrics: Mapping[str, float], writer: MetricsWriter, show: ProgressLine
    ) -> None:
        """Reports what is not finite; `Checkpoints` never ranks such an evaluation as the best."""
        wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
        if wrong:
            writer.event("evaluation", step=number, nonfinite=wrong)
            show.event(f"step {number} evaluation not finite: {', '.join(wrong)}")

    def run_again(self, incident: Incident) -> None:
        """The next step to be judged is the first of these, once more."""
        self._rerun = incident

    def check_may_roll_back(self, incident: Incident, blamed: str) -> None:
        """Counts the rollbacks.

        Raises:
          DivergedError: when there were enough, with the path of the saved batch and the remedy.
        """
        if len(self.rollbacks) < self.policy.max_rollbacks:
            return
        step, (first, end) = incident.first[:2]
        saved = save_batch(self.folder, incident.first)
        raise DivergedError(
            f"step {step} (rows {first} to {end - 1}): {incident.numbers}; "
            f"{_extent(incident)}, and {len(self.rollbacks)} rollbacks are spent "
            f"(guards.nonfinite.max_rollbacks = {self.policy.max_rollbacks}). None of it reached "
            f"a checkpoint: the last one is sound. {saved}. {_REMEDIES[blamed]}; then change "
            "config.resolved.yaml in the run folder and resume, or start a new run"
        )

    def rolled_back(
        self, incident: Incident, blamed: str, to: int, row: int, writer: MetricsWriter
    ) -> None:
        """Leaves the rows at fault out for good, now that the run is back at step `to`, at `row`.

        Raises:
          StorageError: if that cannot be written down.
        """
        entry = {
            "step": incident.last.step,
            "to": to,
            "first_row": row if blamed == PARAMETERS else incident.first.span.first_row,
            "end_row": incident.last.span.end_row,
            "blamed": blamed,
            "numbers": incident.numbers,
        }
        self.rollbacks.append(entry)
        agree.by_leader(lambda: _write(self.folder / FILE, self.rollbacks))
        writer.event("rollback", count=len(self.rollbacks), **entry)


_VERDICTS = {
    "transient": "finite this time: the machine was at fault, training continues from here",
    "reproducible": "the same once more: the batch or the parameters are at fault",
}
_REMEDIES = {
    BATCHES: "Look at the data of that batch, compute in float32 (student.compute_dtype, "
    "teacher.dtype), or lower optimizer.lr",
    PARAMETERS: "A batch that had been fine is not finite any more either: lower optimizer.lr, "
    "lengthen optimizer.warmup, clip harder (optimizer.clip_norm), or compute in float32 "
    "(student.compute_dtype)",
}


def _extent(incident: Incident) -> str:
    first, last = incident.first.step, incident.last.step
    if first == last:
        return "the step is one too many"
    return f"steps {first} to {last} in a row went wrong"


def save_batch(folder: pathlib.Path, record: StepRecord) -> str:
    """Writes a batch as arrays by name into crash/; a sentence that says where it is.

    Called by all processes. A disk that is full must not hide what ended the run.
    """
    whole = multihost_utils.process_allgather(record.batch, tiled=True)
    path = folder / CRASH / f"rows_{record.span.first_row:08d}.npz"
    if agree.leads():
        arrays: dict[str, Any] = {"step": record.step, **record.span._asdict()}
        arrays |= {name: _readable(leaf) for name, leaf in flatten(whole).items()}
        try:
            path.parent.mkdir(exist_ok=True)
            np.savez(path, **arrays)
        except OSError as error:
            return f"The batch could not be saved ({error})"
    return f"The batch is in {path} (numpy.load)"


def _readable(leaf: Any) -> np.ndarray:
    """The array in a type that NumPy alone reads: a stored teacher's bfloat16 becomes float32."""
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _union(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers as disjoint ranges, ascending."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((first, end))
    return merged


def _read(path: pathlib.Path, rows_per_batch: Callable[[], int] | None) -> list[dict[str, Any]]:
    try:
        if not path.exists():
            return []
        rollbacks = json_file.parse(path.read_bytes())
        assert isinstance(rollbacks, list) and all(isinstance(one, dict) for one in rollbacks)
        units = ["batch" if "first_batch" in one else "row" for one in rollbacks]
        for one, unit in zip(rollbacks, units, strict=True):
            assert 0 <= int(one[f"first_{unit}"]) < int(one[f"end_{unit}"])
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise DamagedError(
            f"{path}: the list of rollbacks cannot be read ({error!r}), and with it which rows "
            "are left out: restore the file, or start a new run"
        ) from error
    if "batch" in units:
        assert rows_per_batch is not None, "who reads a run knows its batches"
        rows = rows_per_batch()
        for one in rollbacks:
            if "first_batch" in one:
                for end in ("first", "end"):
                    one[f"{end}_row"] = one.pop(f"{end}_batch") * rows
        _write(path, rollbacks)  # before the size of a batch can change
    return rollbacks


def _write(path: pathlib.Path, content: Any) -> None:
    """Keeps the list of rollbacks where a resumed run finds it."""
    try:
        whole_file.write_text(path, json.dumps(content, indent=1))
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error}): without it a resumed run would meet the same "
            "rows again. Free space or mend the folder, then resume"
        ) from error
