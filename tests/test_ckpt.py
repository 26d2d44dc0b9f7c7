"""jaxdistill ckpt: what there is, whether it is whole, and going back."""

import json

import pytest

from jaxdistill import cli
from jaxdistill.errors import Preempted
from jaxdistill.safe import manifest
from jaxdistill.train import step_folders


@pytest.fixture
def run(tmp_path):
    """A run folder with the checkpoints 10, 20 and 30; the second has the best metric."""
    folder = tmp_path / "run"
    directory = folder / "checkpoints"
    for step, loss in ((10, 3.0), (20, 1.5), (30, 2.0)):
        staged = step_folders.staging(directory, step)
        staged.mkdir(parents=True)
        (staged / "arrays").write_bytes(bytes(2_000_000))
        facts = {"meta": {}, "metrics": {"eval/loss": loss}, "rank": -loss}
        step_folders.commit(directory, step, facts)
    record = {"schema": 1, "name": "run", "status": "done", "step": 30, "attempts": []}
    record["id"] = "0" * 32
    (folder / "RUN.json").write_text(json.dumps(record))
    return folder


def call(capsys, *arguments):
    code = cli.main(["ckpt", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def damage(run, step):
    path = run / "checkpoints" / str(step) / "arrays"
    path.write_bytes(bytes(1_999_999) + b"\x01")


def test_ls_tells_step_size_metrics_and_the_best(run, capsys):
    code, out, _ = call(capsys, "ls", run)
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == ["10", "20", "30"]
    assert all("2.0 MB" in line for line in lines)
    assert "eval/loss 1.5  best" in lines[1] and "best" not in lines[0] + lines[2]
    (run / "checkpoints" / "10" / manifest.NAME).unlink()
    code, out, _ = call(capsys, "ls", run, "--json")
    rows = json.loads(out)
    assert "damaged" in rows[0] and [row["best"] for row in rows] == [False, True, False]
    assert rows[2]["metrics"] == {"eval/loss": 2.0} and rows[2]["bytes"] == 2_000_000


def test_verify_reads_every_file_and_exits_6_at_damage(run, capsys):
    assert call(capsys, "verify", run)[0] == 0
    damage(run, 20)
    code, out, err = call(capsys, "verify", run)
    assert code == 6 and "1 of 3 checkpoints are damaged" in err
    assert "arrays is changed" in out.splitlines()[1] and out.splitlines()[2].endswith("ok")
    code, out, _ = call(capsys, "verify", run, "--json")
    assert code == 6 and [row["ok"] for row in json.loads(out)] == [True, False, True]


def test_a_checkpoint_that_a_run_removes_meanwhile_is_not_damaged(run, capsys, monkeypatch):
    verify, read = manifest.verify, manifest.read

    def late(look):
        def after_removal(folder, *rest):
            if folder.name == "10" and folder.exists():
                folder.rename(folder.with_name("removing"))
            return look(folder, *rest)

        return after_removal

    monkeypatch.setattr(manifest, "verify", late(verify))
    code, out, err = call(capsys, "verify", run)
    assert (code, err) == (0, "") and [line.split()[0] for line in out.splitlines()] == ["20", "30"]
    (run / "checkpoints" / "removing").rename(run / "checkpoints" / "10")
    monkeypatch.setattr(step_folders, "best", lambda _: 20)
    monkeypatch.setattr(manifest, "read", late(read))
    code, out, _ = call(capsys, "ls", run)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["20", "30"]


def test_rollback_moves_what_came_later_and_loses_nothing(run, capsys):
    code, out, _ = call(capsys, "rollback", run, 10)
    assert code == 0 and "put aside: 20, 30; next: jaxdistill resume" in out
    directory = run / "checkpoints"
    assert step_folders.steps(directory) == [10]
    aside = sorted(path.name.split("-")[0] for path in (directory / "rolled_back").iterdir())
    assert aside == ["20", "30"]
    record = json.loads((run / "RUN.json").read_text())
    assert (record["status"], record["step"]) == ("stopped", 10)
    event = json.loads((run / "events.jsonl").read_text())
    assert (event["kind"], event["to"], event["steps"]) == ("rolled_back", 10, [20, 30])


def test_rollback_refuses_what_is_damaged_absent_or_in_use(run, capsys):
    damage(run, 10)
    code, _, err = call(capsys, "rollback", run, 10)
    assert code == 6 and "arrays is changed" in err
    code, _, err = call(capsys, "rollback", run, 15)
    assert code == 2 and "no checkpoint of step 15; there are: 10, 20, 30" in err
    from jaxdistill.run.folder import RunDir

    with RunDir.open(run).held():
        code, _, err = call(capsys, "rollback", run, 20)
    assert code == 2 and "is being written by process" in err
    assert step_folders.steps(run / "checkpoints") == [10, 20, 30]


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    for action in (["ls"], ["verify"]):
        code, _, err = call(capsys, *action, tmp_path)
        assert code == 2 and "holds no run (no RUN.json)" in err


def test_a_run_that_was_asked_to_stop_ends_with_75(monkeypatch, capsys, run):
    def stop(*_, **__):
        raise Preempted("SIGTERM: saved after step 5 of 7")

    monkeypatch.setattr("jaxdistill.api.resume", stop)
    assert cli.main(["resume", str(run)]) == 75
    assert capsys.readouterr().err.endswith("stopped: SIGTERM: saved after step 5 of 7\n")
