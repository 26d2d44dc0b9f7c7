"""The run folder: made whole, held by one process, honest about a disk that cannot be written."""

import json
import os
import subprocess
import sys

import pytest

from jaxdistill.errors import ConfigError, Preempted, StorageError
from jaxdistill.run import folder
from jaxdistill.run.folder import RunDir


def make(folder):
    return RunDir.create(
        str(folder), name="x", input_text="a: 1\n", resolved="a: 1\nb: 2\n", overrides=["b=2"]
    )


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_run_that_died_while_its_folder_was_made_can_begin_again(tmp_path):
    whole = make(tmp_path / "whole")
    names = sorted(path.name for path in whole.path.iterdir())
    for count in range(len(names) + 1):
        folder = tmp_path / str(count)
        folder.mkdir()
        for name in [n for n in names if n != "RUN.json"][:count]:
            (folder / name).write_text("half")
        (folder / "RUN.json.tmp").write_text("half")
        make(folder)
        for name in names:
            if name != "RUN.json":
                assert (folder / name).read_bytes() == (whole.path / name).read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        make(tmp_path / "other")
    with pytest.raises(ConfigError, match="holds a run already: `jaxdistill resume"):
        make(tmp_path / "whole")


def test_the_holder_is_named_with_process_host_and_time(tmp_path):
    run = make(tmp_path / "run")
    with run.held():
        with pytest.raises(ConfigError) as refused:
            with RunDir.open(run.path).held():
                pass
        assert f"process {os.getpid()} on {os.uname().nodename}, since 20" in str(refused.value)
    with run.held():  # let go, and nothing to tell about
        pass
    assert not (run.path / "events.jsonl").exists()


def test_the_lock_of_a_dead_process_is_taken_over_and_told(tmp_path):
    run = make(tmp_path / "run")
    program = """
import os, signal, sys
from jaxdistill.run.folder import RunDir
with RunDir.open(sys.argv[1]).held():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    dead = subprocess.Popen([sys.executable, "-c", program, str(run.path)])
    assert dead.wait(timeout=120) == -9
    with run.held():
        (told,) = events(run.path)
    assert told["kind"] == "taken_over" and f"process {dead.pid} on" in told["of"]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    run = make(tmp_path / "run")
    (tmp_path / "precious").write_text("keep")
    (run.path / "LOCK").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="LOCK: cannot be written"):
        with run.held():
            pass
    assert (tmp_path / "precious").read_text() == "keep"


def test_a_folder_that_is_gone_or_full_is_named_and_files_stay_whole(tmp_path, monkeypatch):
    run = make(tmp_path / "run")
    before = (run.path / "RUN.json").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder.os, "fsync", full)
    with pytest.raises(StorageError, match="RUN.json: cannot be written: No space left on device"):
        run.update(status="running")
    monkeypatch.undo()
    assert (run.path / "RUN.json").read_bytes() == before
    assert not list(run.path.glob("*.tmp"))
    gone = RunDir(tmp_path / "gone", {})
    with pytest.raises(StorageError, match="LOCK: cannot be written: No such file"):
        with gone.held():
            pass


def test_how_an_attempt_ended_is_noted_and_never_hides_why(tmp_path, monkeypatch):
    run = make(tmp_path / "run")
    with pytest.raises(Preempted):
        with run.attempt(3):
            raise Preempted("SIGTERM: saved after step 5 of 7")
    record = RunDir.open(run.path).record
    assert record["status"] == "stopped" and "SIGTERM" in record["exit_reason"]
    assert record["attempts"][0]["from_step"] == 3
    with pytest.raises(KeyError) as failed:
        with run.attempt(5):
            monkeypatch.setattr(
                run,
                "write_text",
                lambda *_: (_ for _ in ()).throw(StorageError("RUN.json: cannot be written")),
            )
            raise KeyError("the cause")
    assert failed.value.__notes__ == ["RUN.json: cannot be written"]
