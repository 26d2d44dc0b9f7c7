"""Sweeps: which runs the values make, what is refused before the first, resuming, means."""

import json
import pathlib
import statistics

import pytest

from jaxdistill import cli
from jaxdistill import config as configs
from jaxdistill.errors import ConfigError, DivergedError, Preempted
from jaxdistill.report import sweep as pages
from jaxdistill.run import sweep as sweeps
from jaxdistill.run.folder import RunDir
from tests.run.conftest import CONFIG

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("plain_runs")


@pytest.fixture
def file(tmp_path, data):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, data=data))
    return path


class Trainer:
    """Stands for training: makes a run's folder and its table, and may stop or diverge."""

    def __init__(self, stops_at="", diverges_at=""):
        self.began, self.resumed = [], []
        self._stops_at, self._diverges_at = stops_at, diverges_at

    def run(self, config, *, input_text, overrides):
        name = config.run.dir.rpartition("/")[2]
        self.began.append(name)
        resolved = configs.dump(config)
        run = RunDir.create(
            config.run.dir, name="x", input_text=input_text, resolved=resolved, overrides=overrides
        )
        if name == self._stops_at:
            run.update(status="stopped")
            raise Preempted("asked to stop")
        if name == self._diverges_at:
            run.update(status="failed")
            raise DivergedError("not finite")
        self._end(run, config.method.alpha * 10 + config.seed)

    def resume(self, folder):
        self.resumed.append(folder.rpartition("/")[2])
        run = RunDir.open(folder)
        if run.record["status"] != "done":
            self._end(run, 0.0)

    def _end(self, run, perplexity):
        rows = [{"name": "student after", "perplexity": perplexity, "kl_t1": None}]
        run.write_json("table.json", {"held_out": "x", "rows": rows})
        run.update(status="done")


def names(*overrides):
    return [point.name for point in sweeps.points_of(overrides)]


def test_every_combination_is_a_run():
    points = sweeps.points_of(["method.alpha=0.1,0.5", "train.steps=4", "seed=1,2"])
    assert [point.name for point in points] == [
        "alpha=0.1,seed=1",
        "alpha=0.1,seed=2",
        "alpha=0.5,seed=1",
        "alpha=0.5,seed=2",
    ]
    assert points[1].values == {"method.alpha": 0.1, "seed": 2}
    assert points[1].overrides == ("train.steps=4", "method.alpha=0.1", "seed=2")


def test_values_with_commas_of_their_own():
    """Commas inside braces, brackets and quotes separate nothing; such values go by number."""
    assert names("method={name: kd, alpha: 0.5},{name: sft}", "seed=1,2") == [
        "method=0,seed=1",
        "method=0,seed=2",
        "method=1,seed=1",
        "method=1,seed=2",
    ]
    assert names("data.train=[a.txt, b.txt]", "seed=1,2") == ["seed=1", "seed=2"]
    assert names("student.prune.mlp=1,2", "teacher.random.mlp=3,4")[0] == (
        "student.prune.mlp=1,teacher.random.mlp=3"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["eval.max_rows=1,null"],  # null is the second value, by its number 1
        ["run_name=1,'1'"],
        [f"{letter * 20}=100,200" for letter in "abcdef"],
    ],
)
def test_names_that_would_meet_or_be_long_are_numbers(overrides):
    found = names(*overrides)
    assert len(set(found)) == len(found) == 2 ** len(overrides)
    assert found[0] in ("0", "00") and max(map(len, found)) <= 2


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["train.steps=4"], "no key has several values"),
        (["alpha"], "write it as key=value"),
        (["seed=1,2", "seed=3"], "is given twice"),
        ([" seed =3", "seed=1,2"], "is given twice"),
        (["seed=1,1"], "a value stands twice"),
        (["run={dir: a},{dir: b}"], "use -o DIR"),
        (["run.dir=a,b"], "use -o DIR"),
        (["seed=" + ",".join(map(str, range(1001)))], "at most 1000"),
    ],
)
def test_what_is_no_sweep(overrides, rule):
    with pytest.raises(ConfigError, match=rule):
        sweeps.points_of(overrides)


def test_a_value_that_cannot_be_is_refused_before_the_first_run(file, tmp_path):
    trainer = Trainer()
    with pytest.raises(ConfigError, match="method.alpha"):
        sweeps.sweep(file, ["method.alpha=0.1,7"], tmp_path / "s", run=trainer.run)
    assert not trainer.began and not (tmp_path / "s").exists()


def test_a_stopped_sweep_resumes_and_a_finished_run_is_not_trained_again(file, tmp_path):
    values, out = ["method.alpha=0.1,0.5", "seed=1,2"], tmp_path / "s"
    first = Trainer(stops_at="alpha=0.5,seed=1")
    with pytest.raises(Preempted):
        sweeps.sweep(file, values, out, run=first.run, resume=first.resume)
    assert first.began == ["alpha=0.1,seed=1", "alpha=0.1,seed=2", "alpha=0.5,seed=1"]
    noted = json.loads((out / pages.FILE).read_text())["runs"]
    assert [run["status"] for run in noted] == ["done", "done", "stopped", "not begun"]
    then = Trainer()
    found = sweeps.sweep(file, values, out, run=then.run, resume=then.resume)
    assert then.began == ["alpha=0.5,seed=2"] and "alpha=0.5,seed=1" in then.resumed
    assert [run["status"] for run in found["runs"]] == ["done"] * 4
    low, high = found["rows"]
    assert low["name"] == "method.alpha = 0.1" and low["seeds"] == 2
    assert low["perplexity"] == pytest.approx(2.5)
    assert low["spread"]["perplexity"] == pytest.approx(statistics.stdev([2.0, 3.0]))
    assert json.loads((out / pages.FILE).read_text())["rows"][1]["name"] == high["name"]


def test_a_run_that_diverges_is_noted_and_the_next_begins(file, tmp_path):
    trainer, out = Trainer(diverges_at="seed=1"), tmp_path / "s"
    with pytest.raises(DivergedError, match="seed=1: not finite"):
        sweeps.sweep(file, ["seed=1,2"], out, run=trainer.run, resume=trainer.resume)
    assert trainer.began == ["seed=1", "seed=2"]
    page = (out / "report.html").read_text()
    assert "2 of 2 runs have begun" in page and "all seeds" in page


def test_a_folder_of_other_settings_is_refused(file, tmp_path):
    trainer, out = Trainer(), tmp_path / "s"
    sweeps.sweep(file, ["seed=1,2"], out, run=trainer.run, resume=trainer.resume)
    with pytest.raises(ConfigError, match=r"other settings \(train.steps\).*-o DIR"):
        sweeps.sweep(file, ["seed=1,2", "train.steps=4"], out, run=trainer.run)


def test_from_the_command_line(file, tmp_path, capsys):
    """Two real runs, their means, their page; again, nothing is trained."""
    out = tmp_path / "s"
    words = ["sweep", str(file), "seed=1,2", "train.steps=3", "train.eval_every=null", "-o"]
    assert cli.main([*words, str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert row["seeds"] == 2 and row["spread"]["perplexity"] >= 0
    after = [
        json.loads((out / name / "table.json").read_text())["rows"][-1]["perplexity"]
        for name in ("seed=1", "seed=2")
    ]
    assert row["perplexity"] == pytest.approx(statistics.fmean(after))
    assert cli.main([*words, str(out)]) == 0
    told = capsys.readouterr()
    assert told.err.count("is finished") == 2 and "all seeds" in told.out
    assert cli.main(["report", str(out), "-o", str(tmp_path / "page.html")]) == 0
    assert "Settings" in (tmp_path / "page.html").read_text()


def test_a_workflow_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="is a workflow"):
        sweeps.sweep(ROOT / "configs" / "tiny.yaml", ["seed=1,2"], tmp_path / "s")


def test_a_page_that_cannot_be_drawn_hides_no_error(file, tmp_path, capsys):
    def diverges(config, *, input_text, overrides):
        raise DivergedError("before there is a folder")

    with pytest.raises(DivergedError, match="seed=2: before there is a folder"):
        sweeps.sweep(file, ["seed=1,2"], tmp_path / "s", run=diverges)
    assert "no report.html: " in capsys.readouterr().err
