"""The training loop, top to bottom: batch, step, numbers of the step before, evaluate, save."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from jaxdistill import agree
from jaxdistill.data.feed import Feed
from jaxdistill.errors import Preempted, StorageError
from jaxdistill.methods import routed
from jaxdistill.report import MetricsWriter, ProgressLine
from jaxdistill.train import guard as guards
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.guard import Guard, Incident, StepRecord
from jaxdistill.train.hooks import NO_HOOKS, Hooks
from jaxdistill.train.meter import Meter
from jaxdistill.train.saving import Saver, SaveSchedule
from jaxdistill.train.state import TrainState
from jaxdistill.train.step import recorded
from jaxdistill.train.stopping import Stop
from jaxdistill.types import Batch, Mean, Span

_SAVE, _STOP = 1, 2  # what a process may vote for
ROW = "data_row"  # in a checkpoint's meta: the position of the step that follows


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When the loop does what, in steps; None is never.

    Attributes:
      steps: the step to end with.
      log_every: steps between records of metrics.jsonl.
      eval_every: steps between evaluations; the last step is always evaluated.
      save: when a checkpoint is due.
    """

    steps: int
    log_every: int
    eval_every: int | None
    save: SaveSchedule


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the loop works with.

    Attributes:
      step: (number of the step, state, batch) -> (state, means), compiled for the batch's shape.
      feed: gives batches, without the rows that the guard leaves out.
      place: (rows of a step, this process' part of their batch) -> the batch on the mesh.
      evaluate: (step, state) -> held-out metrics.
      learning_rate: step index -> learning rate, for the record.
      meta: what every checkpoint keeps besides arrays, the position, the guard and the feed.
      restore: the state of the newest sound checkpoint, or of the start, and its meta.
      guard: judges the numbers of every step.
      checkpoints, writer, progress, meter: where results go.
      stop: whether the process was asked to stop.
      hooks: what the caller handed in.
    """

    step: Callable[[int, TrainState, Batch], tuple[TrainState, dict[str, Mean]]]
    feed: Feed
    place: Callable[[Span, Batch], Batch]
    evaluate: Callable[[int, TrainState], dict[str, float]]
    learning_rate: Callable[[int], Any]
    meta: Mapping[str, Any]
    restore: Callable[[], tuple[TrainState, Mapping[str, Any]]]
    guard: Guard
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: ProgressLine
    meter: Meter
    stop: Stop
    hooks: Hooks = NO_HOOKS


def train(state: TrainState, row: int, parts: Parts, schedule: Schedule) -> TrainState:
    """Trains from the state's step to `schedule.steps` and returns the last state.

    Args:
      state: of the start, or of a checkpoint.
      row: the position in the data that goes with it, `ROW` of the checkpoint's meta.
      parts: what to train with.
      schedule: when what is done.

    Raises:
      DivergedError: when the numbers went wrong more often than the guard's policy allows; the
        message names the step, the batch and where it is saved, and the last checkpoint stands.
      StorageError: if no checkpoint can be written, for longer than the schedule allows.
      Preempted: if the process was asked to stop; the state of the last step is saved.
    """
    guard, number = parts.guard, int(state.step)
    vote = agree.Vote()
    saver = Saver(parts.checkpoints, schedule.save, number, schedule.steps, _unsaved(parts))
    saved = number  # the step of the newest checkpoint; before the first one there is no step
    deferred = False  # whether a save was due while steps went wrong
    unread = _Unread(parts, schedule, number)

    while number < schedule.steps:
        last = evaluate = save = stopping = False
        with parts.meter.waiting("data"):
            following = _next_batch(row, state, parts)
        if following is None:  # asked to stop while the batch was made, in all processes alike
            incident = unread.read(everything=True)
            if incident is None:
                if number != saved or not saver.settled():
                    _save(number, state, row, saver, parts, None, final=True)
                _preempted(number, parts, schedule)
        else:
            number += 1
            span, batch = following
            row = span.end_row
            parts.hooks.at("step.before")
            state, means = parts.step(number, state, batch)
            parts.hooks.at("step.after")
            unread.add(StepRecord(number, span, batch, parts.feed.origin(span)), means)
            last = number == schedule.steps
            evaluate = last or bool(schedule.eval_every and number % schedule.eval_every == 0)
            saver.poll()
            if not parts.meter.overlaps:
                jax.block_until_ready(means)  # nothing may run beside its collectives: `agree.Vote`
            # Clocks and signals are one process's own: what to do about them is decided together.
            level = vote(_STOP if parts.stop.asked else _SAVE if saver.overdue() else 0)
            save, stopping = deferred or level > 0 or saver.due(number), level == _STOP and not last

            # The step above is only dispatched: while it runs, the numbers of the one before are
            # read. But nothing is evaluated or saved before the step that made it is known to be
            # sound, and nothing is built upon a step that goes wrong before it is known what to do.
            incident = unread.read(everything=evaluate or save)
        if incident is not None:
            state, row = _go_back(state, incident, parts)
            number = int(state.step)
            saved = number if incident.action == "rollback" else saved
            unread.restart(number)
            continue

        metrics = _evaluate(number, state, row, parts) if evaluate else None
        # A row of bad steps is run again from its start, so that no checkpoint may lie inside it.
        deferred = save and guard.in_a_row > 0 and not (last or stopping)
        if save and not deferred:
            sent = _save(number, state, row, saver, parts, metrics, final=last or stopping)
            saved = number if sent else saved
        if stopping:
            _preempted(number, parts, schedule)
    return state


def _next_batch(row: int, state: TrainState, parts: Parts) -> tuple[Span, Batch] | None:
    """The rows of the next step and their batch on the mesh; None as `Feed.next`."""
    following = parts.feed.next(row, state)
    return None if following is None else (following[0], parts.place(*following))


def _save(
    number: int,
    state: TrainState,
    row: int,
    saver: Saver,
    parts: Parts,
    metrics: Mapping[str, float] | None,
    *,
    final: bool,
) -> bool:
    """Saves the state after a step, where the next one begins at a row; whether it is on its way.

    Raises:
      StorageError: as `Saver.save`.
    """
    with parts.meter.waiting("checkpoint"):
        parts.writer.sync()
        meta = {**parts.meta, ROW: row, **parts.guard.meta(), **parts.feed.kept(row)}
        sent = saver.save(number, state, meta, metrics, final, parts.feed.beside(row))
    if sent:
        parts.writer.event("save", step=number)
    return sent


def _preempted(number: int, parts: Parts, schedule: Schedule) -> NoReturn:
    """Ends the run after a step.

    Raises:
      Preempted: always.
    """
    why = parts.stop.asked or "another process was asked to stop"
    parts.writer.event("stopped", step=number, why=why)
    raise Preempted(f"{why}: saved after step {number} of {schedule.steps}")


class _Unread:
    """Steps that are dispatched, and whose numbers are not read yet, in order."""

    def __init__(self, parts: Parts, schedule: Schedule, number: int):
        self._parts = parts
        self._recorded = recorded(schedule.log_every, schedule.steps)
        self.restart(number)

    def restart(self, number: int) -> None:
        """Forgets them all: training continues from the state after step `number`."""
        self._steps: collections.deque[tuple[StepRecord, Mapping[str, Mean]]] = collections.deque()
        self._last_logged, self._rows = number, 0
        self._parts.meter.restart()

    def add(self, record: StepRecord, means: Mapping[str, Mean]) -> None:
        """Takes the numbers of the step that was just dispatched."""
        self._steps.append((record, means))

    def read(self, *, everything: bool) -> Incident | None:
        """Reads steps up to an incident; the last is left running where that does no harm."""
        incident = None
        while self._steps and incident is None:
            overlap = self._parts.meter.overlaps and not (everything or self._parts.guard.alert)
            if overlap and len(self._steps) == 1:
                break
            incident = self._report(*self._steps.popleft())
        return incident

    def _report(self, record: StepRecord, means: Mapping[str, Mean]) -> Incident | None:
        """Reads one step's numbers (this waits for the step), judges them, writes them down."""
        parts, number = self._parts, record.step
        numbers = {
            name: float(mean.value)
            for name, mean in jax.device_get(dict(means)).items()
            if mean.count or not name.startswith(routed.PREFIX)  # a teacher that was not met
        }
        incident = parts.guard.judge(record, numbers, parts.writer, parts.progress)
        self._rows += record.rows
        if incident is None and self._recorded(number):
            updates = number - 1 - int(numbers["guard/skipped"])
            numbers["optim/lr"] = float(parts.learning_rate(updates))
            numbers["data/epoch"] = parts.feed.epoch(record.span.end_row)
            numbers |= parts.meter.read(number - self._last_logged, self._rows)
            numbers |= parts.feed.numbers(record.span)
            self._last_logged, self._rows = number, 0
            numbers.pop("guard/in_a_row")
            parts.writer.write(number, numbers)
            parts.progress.step(number, numbers)
        return incident


def _evaluate(number: int, state: TrainState, row: int, parts: Parts) -> dict[str, float]:
    """Measures a state that is known to be sound and whose next step is at a row, and reports."""
    parts.hooks.at("eval.before")
    with parts.meter.waiting("other"):
        metrics = parts.evaluate(number, state)
    parts.writer.write(number, metrics)
    parts.progress.step(number, metrics)
    parts.feed.evaluated(row, metrics)
    parts.guard.judge_evaluation(number, metrics, parts.writer, parts.progress)
    return metrics


def _unsaved(parts: Parts) -> Callable[[StorageError], None]:
    """Reports a save that failed, and that training continues."""

    def report(error: StorageError) -> None:
        parts.writer.event("save_failed", reason=str(error))
        parts.progress.event(f"{error}. Training goes on and tries again in a minute")

    return report


def _go_back(state: TrainState, incident: Incident, parts: Parts) -> tuple[TrainState, int]:
    """The state and row to continue from: those before the bad steps, or those of a checkpoint."""
    guard, first = parts.guard, incident.first
    if incident.action == "rerun":
        before = first.step - 1
        guard.run_again(incident)
        parts.writer.rewind(before)
        # The bad steps changed nothing but these two numbers.
        undone = np.int32(incident.last.step - before)
        step, skipped = jax.device_get((state.step, state.skipped))
        counts = np.asarray(skipped - undone, np.int32), np.asarray(step - undone, np.int32)
        places = state.skipped.sharding, state.step.sharding
        skipped, step = jax.device_put(counts, places)
        return dataclasses.replace(state, step=step, skipped=skipped), first.span.first_row
    blamed = guards.BATCHES
    if guard.in_a_row and guard.last_good is not None:
        # Whether or not this changes the state: it is given up below.
        state, means = parts.step(incident.last.step, state, guard.last_good)
        if int(means["guard/in_a_row"].value):
            blamed = guards.PARAMETERS
    guard.check_may_roll_back(incident, blamed)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # there may be no room for two states
    state, meta = parts.restore()
    to, row = int(state.step), int(meta.get(ROW, 0))
    guard.rolled_back(incident, blamed, to, row, parts.writer)
    guard.begin(meta)
    parts.feed.begin(meta)
    parts.writer.rewind(to)
    parts.progress.event(f"step {incident.last.step} rolled back to step {to}: {incident.numbers}")
    return state, row
