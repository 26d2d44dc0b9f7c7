"""What of a run may go: the checkpoints of a finished control, the rest by `jaxdistill clean`."""

import json
import shutil

import pytest

from jaxdistill import api, cli
from jaxdistill.run import session
from jaxdistill.train import step_folders


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run that had a control."""
    return shutil.copytree(finished.run_dir, tmp_path / "run")


def test_the_control_leaves_its_records_and_no_checkpoints(finished):
    record = json.loads((finished.run_dir / "RUN.json").read_text())
    assert "student" in record["saved"] and "control" not in record["saved"]
    assert not (finished.run_dir / "control" / "checkpoints").exists()
    assert (finished.run_dir / "control" / "metrics.jsonl").read_text().count("\n") >= 6
    assert any(row["name"] == "SFT control" for row in finished.rows)


def test_a_finished_run_whose_control_is_gone_is_still_finished(run, capsys, plain_runs):
    before = (run / "table.json").read_bytes()
    api.resume(run)
    assert "is finished" in capsys.readouterr().err
    assert (run / "table.json").read_bytes() == before


def test_clean_says_what_would_go_and_then_removes_it(run, capsys):
    best, steps = step_folders.best(run / "checkpoints"), step_folders.steps(run / "checkpoints")
    bad = run / "checkpoints" / step_folders.BAD / "2-1"
    bad.mkdir(parents=True)
    (bad / "arrays").write_bytes(bytes(3_000_000))
    (run / "earlier" / "1").mkdir(parents=True)
    assert cli.main(["clean", str(run)]) == 0
    told = capsys.readouterr().out
    others = [step for step in steps if step not in (best, steps[-1])]
    assert others and all(f"checkpoints/{step}: neither" in told for step in others)
    assert "3.0 MB" in told and "--yes removes it" in told and bad.exists()
    assert cli.main(["clean", str(run), "--yes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["removed"] and found["bytes"] >= 3_000_000
    assert not bad.exists() and not (run / "earlier").exists()
    assert step_folders.steps(run / "checkpoints") == sorted({best, steps[-1]})
    assert cli.main(["ckpt", "verify", str(run)]) == 0
    assert cli.main(["clean", str(run)]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_a_run_that_is_not_done_keeps_what_it_may_fall_back_to(run, capsys):
    record = json.loads((run / "RUN.json").read_text())
    (run / "RUN.json").write_text(json.dumps(record | {"status": "stopped"}))
    steps = step_folders.steps(run / "checkpoints")
    assert cli.main(["clean", str(run), "--yes"]) == 0
    assert step_folders.steps(run / "checkpoints") == steps and len(steps) == 3


@pytest.mark.variant
def test_a_longer_run_trains_its_control_anew(run, capsys, plain_runs):
    assert session.resume(run, ["train.steps=8"]).rows[2]["name"] == "SFT control"
    lines = (run / "control" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 8


def test_no_run(tmp_path, capsys):
    assert cli.main(["clean", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_checkpoints_of_a_control_that_was_noted_go_with_their_note(run, plain_runs):
    """As a run killed after its control was measured, and before its checkpoints were removed."""
    control = run / "control" / "checkpoints"
    (control / "6").mkdir(parents=True)
    (run / "control" / ".removing-checkpoints").mkdir()
    record = json.loads((run / "RUN.json").read_text())
    saved = record["saved"] | {"control": 1}
    (run / "RUN.json").write_text(json.dumps(record | {"saved": saved}))
    assert cli.main(["clean", str(run), "--yes"]) == 0
    assert not control.exists() and not (run / "control" / ".removing-checkpoints").exists()
    assert "control" not in json.loads((run / "RUN.json").read_text())["saved"]
    assert session.resume(run).run_dir == run  # and nothing refuses it


def test_a_link_goes_and_what_it_leads_to_stays(run, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("x")
    (run / "earlier").symlink_to(tmp_path / "elsewhere")
    (run / "checkpoints" / ".saving-5").write_text("a file")
    assert cli.main(["clean", str(run), "--yes"]) == 0
    assert not (run / "earlier").is_symlink() and not (run / "checkpoints" / ".saving-5").exists()
    assert (tmp_path / "elsewhere" / "mine").read_text() == "x"


def test_what_a_run_is_writing_is_not_called_left_over(run, capsys):
    (run / "checkpoints" / ".saving-9").mkdir()
    record = json.loads((run / "RUN.json").read_text())
    (run / "RUN.json").write_text(json.dumps(record | {"status": "running"}))
    assert cli.main(["clean", str(run)]) == 0
    assert ".saving-9" not in capsys.readouterr().out
