"""One run, from a configuration to its table and report; begun, or gone on with."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from jaxdistill import agree, compilation_cache, methods, processes, report
from jaxdistill import config as configs
from jaxdistill.config import Config, preflight
from jaxdistill.data import pipeline
from jaxdistill.data.dataset import Dataset
from jaxdistill.errors import ConfigError, StorageError, UserError
from jaxdistill.evaluate.held_out import HeldOut
from jaxdistill.formats.config_json import write_config
from jaxdistill.models import count_parameters, lora
from jaxdistill.references import STUDENT
from jaxdistill.run import alike, changes, run_table, setup, states
from jaxdistill.run.folder import RunDir, describe_machine, fingerprint
from jaxdistill.run.training import Training
from jaxdistill.train import stopping
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.hooks import NO_HOOKS, Hooks
from jaxdistill.train.stopping import Stop

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
      run_dir: its folder.
      metrics: of the last evaluation.
      table: rows of the comparison, as in table.json.
    """

    run_dir: pathlib.Path
    metrics: Mapping[str, float]
    table: Sequence[Mapping[str, Any]]


def distill(
    config: str | os.PathLike | Config, overrides: Sequence[str] = (), *, hooks: Hooks = NO_HOOKS
) -> RunResult:
    """Runs a configuration, given as a file or as an object; `hooks` as in `train`.

    Raises:
      UserError: whatever is wrong, before anything is trained or written where possible.
    """
    if isinstance(config, Config):
        if overrides:
            raise ConfigError("overrides belong to a configuration file: change the object")
        return train(config, hooks=hooks)
    text = configs.read(config)
    loaded = configs.loads(text, str(config), overrides)
    return train(loaded, input_text=text, overrides=overrides, hooks=hooks)


def train(
    config: Config,
    *,
    input_text: str | None = None,
    overrides: Sequence[str] = (),
    hooks: Hooks = NO_HOOKS,
) -> RunResult:
    """Runs a configuration from the start.

    Args:
      config: what to do.
      input_text: the file it came from, kept in the run folder as it was.
      overrides: what changed it, kept beside.
      hooks: called at named points, given every batch and the loss, see `train.hooks`.

    Raises:
      UserError: whatever is wrong, before anything is trained or written where possible.
    """
    mesh = _begin(config)
    agree.together(lambda: _check(config))
    resolved = configs.dump(config)
    # Everything that reading the small files can tell is told before the run folder exists.
    inputs = _read(config, mesh)

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
    return _execute(config, run, inputs)


def _begin(config: Config) -> Mesh:
    """Joins the other processes of the run, if there are any, and lays out all devices."""
    compilation_cache.start(config.run.compilation_cache)
    processes.start(config.mesh.processes)
    alike.check(config)
    return setup.mesh_of(config)


def _check(config: Config) -> None:
    errors = preflight.check(config)
    if errors:
        raise preflight.combine(errors)


def resume(run_dir: str | os.PathLike, *, hooks: Hooks = NO_HOOKS) -> RunResult:
    """Resumes a run from its last checkpoint, or finishes what a finished run still lacks.

    Args:
      run_dir: the folder of the run.
      hooks: as in `train`.

    Raises:
      ConfigError: if there is no run, or its data, models or tokenizer have changed.
      DamagedError: if no checkpoint can be read.
    """
    run = RunDir.open(run_dir, hooks)
    config = configs.load(run.path / "config.resolved.yaml")
    return _execute(config, run, _read(config, _begin(config)))


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What a start reads, once, before anything is written.

    Attributes:
      mesh: of all devices.
      models: shapes and tokenizer, without weights.
      data: the training and the held-out rows.
      taught: the same with what a stored teacher said of them, where there is one.
    """

    mesh: Mesh
    models: setup.Models
    data: Mapping[str, Dataset]
    taught: Mapping[str, Dataset]


def _read(config: Config, mesh: Mesh) -> _Inputs:
    """Reads small files and data, and checks all that they can tell."""
    models = agree.together(lambda: setup.shapes_of(config, mesh))
    data = agree.leader_first(lambda: setup.data_of(config, models.tokenizer))
    stored, taught = models.stored, data
    if stored is not None:
        taught = agree.together(lambda: stored.beside(data, models.tokenizer))
    return _Inputs(mesh, models, data, taught)


def _execute(config: Config, run: RunDir, inputs: _Inputs) -> RunResult:
    with processes.lost_ones_told(), contextlib.ExitStack() as stack:
        agree.by_leader(lambda: stack.enter_context(run.held()))
        stop = stack.enter_context(stopping.listening())
        with _checkpoints(config, run.path, run.hooks) as checkpoints:
            with run.attempt(checkpoints.latest() or 0):
                result = _Session(config, run, inputs, stop).execute(checkpoints)
        # After the attempt, which the page tells about; the others wait, to end with the first.
        agree.by_leader(lambda: _report(run.path))
        return result


def _checkpoints(config: Config, folder: pathlib.Path, hooks: Hooks) -> Checkpoints:
    c = config.checkpoint
    return Checkpoints(
        folder / "checkpoints",
        keep_latest=c.keep.latest,
        keep_best=c.keep.best,
        best_metric=c.best_metric,
        mode=c.mode,
        hooks=hooks,
    )


class _Session:
    """One process's work on a run: what is loaded once and used by training and table alike."""

    def __init__(self, config: Config, run: RunDir, inputs: _Inputs, stop: Stop):
        self.config, self.run, self.mesh, self.stop = config, run, inputs.mesh, stop
        mesh, data = inputs.mesh, inputs.data
        agree.by_leader(lambda: _keep_quarantined(run, data))
        self.models = agree.together(lambda: setup.load_models(config, inputs.models, mesh))
        described = _describe(config, self.models, mesh)
        facts = _fingerprints(config, self.models, data)
        facts |= changes.world(mesh, described["versions"])
        agree.same(facts)
        agree.by_leader(lambda: changes.check(run, facts))
        run.update(**described)
        agree.by_leader(lambda: _keep_words(config, run, self.models))
        self.method = setup.method_of(config, self.models)
        self.plain, self.taught = data["train"], inputs.taught["train"]
        held_out = HeldOut(
            inputs.taught["eval"],
            config.eval.batch_size,
            config.eval.max_rows,
            mesh,
            ", ".join(source.path for source in config.data.eval),
        )
        self.table = run_table.RunTable(config, run, self.models, self.method, held_out)

    def execute(self, checkpoints: Checkpoints) -> RunResult:
        """Trains what is not trained yet, measures what is not measured yet, reports."""
        table, student = self.table, self.models.student
        if checkpoints.latest() is None:
            log.info("measuring teacher and student on the held-out data")
            table.add_teacher()
            table.add_student("student before", student.params)
        training = self._training(self.run.path, self.config, self.method, checkpoints, main=True)
        state, metrics = training.train(student)
        table.add_student("student after", table.student_params(state), metrics)
        if self.config.eval.compare and not table.has("SFT control"):
            del state  # the control takes its place in memory
            self._control()
        if agree.leads():
            _show(table.rows)
        return RunResult(self.run.path, metrics, table.rows)

    def _control(self) -> None:
        """The same student, data, steps and optimizer on cross-entropy alone, kept in control/."""
        config = self.config.model_copy(
            update={
                "method": methods.control(self.config.method),
                "train": self.config.train.model_copy(update={"eval_every": None}),
            }
        )
        folder = self.run.path / "control"
        folder.mkdir(exist_ok=True)
        fresh = setup.student_of(config, self.models.student, self.models.teacher, self.mesh)
        method = setup.method_of(config, self.models)
        with _checkpoints(config, folder, self.run.hooks) as checkpoints:
            training = self._training(folder, config, method, checkpoints, main=False)
            state, metrics = training.train(fresh)
        self.table.add_student("SFT control", self.table.student_params(state), metrics)

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
            dataset=self.plain if method.stored is None else self.taught,
            hooks=self.run.hooks,
            table=self.table,
            checkpoints=checkpoints,
            stop=self.stop,
            main=main,
        )


def _keep_quarantined(run: RunDir, data: Mapping[str, Dataset]) -> None:
    """Lists the records that were left out beside the run."""
    for name, dataset in data.items():
        pipeline.write_quarantine(dataset, run.path / "quarantine" / f"{name}.jsonl")


def _report(folder: pathlib.Path) -> None:
    """The page, where the packages for it are there."""
    try:
        page = report.build([folder], folder / "report.html")
    except UserError as error:
        print(f"no report.html: {error}", file=sys.stderr)
    else:
        print(f"report: {page}")


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table and what it says, for people."""
    print(report.comparison_table(rows))
    print(report.recovered(rows))


def _fingerprints(
    config: Config, models: setup.Models, data: Mapping[str, Dataset]
) -> dict[str, str]:
    """What a run is made of: `changes.RULES` says which of it must stay the same."""
    prints = {f"data.{name}": dataset.fingerprint for name, dataset in data.items()}
    prints["tokenizer"] = fingerprint(models.tokenizer.get_vocab())
    for name, model in (("teacher", models.teacher), ("student", models.student)):
        if model is not None:
            prints[f"{name}.shape"] = fingerprint(dataclasses.asdict(model.config))
    # Random weights are made anew from the seed, and on another mesh rounded otherwise.
    if models.teacher is not None and config.teacher is not None and not config.teacher.random:
        prints["teacher.weights"] = changes.weights(models.teacher.params)
    if models.stored is not None and models.stored.store is not None:
        prints["teacher.cache"] = fingerprint(dict(models.stored.store.identity))
    prints["config"] = fingerprint(configs.dump(config))
    if config.student.prune:
        file = pathlib.Path(config.student.prune.importance)
        prints["student.prune.importance"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return prints


def _describe(config: Config, models: setup.Models, mesh: Mesh) -> dict[str, Any]:
    """What RUN.json says of the run's parts."""
    parts: dict[str, Any] = {"total_steps": config.train.steps, "method": config.method.name}
    for name, model in (("teacher", models.teacher), ("student", models.student)):
        if model is not None:
            count = count_parameters(model.config)
            parts[name] = {"source": model.source, "parameters": count}
    if models.stored is not None:
        arch = models.stored.config
        known = {} if arch is None else {"parameters": count_parameters(arch)}
        parts["teacher"] = {"source": models.stored.place, **known}
    return parts | describe_machine(list(mesh.devices.flat), mesh.shape)


def _keep_words(config: Config, run: RunDir, models: setup.Models) -> None:
    """The student's small files, so that checkpoints can be read on their own."""
    folder = run.path / STUDENT
    described = write_config(models.student.config, "float32")
    try:
        folder.mkdir(exist_ok=True)
        run.write_json(f"{STUDENT}/config.json", described)
        adapters = states.adapters_of(config)
        if adapters is not None:
            described = lora.described(adapters, models.student.source)
            run.write_json(f"{STUDENT}/{lora.FILE}", described)
        models.tokenizer.save_pretrained(str(folder))
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error}") from error
