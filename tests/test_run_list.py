"""`jaxdistill ls runs`: which folders are runs, what a line says, and what sets runs apart."""

import json

import pytest

from jaxdistill import cli
from jaxdistill.cli import run_list


def make(folder, alpha, steps=20, **record):
    """A run folder as `train` leaves it, without its arrays."""
    folder.mkdir(parents=True)
    known = {"name": "tiny", "status": "done", "step": steps, "total_steps": steps, "method": "kd"}
    (folder / "RUN.json").write_text(json.dumps(known | record))
    rows = [{"name": "teacher", "perplexity": 2.0}, {"name": "student after", "perplexity": 12.25}]
    (folder / "table.json").write_text(json.dumps({"rows": [*rows[:1], rows[1] | {"kl_t1": 0.5}]}))
    (folder / "config.resolved.yaml").write_text(
        f"run: {{name: tiny, dir: {folder}}}\nmethod: {{name: kd, alpha: {alpha}}}\n"
        f"train: {{steps: {steps}}}\ndata: {{train: [{{path: a.txt}}]}}\n"
    )


@pytest.fixture
def runs(tmp_path):
    make(tmp_path / "a", 0.1)
    make(tmp_path / "sweep" / "b", 0.5, status="stopped", step=3)
    make(tmp_path / "sweep" / "b" / "control", 0.9)  # belongs to the run it lies in
    make(tmp_path / ".cache" / "c", 0.9)
    return tmp_path


def test_runs_are_found_below_and_not_within_each_other(runs):
    assert run_list.found(str(runs)) == [runs / "a", runs / "sweep" / "b"]
    assert run_list.found(str(runs / "a")) == [runs / "a"]


def test_the_table_says_how_each_stands_and_what_differs(runs, capsys):
    assert cli.main(["ls", "runs", "--in", str(runs), "--diff"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-1] == "method.alpha" and "train.steps" not in lines[0]
    assert lines[1] == [str(runs / "a"), "done", "20/20", "kd", "12.25", "0.5", "0.1"]
    assert lines[2] == [str(runs / "sweep/b"), "stopped", "3/20", "kd", "12.25", "0.5", "0.5"]


def test_json_has_the_same(runs, capsys):
    assert cli.main(["ls", "runs", "--in", str(runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["status"] for run in found["runs"]] == ["done", "stopped"]
    assert found["differences"] == {"method.alpha": [0.1, 0.5]}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": 3, "step": []}', "\xff"])
def test_damaged_files_are_a_line_without_numbers(runs, capsys, text):
    for name in ("RUN.json", "table.json", "config.resolved.yaml"):
        (runs / "a" / name).write_bytes(text.encode("latin-1"))
    assert cli.main(["ls", "runs", "--in", str(runs), "--diff"]) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[1:6] == ["damaged", "-", "-", "-", "-"]


def test_a_folder_without_runs_and_none(tmp_path, capsys):
    assert cli.main(["ls", "runs", "--in", str(tmp_path)]) == 0
    assert "holds no runs" in capsys.readouterr().out
    assert cli.main(["ls", "runs", "--in", str(tmp_path / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err
