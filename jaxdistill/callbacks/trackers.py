"""The trackers that a configuration may name, each through its own client."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdistill.callbacks.base import Callback, Ending, Start
from jaxdistill.callbacks.broadcast import CONTROL
from jaxdistill.config import syntax
from jaxdistill.config.trackers import MlflowTracker, Trackers, TrackioTracker, WandbTracker
from jaxdistill.safe.redact import redact


def build_trackers(options: Trackers, notice: Callable[[str], Any]) -> dict[str, Callback]:
    """The callbacks of the trackers that a configuration names; their clients are imported here.

    Args:
      options: of installed trackers.
      notice: called with the one sentence on a client that is broken, and left out.
    """
    built = {}
    for name, section in options.named().items():
        try:
            built[name] = BUILDERS[name](section)
        except (Exception, SystemExit) as error:  # what a stranger's code raises ends no training
            notice(
                f"callback {name} cannot be made: {type(error).__name__}: "
                f"{redact(str(error))[:500]}; the run continues without it"
            )
    return built


class Wandb(Callback):
    """Weights & Biases: one W&B run for a run, continued when it resumes (not offline).

    Neither the terminal, the command line, the git state nor the code is sent.
    """

    def __init__(self, options: WandbTracker):
        import wandb

        self._client, self._options = wandb, options
        self._run: Any = None

    def start(self, run: Start) -> None:
        settings = self._client.Settings(
            console="off", disable_git=True, disable_code=True, disable_job_creation=True,
            x_disable_meta=True, silent=True,
        )  # fmt: skip
        self._run = self._client.init(
            project=self._options.project,
            entity=self._options.entity,
            name=self._options.name or run.name,
            tags=list(self._options.tags),
            id=run.run_id,
            resume="allow",
            mode=self._options.mode,
            config=dict(run.config),
            allow_val_change=True,
            dir=os.fspath(run.run_dir),
            settings=settings,
        )
        # Steps are an axis of their own: a rollback goes back, which the client's own step cannot.
        for prefix in ("", CONTROL):
            self._run.define_metric(f"{prefix}step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric(f"{CONTROL}*", step_metric=f"{CONTROL}step")

    def record(self, step: int, values: Mapping[str, float]) -> None:
        prefix = CONTROL if any(name.startswith(CONTROL) for name in values) else ""
        self._run.log({f"{prefix}step": step, **values})

    evaluation = record

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        self._run.log({"step": step, "samples": self._table(rows)})

    def end(self, ending: Ending) -> None:
        if ending.table:
            self._run.log({"table": self._table(ending.table)})
        self._run.finish(exit_code=0 if ending.status == "done" else 1)

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        data = [[row.get(name) for name in columns] for row in rows]
        return self._client.Table(columns=columns, data=data, allow_mixed_types=True)


class Mlflow(Callback):
    """MLflow: one MLflow run for a run, whose id is kept in RUN.json for when it resumes."""

    def __init__(self, options: MlflowTracker):
        from mlflow import MlflowClient, entities

        self._entities, self._options = entities, options
        self._client = MlflowClient(tracking_uri=options.uri)
        self._id = ""

    def start(self, run: Start) -> Mapping[str, Any]:
        if "run_id" in run.kept:
            self._id = run.kept["run_id"]
            self._client.update_run(self._id, status="RUNNING")
            return run.kept
        known = self._client.get_experiment_by_name(self._options.experiment)
        experiment = (
            self._client.create_experiment(self._options.experiment)
            if known is None
            else known.experiment_id
        )
        name = self._options.name or run.name
        tags = {"jaxdistill.run_id": run.run_id, **dict.fromkeys(self._options.tags, "")}
        self._id = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
        # A parameter's value may have 6,000 characters.
        leaves = syntax.dotted(run.config)
        params = [self._entities.Param(name, str(value)[:6000]) for name, value in leaves]
        for first in range(0, len(params), 100):
            self._client.log_batch(self._id, params=params[first : first + 100])
        return {"run_id": self._id}

    def record(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    evaluation = record

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        self._client.log_text(self._id, _json(rows), f"samples/step_{step:06d}.json")

    def end(self, ending: Ending) -> None:
        if ending.table:
            self._client.log_text(self._id, _json(ending.table), "table.json")
        status = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ending.status]
        self._client.set_terminated(self._id, status)


class Trackio(Callback):
    """trackio: one trackio run for a run, on this machine or in a Space."""

    def __init__(self, options: TrackioTracker):
        import trackio

        self._client, self._options = trackio, options
        self._run: Any = None

    def start(self, run: Start) -> None:
        # By its id: two runs of one name stay two.
        name = f"{self._options.name or run.name}-{run.run_id[:8]}"
        self._run = self._client.init(
            project=self._options.project,
            name=name,
            space_id=self._options.space,
            config=dict(syntax.dotted(run.config)),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def record(self, step: int, values: Mapping[str, float]) -> None:
        # Its store is JSON, which has no number that is not finite.
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._run.log(finite, step=step)

    evaluation = record

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        self._run.log({"samples": self._table(rows)}, step=step)

    def end(self, ending: Ending) -> None:
        if ending.table:
            self._run.log({"table": self._table(ending.table)})
        self._run.finish()

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        data = [[row.get(name) for name in columns] for row in rows]
        return self._client.Table(columns=columns, data=data)


BUILDERS: Mapping[str, Callable[[Any], Callback]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def _json(rows: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps([dict(row) for row in rows], indent=2, ensure_ascii=False)
