"""The trackers through their own clients, offline, read back by what each client stores."""

import importlib.util
import math
import os
import pathlib
import time

import pytest

from jaxdistill import config as configs
from jaxdistill.callbacks import CONTROL, Broadcast, Callback, Start
from jaxdistill.callbacks import trackers as clients
from jaxdistill.config import trackers as options
from jaxdistill.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUN_ID = "0123456789abcdef0123456789abcdef"
SAMPLES = [{"prompt": "one", "student": "two"}]
TABLE = [{"name": "teacher", "perplexity": 2.0, "kl_t1": None}]


def needs(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(options.PACKAGES[name]) is None,
        reason=f"needs the extra {name}",
    )


def play(section, folder: pathlib.Path, step: int, kept: dict, status: str = "done") -> dict:
    """An attempt as a run makes it, of two records of the student and one of the control."""
    failures = []
    callbacks = clients.build_trackers(options.Trackers(**section), failures.append)
    told = Broadcast(callbacks, failures.append)
    start = lambda own: Start(
        folder, "tiny", RUN_ID, {"train": {"steps": 3}, "api": "[redacted]"}, step, own
    )
    error = {"done": None, "stopped": KeyboardInterrupt(), "failed": ValueError("x")}[status]
    try:
        with told.attempt(start, kept):
            told.listener().record(step + 1, {"loss/total": 2.5, "perf/x": math.nan})
            told.listener().record(step + 1, {"eval/perplexity": 12.0})
            told.listener().samples(step + 1, SAMPLES)
            told.listener(CONTROL).record(step + 1, {"loss/total": 3.5})
            told.measured(TABLE)
            if error is not None:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    assert failures == []
    return kept


@needs("mlflow")
def test_mlflow_keeps_everything_and_continues_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    uri = (tmp_path / "mlruns").as_uri()
    section = {"mlflow": {"experiment": "distil", "uri": uri, "tags": ("night",)}}
    kept = play(section, tmp_path, 0, {}, "stopped")
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(kept["mlflow"]["run_id"])
    assert run.info.status == "KILLED" and run.info.run_name == "tiny"
    assert run.data.params == {"train.steps": "3", "api": "[redacted]"}
    assert run.data.tags["jaxdistill.run_id"] == RUN_ID and "night" in run.data.tags
    play(section, tmp_path, 1, kept)
    run = client.get_run(kept["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss/total")
    assert [(one.step, one.value) for one in history] == [(1, 2.5), (2, 2.5)]
    assert run.data.metrics["eval/perplexity"] == 12.0
    assert run.data.metrics["control/loss/total"] == 3.5
    [experiment] = [e for e in client.search_experiments() if e.name == "distil"]
    assert len(client.search_runs([experiment.experiment_id])) == 1


@needs("trackio")
def test_trackio_keeps_everything_and_continues_the_run(tmp_path, monkeypatch):
    import trackio

    section = {"trackio": {"project": f"distil-{os.getpid()}"}}
    play(section, tmp_path, 0, {})
    play(section, tmp_path, 1, {})
    [run] = trackio.Api().runs(section["trackio"]["project"])
    assert run.name == f"tiny-{RUN_ID[:8]}"
    found = trackio.SQLiteStorage.get_logs(section["trackio"]["project"], run.name)
    totals = [(log["step"], log["loss/total"]) for log in found if "loss/total" in log]
    assert totals == [(1, 2.5), (2, 2.5)]
    assert [log["control/loss/total"] for log in found if "control/loss/total" in log] == [3.5] * 2


@needs("wandb")
def test_wandb_keeps_a_run_offline_without_what_is_nobodys_business(tmp_path):
    play({"wandb": {"project": "distil", "mode": "offline"}}, tmp_path, 0, {})
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(RUN_ID)
    [file] = folder.glob("*.wandb")
    deadline = time.monotonic() + 30  # the client's own process writes it
    while b"control/step" not in (kept := file.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in (b"loss/total", b"eval/perplexity", b"control/loss/total", b"control/step"):
        assert name in kept, name
    assert os.fspath(ROOT).encode() not in kept


class _Client:
    """A client that writes down how it is called: what each tracker must be asked, anywhere."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments, **named):
            self.calls.append((name, arguments, named))
            return self

        return call


@pytest.fixture
def fake(monkeypatch):
    """Replaces the packages wandb and trackio by one client."""
    client = _Client()
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(__import__("sys").modules, name, client)
    return client


def test_wandb_is_asked_to_continue_one_run_with_steps_of_its_own(fake, tmp_path):
    play({"wandb": {"project": "distil", "tags": ("a",)}}, tmp_path, 0, {})
    calls = {name: named for name, _, named in fake.calls}
    assert calls["init"]["id"] == RUN_ID and calls["init"]["resume"] == "allow"
    assert calls["init"]["mode"] == "online" and calls["init"]["dir"] == os.fspath(tmp_path)
    assert calls["Settings"]["console"] == "off" and calls["Settings"]["x_disable_meta"]
    logged = [arguments[0] for name, arguments, _ in fake.calls if name == "log"]
    assert {"control/step": 1, "control/loss/total": 3.5} in logged
    assert {"step": 1, "eval/perplexity": 12.0} in logged
    assert calls["finish"] == {"exit_code": 0}


def test_trackio_is_given_numbers_that_json_has(fake, tmp_path):
    play({"trackio": {"project": "distil", "space": "me/runs"}}, tmp_path, 4, {})
    calls = {name: named for name, _, named in fake.calls}
    assert calls["init"]["resume"] == "allow" and calls["init"]["space_id"] == "me/runs"
    logged = [(arguments, named) for name, arguments, named in fake.calls if name == "log"]
    assert (({"loss/total": 2.5, "perf/x": None},), {"step": 5}) in logged


def test_a_tracker_whose_client_is_missing_is_refused(monkeypatch):
    monkeypatch.setitem(options.PACKAGES, "wandb", "no_such_package")
    section = options.Trackers(wandb=options.WandbTracker(project="p"))
    [error] = options.missing(section)
    assert "logging.wandb" in str(error) and "jaxdistill[wandb]" in str(error)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("{wandb: true}", "logging.wandb"),
        ("{wandb: {}}", "logging.wandb.project"),
        ("{wandb: {project: p, mode: quiet}}", "logging.wandb.mode"),
        ("{mlflow: {uri: x}}", "logging.mlflow.experiment"),
        ("{trackio: {projekt: p}}", "logging.trackio.projekt"),
    ],
)
def test_sections_of_other_shapes_are_refused_by_name(given, key):
    with pytest.raises(ConfigError, match=key):
        configs.load(ROOT / "configs" / "quickstart.yaml", [f"logging={given}"])


def test_every_tracker_has_an_extra_a_section_and_a_client():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = set(options.Trackers.model_fields)
    assert names == set(clients.BUILDERS) == set(options.PACKAGES)
    assert names <= set(extras["optional-dependencies"])


@pytest.mark.parametrize("error", [ImportError("libssl"), AttributeError("init"), SystemExit(3)])
def test_a_client_that_is_broken_is_reported_and_left_out(error, monkeypatch):
    def broken(_):
        raise error

    monkeypatch.setitem(clients.BUILDERS, "wandb", broken)
    other = Callback()
    monkeypatch.setitem(clients.BUILDERS, "trackio", lambda _: other)
    section = options.Trackers(
        wandb=options.WandbTracker(project="p"), trackio=options.TrackioTracker(project="p")
    )
    told = []
    assert clients.build_trackers(section, told.append) == {"trackio": other}
    assert told == [
        f"callback wandb cannot be made: {type(error).__name__}: {error}; the run continues "
        "without it"
    ]
