"""One run, from a configuration to its table and report; begun, or gone on with."""

import contextlib
import logging
import os
import pathlib
import sys
import types
from collections.abc import Callable, Collection, Mapping, Sequence

from jax.sharding import Mesh

from jaxdistill import agree, compilation_cache, device_memory, errors, methods, processes
from jaxdistill import config as configs
from jaxdistill.callbacks import Broadcast, Callback
from jaxdistill.config import Config, preflight
from jaxdistill.errors import ConfigError
from jaxdistill.evaluate.held_out import HeldOut
from jaxdistill.run import (
    ahead,
    alike,
    anew,
    changes,
    hearing,
    identity,
    participants,
    run_table,
    schedule,
    setup,
    start,
    states,
    student_folder,
    teaching,
    terminal,
)
from jaxdistill.run.folder import RunDir
from jaxdistill.run.result import RunResult
from jaxdistill.run.start import Inputs
from jaxdistill.run.texts import RunData
from jaxdistill.run.training import Training
from jaxdistill.train import step_folders, stopping
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.hooks import NO_HOOKS, Hooks, WithVerifiers
from jaxdistill.train.stopping import Stop

log = logging.getLogger(__name__)


def distill(
    config: str | os.PathLike | Config,
    overrides: Sequence[str] = (),
    *,
    callbacks: Sequence[Callback] = (),
    hooks: Hooks = NO_HOOKS,
    verifiers: Mapping[str, Callable[..., float | None]] = types.MappingProxyType({}),
) -> RunResult:
    """Runs a configuration, given as a file or as an object; the rest as in `train`.

    Raises:
      UserError: whatever is wrong, before anything is trained or written where possible.
    """
    if isinstance(config, Config):
        if overrides:
            raise ConfigError("overrides belong to a configuration file: change the object")
        return train(config, callbacks=callbacks, hooks=hooks, verifiers=verifiers)
    text = configs.read(config)
    loaded = configs.loads(text, str(config), overrides)
    return train(
        loaded,
        input_text=text,
        overrides=overrides,
        callbacks=callbacks,
        hooks=hooks,
        verifiers=verifiers,
    )


def train(
    config: Config,
    *,
    input_text: str | None = None,
    overrides: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    hooks: Hooks = NO_HOOKS,
    verifiers: Mapping[str, Callable[..., float | None]] = types.MappingProxyType({}),
) -> RunResult:
    """Runs a configuration from the start.

    Args:
      config: what to do.
      input_text: the file it came from, kept in the run folder as it was.
      overrides: what changed it, kept beside.
      callbacks: hear what the run does, beside the trackers of `logging`.
      hooks: called at named points, given every batch and the loss, see `train.hooks`.
      verifiers: name -> function(prompt, answer, record) -> a reward, or None where it cannot say;
        the names stand in `reward.verifiers`, the record holds what stands beside the prompt.

    Raises:
      UserError: whatever is wrong, before anything is trained or written where possible.
    """
    resolved = configs.dump(config)
    hooks = WithVerifiers(hooks, verifiers) if verifiers else hooks
    # Everything that reading the small files can tell is told before the run folder exists.
    with config.written.told():
        mesh = _begin(config)
        agree.together(lambda: errors.check(preflight.check(config)))
        agree.together(lambda: hearing.check(config.logging, callbacks))
        inputs = start.read(config, mesh, hooks.verifiers)

    def create() -> None:
        RunDir.create(
            config.run.dir,
            name=config.run.name,
            input_text=resolved if input_text is None else input_text,
            resolved=resolved,
            overrides=overrides,
        )

    agree.by_leader(create)
    run = agree.together(lambda: RunDir.open(config.run.dir, hooks))
    return _execute(config, run, inputs, callbacks)


def _begin(config: Config) -> Mesh:
    """Joins the other processes of the run, if there are any, and lays out all devices."""
    compilation_cache.start(config.run.compilation_cache)
    processes.start(config.mesh.processes)
    alike.check(config.settings())
    return setup.mesh_of(config)


def resume(
    run_dir: str | os.PathLike,
    overrides: Sequence[str] = (),
    *,
    from_start: bool = False,
    callbacks: Sequence[Callback] = (),
    hooks: Hooks = NO_HOOKS,
    verifiers: Mapping[str, Callable[..., float | None]] = types.MappingProxyType({}),
) -> RunResult:
    """Resumes a run from its last checkpoint, or finishes what a finished run still lacks.

    Args:
      run_dir: the folder of the run.
      overrides: settings that change from here on, such as "train.steps=200": `changes.RULES` says
        which ones may; they are kept in the run folder.
      from_start: begin anew at step 0; what the run has is moved to `earlier/` in its folder.
      callbacks: as in `train`.
      hooks: as in `train`.
      verifiers: as in `train`.

    Raises:
      ConfigError: if there is no run, its data, models or tokenizer have changed, or an override
        would make it another run.
      DamagedError: if no checkpoint can be read, or none is there any more.
    """
    run = RunDir.open(run_dir, WithVerifiers(hooks, verifiers) if verifiers else hooks)
    file = run.path / "config.resolved.yaml"
    before, config = configs.load(file), configs.load(file, overrides)
    if before.run.dir != config.run.dir:
        raise ConfigError(
            f"run.dir = {config.run.dir!r}: the run stays where it is: leave it out, or move the "
            "folder and resume it there"
        )
    with config.written.told():
        mesh = _begin(config)
        agree.together(lambda: hearing.check(config.logging, callbacks))
        inputs = start.read(config, mesh, run.hooks.verifiers)
    return _execute(config, run, inputs, callbacks, from_start)


def _execute(
    config: Config,
    run: RunDir,
    inputs: Inputs,
    callbacks: Sequence[Callback],
    from_start: bool = False,
) -> RunResult:
    with processes.lost_ones_told(), contextlib.ExitStack() as stack:
        agree.by_leader(lambda: stack.enter_context(run.held()) or _prepare(run, from_start))
        agree.together(run.reread)
        stop = stack.enter_context(stopping.listening())
        told = agree.together(lambda: hearing.broadcast(config.logging, run, callbacks))
        with _checkpoints(config, run, "student", told) as checkpoints:
            latest = checkpoints.latest() or 0
            if latest > config.train.steps:
                raise ConfigError(
                    f"train.steps = {config.train.steps}: the run has come to step {latest}: to go "
                    f"back, `jaxdistill ckpt rollback {run.path} STEP`"
                )
            with run.attempt(latest), device_memory.told():
                session = _Session(config, run, inputs, stop, latest, told)
                result = session.execute(checkpoints)
        # After the attempt, which the page tells about; the others wait, to end with the first.
        agree.by_leader(lambda: terminal.write_page(run.path))
        return result


def _prepare(run: RunDir, from_start: bool) -> None:
    """Looks at what is there, once nobody else can change it."""
    run.reread()
    if from_start:
        place = anew.begin(run)
        print(f"begins anew at step 0; what was there is kept in {place}", file=sys.stderr)
    anew.check(run)


def _checkpoints(config: Config, run: RunDir, part: str, told: Broadcast) -> Checkpoints:
    c = config.checkpoint
    folder = run.path / anew.PARTS[part] / "checkpoints"

    def committed(step: int) -> None:
        run.note_saved(part, step)
        told.saved(step, folder / str(step))

    return Checkpoints(
        folder,
        keep_latest=c.keep.latest,
        keep_best=c.keep.best,
        best_metric=c.best_metric,
        mode=c.mode,
        hooks=run.hooks,
        committed=committed,
    )


class _Session:
    """One process's work on a run: what is loaded once and used by training and table alike."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        inputs: Inputs,
        stop: Stop,
        step: int,
        told: Broadcast,
    ):
        self.config, self.run, self.mesh, self.stop = config, run, inputs.mesh, stop
        self.step, self.told = step, told
        mesh, data = inputs.mesh, inputs.data
        agree.by_leader(lambda: _keep_quarantined(run, inputs.texts))
        self.models = agree.together(lambda: participants.load_models(config, inputs.models, mesh))
        described = identity.describe(self.models, mesh)
        facts = identity.fingerprints(config.settings(), self.models, inputs.texts)
        facts |= changes.world(mesh, described["versions"])
        agree.same(facts)
        resolved = configs.dump(config)

        def accept(changed: Collection[str]) -> None:
            schedule.check(run, config.train.steps, changed, step)
            run_table.drop(run, run_table.stale(changed))
            run.configure(resolved)

        changed = agree.by_leader(lambda: changes.check(run, facts, accept))
        agree.by_leader(
            lambda: schedule.tell(run, config.optimizer, config.train.steps, changed, step)
        )
        run.update(total_steps=config.train.steps, method=config.method.name, **described)
        agree.by_leader(
            lambda: student_folder.keep(run, self.models, states.adapters_of(config.student))
        )
        self.method = setup.method_of(config, self.models)
        self.plain, self.taught = data.get("train"), inputs.taught.get("train")
        self.prompts, self.questions = inputs.prompts, inputs.questions
        held_out = HeldOut(
            inputs.taught["eval"],
            config.eval.batch_size,
            config.eval.max_rows,
            mesh,
            ", ".join(source.path for source in config.data.eval_files) or "held-out share",
            ahead.placing(self.models.teaching, mesh),
        )
        self.table = run_table.RunTable(
            run,
            self.models,
            self.method,
            held_out,
            student=config.student,
            speaks=config.eval,
            seed=config.seed,
        )

    def execute(self, checkpoints: Checkpoints) -> RunResult:
        """Trains what is not trained yet, measures what is not measured yet, reports."""
        if (metrics := self._finished(checkpoints)) is not None:
            return RunResult(self.run.path, metrics, self.table.rows)
        name, settings = self.config.run.name, self.config.settings()
        with hearing.attempt(self.told, name, settings, self.run, self.step):
            metrics = self._work(checkpoints)
            self.told.measured(self.table.rows)
        if agree.leads():
            terminal.show(self.table.rows)
        return RunResult(self.run.path, metrics, self.table.rows)

    def _work(self, checkpoints: Checkpoints) -> Mapping[str, float]:
        """Trains and measures; returns the metrics of the last evaluation."""
        table, student = self.table, self.models.student
        if checkpoints.latest() is None or not table.has("student before"):
            log.info("measuring teacher and student on the held-out data")
            table.add_teacher()
            table.add_student("student before", student.params)
        training = self._training(self.run.path, self.config, self.method, checkpoints, main=True)
        state, metrics = training.train(student)
        table.add_student("student after", table.student_params(state), metrics)
        if self.config.eval.compare and not table.has("SFT control"):
            del state  # the control takes its place in memory
            self._control()
        agree.by_leader(self._drop_control)
        return metrics

    def _finished(self, checkpoints: Checkpoints) -> Mapping[str, float] | None:
        """The last metrics of a run of which nothing is left to do, said so; else None."""
        needed = {"student before", "student after"}
        needed |= {"teacher"} if self.table.tells_teacher else set()
        needed |= {"SFT control"} if self.config.eval.compare else set()
        done = self.run.record["status"] == "done" and all(map(self.table.has, needed))
        if not done or (checkpoints.latest() or 0) < self.config.train.steps:
            return None
        metrics = agree.by_leader(lambda: run_table.last_evaluation(self.run.path))
        if metrics and agree.leads():
            print(
                f"{self.run.path}: is finished, all {self.config.train.steps} steps: nothing was "
                f"trained or measured again; `jaxdistill resume {self.run.path} train.steps=N` "
                "goes on to step N",
                file=sys.stderr,
            )
            terminal.show(self.table.rows)
        return metrics

    def _control(self) -> None:
        """The same student, data, steps and optimizer on cross-entropy alone, kept in control/."""
        config = self.config.model_copy(
            update={
                "method": methods.control(self.config.method),
                "rollout": None,  # it learns from given answers
                "reward": None,
                "train": self.config.train.model_copy(update={"eval_every": None}),
            }
        )
        folder = self.run.path / anew.PARTS["control"]
        folder.mkdir(exist_ok=True)
        fresh = participants.student_of(config, self.models.student, self.models.teacher, self.mesh)
        method = setup.method_of(config, self.models)
        with _checkpoints(config, self.run, "control", self.told) as checkpoints:
            training = self._training(folder, config, method, checkpoints, main=False)
            state, metrics = training.train(fresh)
        self.table.add_student("SFT control", self.table.student_params(state), metrics)

    def _drop_control(self) -> None:
        """The control is measured, and half of what a run leaves on the disk is its checkpoints."""
        folder = self.run.path / anew.PARTS["control"] / "checkpoints"
        if "control" in self.run.record.get("saved", {}) or folder.is_dir():
            self.run.forget_saved("control")
        if folder.is_dir():
            step_folders.drop(folder)

    def _training(
        self,
        folder: pathlib.Path,
        config: Config,
        method: setup.RunMethod,
        checkpoints: Checkpoints,
        *,
        main: bool,
    ) -> Training:
        return Training(
            run=self.run,
            folder=folder,
            config=config,
            method=method,
            models=self.models,
            mesh=self.mesh,
            dataset=self.taught if teaching.stored(method.asked) else self.plain,
            prompts=self.prompts,
            questions=self.questions,
            hooks=self.run.hooks,
            callbacks=self.told,
            table=self.table,
            checkpoints=checkpoints,
            stop=self.stop,
            main=main,
        )


def _keep_quarantined(run: RunDir, read: Mapping[str, RunData]) -> None:
    """Lists the records that were left out beside the run."""
    for name, one in read.items():
        one.write_left_out(run.path / "quarantine" / f"{name}.jsonl")
