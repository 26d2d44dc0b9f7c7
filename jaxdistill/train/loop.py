"""The training loop, top to bottom: batch, step, numbers of the step before, evaluate, save."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxdistill.errors import DivergedError, Preempted, StorageError
from jaxdistill.report import MetricsWriter, Progress
from jaxdistill.train import faults
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.meter import Meter
from jaxdistill.train.saving import Saver, SaveSchedule
from jaxdistill.train.state import TrainState
from jaxdistill.train.step import recorded
from jaxdistill.train.stopping import Stop
from jaxdistill.types import Batch, Mean


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When the loop does what, in steps; None is never.

    Attributes:
      steps: the step to end with.
      log_every: steps between records of metrics.jsonl.
      eval_every: steps between evaluations; the last step is always evaluated.
      save: when a checkpoint is due.
      max_bad_in_a_row: steps with non-finite numbers, one after the other, that end the run.
    """

    steps: int
    log_every: int
    eval_every: int | None
    save: SaveSchedule
    max_bad_in_a_row: int


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the loop works with.

    Attributes:
      step: the compiled step, (state, teacher_params, batch) -> (state, means).
      teacher_params: None where there is no teacher.
      batches: first step index -> iterator of (step index, batch on the mesh).
      evaluate: (step, state) -> held-out metrics.
      learning_rate: step index -> learning rate, for the record.
      epoch: step index -> epochs of the data begun so far, for the record.
      meta: step -> what a checkpoint keeps besides arrays.
      checkpoints, writer, progress, meter: where results go.
      stop: whether the process was asked to stop.
    """

    step: Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Mean]]]
    teacher_params: Any
    batches: Callable[[int], Iterator[tuple[int, Batch]]]
    evaluate: Callable[[int, TrainState], dict[str, float]]
    learning_rate: Callable[[int], Any]
    epoch: Callable[[int], float]
    meta: Callable[[int], dict[str, Any]]
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress
    meter: Meter
    stop: Stop


def train(state: TrainState, parts: Parts, schedule: Schedule) -> TrainState:
    """Trains from the state's step to `schedule.steps` and returns the last state.

    Raises:
      DivergedError: after `max_bad_in_a_row` steps with non-finite numbers; the message names the
        step and the batch, and the last checkpoint stands.
      StorageError: if no checkpoint can be written, for longer than the schedule allows.
      Preempted: if the process was asked to stop; the state of the last step is saved.
    """
    first = int(state.step)
    feed = parts.batches(first)
    waiting: tuple[int, dict[str, Mean]] | None = None
    last_logged = first
    saver = Saver(parts.checkpoints, schedule.save, first, schedule.steps, _unsaved(parts))
    parts.meter.restart()

    def show(number: int, means: Mapping[str, Mean]) -> None:
        """Reads one step's numbers (this waits for the step), judges them, writes them down."""
        nonlocal last_logged
        numbers = {name: float(mean.value) for name, mean in jax.device_get(dict(means)).items()}
        _judge(number, numbers, schedule.max_bad_in_a_row, parts)
        if not recorded(schedule.log_every, schedule.steps)(number):
            return
        numbers["optim/lr"] = float(parts.learning_rate(number - 1 - int(numbers["guard/skipped"])))
        numbers["data/epoch"] = parts.epoch(number)
        numbers |= parts.meter.read(number - last_logged)
        last_logged = number
        numbers.pop("guard/in_a_row")
        parts.writer.write(number, numbers)
        parts.progress.step(number, numbers)

    for number in range(first + 1, schedule.steps + 1):
        with parts.meter.waiting("data"):
            index, batch = next(feed)
        assert index == number - 1, "the data position is the step, nothing else"
        faults.point("step.before")
        state, means = parts.step(state, parts.teacher_params, batch)
        faults.point("step.after")
        # The step above is only dispatched: while it runs, the numbers of the one before are read.
        if waiting is not None:
            show(*waiting)
        waiting = (number, means)
        if not parts.meter.overlaps:
            show(*waiting)
            waiting = None

        last = number == schedule.steps
        evaluate = last or bool(schedule.eval_every and number % schedule.eval_every == 0)
        saver.poll()
        stopping = parts.stop.asked
        save = bool(stopping) or saver.due(number)
        if not (evaluate or save):
            continue
        # Nothing is evaluated or saved before the step that made it is known to be sound.
        if waiting is not None:
            show(*waiting)
            waiting = None
        metrics = None
        if evaluate:
            faults.point("eval.before")
            with parts.meter.waiting("other"):
                metrics = parts.evaluate(number, state)
            parts.writer.write(number, metrics)
            parts.progress.step(number, metrics)
        if save:
            with parts.meter.waiting("checkpoint"):
                parts.writer.sync()
                final = last or bool(stopping)
                sent = saver.save(number, state, parts.meta(number), metrics, final)
            if sent:
                parts.writer.event("save", step=number)
        if stopping and not last:
            parts.writer.event("stopped", step=number, signal=stopping)
            raise Preempted(f"{stopping}: saved after step {number} of {schedule.steps}")
    if waiting is not None:
        show(*waiting)
    return state


def _unsaved(parts: Parts) -> Callable[[StorageError], None]:
    """Tells of a save that failed, and that training goes on."""

    def tell(error: StorageError) -> None:
        parts.writer.event("save_failed", reason=str(error))
        parts.progress.event(f"{error}. Training goes on and tries again in a minute")

    return tell


def _judge(number: int, numbers: Mapping[str, float], most: int, parts: Parts) -> None:
    """Notes a step that changed nothing, its numbers not finite; too many end the run."""
    in_a_row = int(numbers["guard/in_a_row"])
    if not in_a_row:
        return
    what = f"loss {numbers['loss/total']:g}, gradient norm {numbers['optim/grad_norm']:g}"
    parts.writer.event("skipped", step=number, batch=number - 1, in_a_row=in_a_row, numbers=what)
    parts.progress.event(f"step {number} skipped: {what}")
    if in_a_row >= most:
        parts.writer.sync()
        raise DivergedError(
            f"step {number} (batch {number - 1}): {what}; {in_a_row} steps in a row were not "
            "finite (guards.nonfinite.max_consecutive) and changed nothing. The last checkpoint is "
            "sound. Lower optimizer.lr, look at the data of that batch, or compute in float32"
        )
