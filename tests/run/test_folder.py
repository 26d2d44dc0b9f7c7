"""The run folder: made whole, held by one process, honest about a disk that cannot be written."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from jaxdistill.errors import ConfigError, DamagedError, Preempted, StorageError, UserError
from jaxdistill.run import anew, folder
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
    (run.path / "LOCK").unlink()
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


def test_of_several_that_make_one_folder_one_does_and_it_is_whole(tmp_path):
    def attempt(place, name, barrier, outcome):
        barrier.wait()
        try:
            RunDir.create(
                str(place), name=name, input_text=name, resolved=f"a: {name}\n", overrides=[]
            )
            outcome.append(name)
        except ConfigError as error:
            assert "is being written by process" in str(error) or "holds a run" in str(error)

    for number in range(20):
        place, made, barrier = tmp_path / str(number), [], threading.Barrier(3)
        several = [
            threading.Thread(target=attempt, args=(place, name, barrier, made))
            for name in ("first", "second", "third")
        ]
        for one in several:
            one.start()
        for one in several:
            one.join()
        (name,) = made
        assert (place / "config.resolved.yaml").read_text() == f"a: {name}\n"
        assert RunDir.open(place).record["name"] == name
        assert not list(place.glob("*.tmp"))


def test_who_only_looked_whether_a_folder_is_free_stops_nobody(tmp_path):
    run, held = make(tmp_path / "run"), threading.Event()

    def look():
        with run.held():
            held.set()
            time.sleep(0.05)

    looking = threading.Thread(target=look)
    looking.start()
    held.wait()
    with RunDir.open(run.path).held():
        pass
    looking.join()


@pytest.mark.parametrize("part", ["student", "control"])
def test_a_run_whose_checkpoints_are_gone_is_begun_anew_only_on_request(tmp_path, part):
    run = make(tmp_path / "run")
    checkpoints = run.path / anew.PARTS[part] / "checkpoints"
    anew.check(run)  # it has not saved anything yet
    (checkpoints / "3").mkdir(parents=True)
    run.note_saved(part, 3)
    run.note_saved(part, 6)
    (run.path / "metrics.jsonl").write_text("kept")
    run = RunDir.open(run.path)
    anew.check(run)
    (checkpoints / "3").rmdir()
    with pytest.raises(DamagedError, match="no checkpoint is there.*from step 3 on.*--from-start"):
        anew.check(run)
    place = anew.begin(run)
    anew.check(RunDir.open(run.path))
    assert (place / "metrics.jsonl").read_text() == "kept"
    assert json.loads((place / "RUN.json").read_text())["saved"] == {part: 3}
    assert (run.path / "config.resolved.yaml").exists()
    assert (
        not (run.path / "metrics.jsonl").exists() and events(run.path)[-1]["kind"] == "from_start"
    )


def test_checkpoints_that_were_all_damaged_are_no_reason_to_begin_anew(tmp_path):
    run = make(tmp_path / "run")
    (run.path / "checkpoints" / "bad" / "3-1").mkdir(parents=True)
    with pytest.raises(DamagedError, match=r"is there \(1 damaged ones are in bad/\)"):
        anew.check(run)


def test_a_refused_attempt_leaves_a_finished_run_finished(tmp_path):
    run = make(tmp_path / "run")
    with run.attempt(0):
        pass
    with pytest.raises(ConfigError):
        with run.attempt(6):
            raise ConfigError("data.train changed")
    record = RunDir.open(run.path).record
    assert record["status"] == "done" and record["attempts"][1]["refused"] == "data.train changed"
    with pytest.raises(KeyError):
        with run.attempt(6):
            run.update(status="running")  # as training does when it goes on
            raise KeyError
    assert RunDir.open(run.path).record["status"] == "failed"


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe{}",
        b'{"schema": 1',
        b"[" * 100_000,
        b'{"schema": 1, "name": "x", "status": "done", "step": 1e999, "attempts": []}',
        b'{"schema": 1, "name": "x", "status": "done", "step": 1'
        + b"0" * 400
        + b', "attempts": []}',
        b'{"schema": 1, "name": "x", "status": "done", "step": 1, "attempts": {}}',
        b'{"schema": 1, "name": "\\ud800", "status": "done", "step": 1, "attempts": []}',
        b'{"schema": 1, "name": "x", "status": "done", "step": true, "attempts": []}',
        b'{"schema": 1, "name": "x", "status": "new", "step": 1, "attempts": [], "saved": 3}',
    ],
)
def test_a_damaged_record_is_one_message(tmp_path, damage):
    run = make(tmp_path / "run")
    (run.path / "RUN.json").write_bytes(damage)
    with pytest.raises(UserError, match="RUN.json: "):
        RunDir.open(run.path)


FIELDS = {
    "id": (None, 7, "", "x" * 32, "0" * 31, []),
    "name": (None, 7, {}),
    "status": (None, 1),
    "step": (-1, "3", None, 1.5),
    "attempts": ({}, None, [1], [None]),
    "command": ("train", {}),
    "saved": (3, [], {"student": "3"}, {"student": None}),
    "callbacks": (3, [], "x", {"wandb": 3}, {"wandb": None}),
    "sealed": (1, "yes"),
    "total_steps": ("3", None),
    "method": (3, {}),
    "versions": ("x", []),
    "device": (3, {}),
    "mesh": ("x",),
    "teacher": ("x", 3),
    "student": ("x", 3),
    "exit_reason": (3, {}),
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_record_is_checked_for_its_kind(name, tmp_path):
    run = make(tmp_path / "run")
    RunDir.open(run.path)
    for value in FIELDS[name]:
        (run.path / "RUN.json").write_text(json.dumps(run.record | {name: value}))
        with pytest.raises(DamagedError, match="RUN.json: is damaged"):
            RunDir.open(run.path)


def test_a_run_that_begins_anew_is_another_run_to_its_trackers(tmp_path):
    run = make(tmp_path / "run")
    before = run.record["id"]
    run.update(callbacks={"mlflow": {"run_id": "x"}})
    anew.begin(run)
    record = RunDir.open(run.path).record
    assert record["id"] != before and len(record["id"]) == 32 and "callbacks" not in record


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"[" * 100_000, b'{"started": 1e300, "pid": 1}', b"9"]
)
def test_whatever_stands_in_a_lock_it_is_taken_over(tmp_path, text):
    run = make(tmp_path / "run")
    (run.path / "LOCK").write_bytes(text)
    with run.held():
        assert events(run.path)[0]["kind"] == "taken_over"
