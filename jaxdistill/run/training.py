"""One training within a run, of its student or of the control: from the last checkpoint on."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from jaxdistill import agree, report
from jaxdistill import config as configs
from jaxdistill.callbacks import CONTROL, Broadcast
from jaxdistill.config import Config, routing
from jaxdistill.config import ahead as options
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.feed import Feed
from jaxdistill.data.prompts import Prompts
from jaxdistill.errors import ConfigError
from jaxdistill.models import Model, forward_flops_per_token
from jaxdistill.report import json_lines
from jaxdistill.run import (
    ahead,
    anew,
    feeds,
    participants,
    run_table,
    setup,
    stages,
    states,
)
from jaxdistill.run.folder import RunDir
from jaxdistill.train import loop
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.guard import Guard, GuardPolicy
from jaxdistill.train.hooks import Hooks
from jaxdistill.train.meter import Meter
from jaxdistill.train.saving import SaveSchedule
from jaxdistill.train.state import TrainState
from jaxdistill.train.step import PerShape, abstract_batch, compiled, recorded
from jaxdistill.train.stopping import Stop
from jaxdistill.types import Batch, Span

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
      dataset: the rows to learn from; None where the student writes all its text.
      prompts: what the student answers; None where it learns from the data set alone.
      questions: held-out ones, of which its rewards are measured; or None.
      hooks: what the caller handed in.
      callbacks: hear every number; the control's names begin with `callbacks.CONTROL`.
      table: measures the student, and lets it speak.
      checkpoints: where its states go.
      stop: whether the process was asked to stop.
      main: whether it is the student's: that one's samples and last step are kept with the run.
    """

    run: RunDir
    folder: pathlib.Path
    config: Config
    method: setup.RunMethod
    models: participants.Models
    mesh: Mesh
    dataset: Dataset | None
    prompts: Prompts | None
    questions: Prompts | None
    hooks: Hooks
    callbacks: Broadcast
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
        guard = Guard(self.folder, _policy(self.config), self._rows_per_batch)
        feed = self._feed(guard)
        guard.begin(meta)
        feed.begin(meta)
        latest: dict[str, float] = {}
        self.run.update(status="running")
        with contextlib.ExitStack() as stack:
            progress = report.ProgressLine(
                self.config.train.steps,
                mode=self.config.logging.progress if agree.leads() else "none",
                log_every=self.config.train.log_every,
            )
            stack.enter_context(progress)
            writer = agree.together(lambda: self._writer(first, progress))
            stack.enter_context(writer)
            parts = self._parts(state, feed, guard, writer, progress, latest)
            with self.stop.deferred():
                state = loop.train(state, meta.get(loop.ROW, 0), parts, _schedule(self.config))
            if self.main:
                self.run.update(step=self.config.train.steps)
        return state, latest

    def _state(self, student: Model) -> tuple[TrainState, Mapping[str, Any]]:
        """The state of the latest sound checkpoint with its meta, or that before the first step."""
        objective, tx = self.method.objective, self.method.tx
        part = "student" if self.main else "control"
        agree.by_leader(lambda: anew.check_part(self.run, part))
        if self.checkpoints.latest() is None:
            return states.create(self.config, student, objective, tx, self.mesh), {}
        shape = states.abstract(self.config, student.config, objective, tx, self.mesh)

        def damaged(step: int, reason: str) -> None:
            if agree.leads():
                log.warning("%s: it is put aside, and the one before is used", reason)
            self.run.event("damaged", step=step, reason=reason)

        _, state, meta = self.checkpoints.restore_latest(shape, damaged)
        if loop.ROW not in meta:  # of a version that counted batches
            meta[loop.ROW] = meta["data_step"] * self._rows_per_batch()
        return state, meta

    def _rows_per_batch(self) -> int:
        """The batch size of a run whose files, of an earlier version, count batches.

        Raises:
          ConfigError: if it has been changed since the run began, so that nobody knows when.
        """
        now = self.config.train.batch_size
        text, overrides = (
            (self.run.path / name).read_text(encoding="utf-8")
            for name in ("config.input.yaml", "overrides.txt")
        )
        original = configs.loads(text, "config.input.yaml", overrides.splitlines()).train.batch_size
        if original != now:
            raise ConfigError(
                f"train.batch_size = {now}: the run began with {original}, under a version that "
                "counted batches and not rows, so which rows it has seen is not known: set "
                f"{original} in config.resolved.yaml and resume; once there is a new checkpoint, "
                "stop, change it and resume again"
            )
        return now

    def _writer(self, first: int, progress: report.ProgressLine) -> report.MetricsWriter:
        """What keeps the numbers, in one process of the run."""
        if not agree.leads():
            return report.SilentWriter()
        resume_step = first if (self.folder / "metrics.jsonl").exists() else None
        # What is lost is told where no progress is shown, too.
        notice = log.warning if self.config.logging.progress == "none" else progress.event
        board = self.config.logging.tensorboard
        listener = self.callbacks.listener("" if self.main else CONTROL)
        writer = report.MetricsWriter(
            self.folder,
            board,
            resume_step,
            notice=notice,
            hooks=self.hooks,
            listener=listener,
        )
        last = _last_recorded(self.folder)
        if first - last >= self.config.train.log_every:
            notice(f"metrics.jsonl: there are no records of the steps {last + 1} to {first}")
            writer.event("records_missing", after=last, until=first)
        return writer

    def _parts(
        self,
        state: TrainState,
        feed: Feed,
        guard: Guard,
        writer: report.MetricsWriter,
        progress: report.ProgressLine,
        latest: dict[str, float],
    ) -> loop.Parts:
        """What the loop works with; the metrics of every evaluation go to `latest`."""
        meter = _meter(self.config, self.models, self.method, self.mesh)

        def evaluate(number: int, state: TrainState) -> dict[str, float]:
            latest.update({**self.table.evaluate(state), **feed.measure(state)})
            if self.main:
                self.table.write_samples(number, state, writer, feed.shown())
            return dict(latest)

        def restore() -> tuple[TrainState, Mapping[str, Any]]:
            models = self.models  # the first state took the student's arrays over
            student = participants.student_of(
                self.config, models.student, models.teacher, self.mesh
            )
            return self._state(student)

        return loop.Parts(
            step=self._step(state, meter, feed, writer, progress),
            feed=feed,
            place=self._placing(),
            evaluate=evaluate,
            learning_rate=self.method.learning_rate,
            meta={"seed": self.config.seed},
            restore=restore,
            guard=guard,
            checkpoints=self.checkpoints,
            writer=writer,
            progress=progress,
            meter=meter,
            stop=self.stop,
            hooks=self.hooks,
        )

    def _step(
        self,
        state: TrainState,
        meter: Meter,
        feed: Feed,
        writer: report.MetricsWriter,
        progress: report.ProgressLine,
    ) -> stages.Staged:
        """The steps, compiled for the batches of the data; for others when they come."""
        config = self.config
        agree.together(lambda: setup.check_kernels_of(config))
        parts = stages.of(config.teacher, config.student, config.method, config.train.steps)
        in_stage = functools.partial(setup.in_stage, config, self.models, self.method)
        programs = {
            stage.program: self._programs(
                in_stage(stage) if len(parts) > 1 else self.method, writer, progress
            )
            for stage in {stage.program: stage for stage in parts}.values()
        }

        def tell(number: int, stage: stages.Stage, before: stages.Stage) -> None:
            facts, words = stage.told(before)
            writer.event("stage", step=number, **facts)
            progress.event(f"from step {number} on {', and '.join(words)}")

        step = stages.Staged(parts, programs, self.method.asked.params, tell, meter.asked)
        if (row := feed.usual()) is not None:
            if isinstance(asked := self.method.asked, ahead.Ahead):
                row = asked.padded(row)
            step.prepare(state, abstract_batch(row, routing.rows(config), self.mesh))
        return step

    def _programs(
        self, method: setup.RunMethod, writer: report.MetricsWriter, progress: report.ProgressLine
    ) -> PerShape:
        """The step of a method for batches of any shape, and what is told when it is compiled."""
        monitor = recorded(self.config.train.log_every, self.config.train.steps)
        method = dataclasses.replace(method, loss=self.hooks.loss(method.loss))
        pure = setup.make_step(self.config, method, monitor)

        def compile(state: TrainState, teacher_params: Any, batch: Batch) -> Any:
            began = time.perf_counter()
            # Together: in its next step nobody waits long for one that is still compiling.
            program = agree.together(
                lambda: compiled(pure, state, teacher_params, batch, self.mesh)
            )
            seconds = time.perf_counter() - began
            rows, programs = batch.tokens.shape[0], step.compiled + 1
            told = {"from_step": int(state.step), "rows": rows, "programs": programs}
            writer.event("compiled", seconds=round(seconds, 3), **told)
            more = "" if programs == 1 else f": {programs} programs, this one for {rows} rows"
            progress.event(f"compiled in {seconds:.1f} s{more}")
            return program

        step = PerShape(compile)
        return step

    def _feed(self, guard: Guard) -> Feed:
        """What it learns from, without the rows that the guard leaves out."""
        return feeds.feed_of(
            self.config,
            self.models,
            self.mesh,
            asked=self.method.asked,
            dataset=self.dataset,
            prompts=self.prompts,
            questions=self.questions,
            folder=self.folder,
            params_of=self.table.student_params,
            left_out=lambda: guard.left_out,
            stop=lambda: self.stop.asked is not None,
            hooks=self.hooks,
        )

    def _placing(self) -> Callable[[Span, Batch], Batch]:
        """(its rows, a batch) -> the batch on the mesh, as the hooks want it."""
        train = self.config.train
        placed = ahead.placing(self.method.asked, self.mesh, options.passes(train))
        number = lambda span: span.first_row // train.batch_size
        return lambda span, batch: placed(self.hooks.batch(number(span), batch))


def _last_recorded(folder: pathlib.Path) -> int:
    """The step of the last record in metrics.jsonl; 0 without one."""
    records, _ = json_lines.scan(folder / "metrics.jsonl")
    steps = (record.get("step") for record in records)
    return max((step for step in steps if isinstance(step, int)), default=0)


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


def _policy(config: Config) -> GuardPolicy:
    nonfinite, spike = config.guards.nonfinite, config.guards.spike
    return GuardPolicy(
        max_consecutive=nonfinite.max_consecutive,
        max_rollbacks=nonfinite.max_rollbacks,
        spike_window=spike.window,
        spike_factor=spike.factor,
        spike_then=spike.then,
    )


def _meter(
    config: Config, models: participants.Models, method: setup.RunMethod, mesh: Mesh
) -> Meter:
    length = config.data.seq_len
    student = 3 * forward_flops_per_token(models.student.config, length)
    teacher = method.asked.flops_per_token(length, models.read_length(length))
    total = student + teacher
    devices = ahead.devices(method.asked, mesh)
    return Meter(length, length * total, teacher / total, devices)
