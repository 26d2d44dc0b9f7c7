"""One training within a run, of its student or of the control: from the last checkpoint on."""

import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from jaxdistill import agree, report
from jaxdistill.config import Config
from jaxdistill.data import pipeline
from jaxdistill.data.dataset import Dataset
from jaxdistill.engine import run_table, setup, states
from jaxdistill.engine.run_dir import RunDir
from jaxdistill.models import Model, forward_flops_per_token
from jaxdistill.sharding import local_rows
from jaxdistill.train import loop
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.guard import Guard, Policy
from jaxdistill.train.hooks import Hooks
from jaxdistill.train.meter import Meter
from jaxdistill.train.saving import SaveSchedule
from jaxdistill.train.state import TrainState
from jaxdistill.train.step import place, recorded
from jaxdistill.train.stopping import Stop

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training works with.

    Attributes:
      run: the run it belongs to.
      folder: where its metrics go, and the list of its rollbacks.
      config: what to do; the control's differs from the run's.
      method: its objective, teacher and optimizer.
      models: who takes part.
      mesh: of all devices.
      dataset: the rows to learn from.
      hooks: what the caller handed in.
      table: measures the student, and lets it speak.
      checkpoints: where its states go.
      stop: whether the process was asked to stop.
      main: whether it is the student's: that one's samples and last step are kept with the run.
    """

    run: RunDir
    folder: pathlib.Path
    config: Config
    method: setup.RunMethod
    models: setup.Models
    mesh: Mesh
    dataset: Dataset
    hooks: Hooks
    table: run_table.RunTable
    checkpoints: Checkpoints
    stop: Stop
    main: bool

    def train(self, student: Model) -> tuple[TrainState, dict[str, float]]:
        """Trains from the latest checkpoint, or the start, to the last step.

        Args:
          student: the one of the start; its arrays are taken over.

        Returns:
          (the last state, its held-out metrics).

        Raises:
          DivergedError, StorageError, Preempted: as `loop.train`.
        """
        state, meta = self._state(student)
        first = int(state.step)
        if first >= self.config.train.steps:
            return state, self.table.evaluate(state)
        who = "the student" if self.main else "the SFT control"
        log.info("training %s: compiling the step", who)
        guard = Guard(self.folder, _policy(self.config))
        guard.begin(first, meta)
        latest: dict[str, float] = {}
        with contextlib.ExitStack() as stack:
            progress = report.Progress(
                self.config.train.steps,
                mode=self.config.logging.progress if agree.leads() else "none",
                log_every=self.config.train.log_every,
            )
            stack.enter_context(progress)
            writer = agree.together(lambda: self._writer(first, progress))
            stack.enter_context(writer)
            parts = self._parts(state, guard, writer, progress, latest)
            with self.stop.deferred():
                state = loop.train(state, parts, _schedule(self.config))
            if self.main:
                self.run.update(step=self.config.train.steps)
        return state, latest

    def _state(self, student: Model) -> tuple[TrainState, Mapping[str, Any]]:
        """The state of the latest sound checkpoint with its meta, or that before the first step."""
        objective, tx = self.method.objective, self.method.tx
        if self.checkpoints.latest() is None:
            return states.create(self.config, student, objective, tx, self.mesh), {}
        shape = states.abstract(self.config, student.config, objective, tx, self.mesh)
        damaged = lambda step, reason: self.run.event("damaged", step=step, reason=reason)
        _, state, meta = self.checkpoints.restore_latest(shape, damaged)
        return state, meta

    def _writer(self, first: int, progress: report.Progress) -> report.MetricsWriter:
        """What keeps the numbers, in one process of the run."""
        if not agree.leads():
            return report.SilentWriter()
        resume_step = first if (self.folder / "metrics.jsonl").exists() else None
        board = self.config.logging.tensorboard
        return report.MetricsWriter(
            self.folder, board, resume_step, notice=progress.event, hooks=self.hooks
        )

    def _parts(
        self,
        state: TrainState,
        guard: Guard,
        writer: report.MetricsWriter,
        progress: report.Progress,
        latest: dict[str, float],
    ) -> loop.Parts:
        """What the loop works with; the metrics of every evaluation go to `latest`."""
        teacher_params = setup.teacher_params_of(self.models, self.method)

        def evaluate(number: int, state: TrainState) -> dict[str, float]:
            latest.update(self.table.evaluate(state))
            if self.main:
                self.table.write_samples(number, state, writer)
            return dict(latest)

        def restore() -> tuple[TrainState, Mapping[str, Any]]:
            made = self.models  # the first state took the student's arrays over
            return self._state(setup.student_of(self.config, made.student, made.teacher, self.mesh))

        def epoch(number: int) -> float:
            rows = (guard.position(number - 1) + 1) * self.config.train.batch_size
            return rows / self.dataset.num_rows

        return loop.Parts(
            step=self._compiled(state, teacher_params, writer, progress),
            teacher_params=teacher_params,
            batches=lambda start: self._batches(guard, start),
            evaluate=evaluate,
            learning_rate=self.method.learning_rate,
            epoch=epoch,
            meta=lambda step: {"data_step": guard.position(step), "seed": self.config.seed},
            restore=restore,
            guard=guard,
            checkpoints=self.checkpoints,
            writer=writer,
            progress=progress,
            meter=_meter(self.config, self.models, self.method, self.mesh),
            stop=self.stop,
            hooks=self.hooks,
        )

    def _compiled(
        self,
        state: TrainState,
        teacher_params: Any,
        writer: report.MetricsWriter,
        progress: report.Progress,
    ) -> Any:
        """The compiled step, and how long that took."""
        config, began = self.config, time.perf_counter()
        monitor = recorded(config.train.log_every, config.train.steps)
        method = dataclasses.replace(self.method, loss=self.hooks.loss(self.method.loss))
        # Together: in its first step nobody waits long for one that is still compiling.
        step = agree.together(
            lambda: setup.compile_step(config, method, state, teacher_params, self.mesh, monitor)
        )
        seconds = time.perf_counter() - began
        writer.event("compiled", seconds=round(seconds, 3), from_step=int(state.step))
        progress.event(f"compiled in {seconds:.1f} s")
        return step

    def _batches(self, guard: Guard, start: int) -> Iterator[tuple[int, Any]]:
        """The batches from that of a step (from 0) to the last one, without those left out."""
        size = self.config.train.batch_size
        for first, stop in guard.stretches(start, self.config.train.steps):
            feed = pipeline.batches(
                self.dataset,
                batch_size=size,
                start=first,
                stop=stop,
                seed=self.config.seed,
                rows=local_rows(self.mesh, size),
            )
            for index, batch in feed:
                yield index, place(self.hooks.batch(index, batch), self.mesh)


def _schedule(config: Config) -> loop.Schedule:
    return loop.Schedule(
        steps=config.train.steps,
        log_every=config.train.log_every,
        eval_every=config.train.eval_every,
        save=SaveSchedule(
            steps=config.checkpoint.every.steps,
            minutes=config.checkpoint.every.minutes,
            max_unsaved_minutes=config.checkpoint.max_unsaved_minutes,
        ),
    )


def _policy(config: Config) -> Policy:
    nonfinite, spike = config.guards.nonfinite, config.guards.spike
    return Policy(
        max_consecutive=nonfinite.max_consecutive,
        max_rollbacks=nonfinite.max_rollbacks,
        spike_window=spike.window,
        spike_factor=spike.factor,
        spike_then=spike.then,
    )


def _meter(config: Config, models: setup.Models, method: setup.RunMethod, mesh: Mesh) -> Meter:
    length, tokens = config.data.seq_len, config.train.batch_size * config.data.seq_len
    student = 3 * forward_flops_per_token(models.student.config, length)
    teacher = 0.0
    if method.objective.needs_teacher:
        assert models.teacher is not None, "the configuration has a teacher where one is needed"
        teacher = forward_flops_per_token(models.teacher.config, length)
    total = student + teacher
    return Meter(tokens, tokens * total, teacher / total, list(mesh.devices.flat))
