"""Folders filled beside their place: a kill's leavings are swept; what lives, and others', stay."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from jaxdistill.errors import StorageError, UserError
from jaxdistill.safe import beside, lock

KILLED = """
import os, pathlib, signal, sys
from jaxdistill.safe import beside
with beside.folder(pathlib.Path(sys.argv[1])) as inside:
    (inside / "model.safetensors").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_told(tmp_path):
    place, told = tmp_path / "student", []
    command = [sys.executable, "-c", KILLED, str(place)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".student-")
    beside.sweep(tmp_path / "teacher", told.append)
    assert left.exists() and not told
    with beside.folder(place, told.append) as inside:
        assert inside.is_dir() and not left.exists()
    assert "bytes that a killed process had left" in told[0] and str(left) in told[0]
    assert not list(tmp_path.iterdir())


def test_what_lives_or_is_not_ours_stays(tmp_path):
    told, place = [], tmp_path / "out"
    for name in (".out-backup", ".out-0123456789ab", ".out-0123456789abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
    (tmp_path / ".out-aaaaaaaaaaaa").symlink_to(tmp_path / ".out-backup")
    (tmp_path / ".out-bbbbbbbbbbbb").mkdir()  # just made, its lock not yet
    before = set(tmp_path.iterdir())
    with beside.folder(place, told.append) as inside:
        beside.sweep(place, told.append)
        assert inside.is_dir() and not told
    assert set(tmp_path.iterdir()) == before
    os.utime(tmp_path / ".out-bbbbbbbbbbbb", (0, 0))
    beside.sweep(place, told.append)
    assert before - set(tmp_path.iterdir()) == {tmp_path / ".out-bbbbbbbbbbbb"}


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        with beside.folder(pathlib.Path(tmp_path / "x")):
            raise KeyError
    assert not list(tmp_path.iterdir())


def test_where_a_full_disk_has_no_room_for_the_lock_nothing_stays(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock, "_rewrite", full)
    with pytest.raises(StorageError, match="cannot be written: No space left"):
        with beside.folder(tmp_path / "x"):
            pass
    assert not list(tmp_path.iterdir())


def test_the_newest_of_what_killed_processes_left_is_filled_further(tmp_path):
    place, told = tmp_path / "data", []
    command = [sys.executable, "-c", KILLED, str(place)]
    for _ in range(2):  # the second run sweeps what the first left
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    older = tmp_path / ".data-0123456789ab"
    (older / beside.CONTENT).mkdir(parents=True)
    for path in (older / beside.CONTENT, older):
        os.utime(path, (0, 0))
    with beside.folder(place, told.append, resumes=True) as inside:
        assert inside == left / beside.CONTENT and not older.exists() and len(told) == 1
        assert (inside / "model.safetensors").read_bytes() == b"x" * 1000
        with beside.folder(place, told.append, resumes=True) as second:  # what lives stays
            assert second != inside and not list(second.iterdir())
    assert not list(tmp_path.iterdir())


def at_the_lock(monkeypatch, act):
    """Does something once, between the opening of a lock's file and its lock."""
    locked = lock._locked

    def first(file):
        monkeypatch.setattr(lock, "_locked", locked)
        act()
        return locked(file)

    monkeypatch.setattr(lock, "_locked", first)


def test_who_waited_for_a_folder_that_is_removed_is_no_second_owner(tmp_path, monkeypatch):
    left = tmp_path / ".data-0123456789ab"
    (left / beside.CONTENT).mkdir(parents=True)

    def remove_and_make_anew():
        shutil.rmtree(left)
        (left / beside.CONTENT).mkdir(parents=True)

    for act in (lambda: shutil.rmtree(left), remove_and_make_anew):
        left.mkdir(exist_ok=True)
        at_the_lock(monkeypatch, act)
        with pytest.raises(UserError, match="was removed at this moment"):
            with lock.held(left):
                pytest.fail("two own it")


def test_what_a_live_process_has_just_made_is_not_swept(tmp_path, monkeypatch):
    place, told = tmp_path / "data", []
    at_the_lock(monkeypatch, lambda: beside.sweep(place, told.append))
    with beside.folder(place, told.append) as inside:
        assert inside.is_dir() and not told


def test_who_stood_still_while_another_swept_makes_another_folder(tmp_path, monkeypatch):
    place, told = tmp_path / "data", []

    def sweep():
        for path in tmp_path.iterdir():
            os.utime(path, (0, 0))
        beside.sweep(place, told.append)

    at_the_lock(monkeypatch, sweep)
    with beside.folder(place, told.append) as inside:
        assert inside.is_dir() and len(told) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_removed_loses_its_name_first(tmp_path, monkeypatch):
    """Half of it under its old name could be taken over."""
    left, gone = (tmp_path / f".data-0123456789a{end}" for end in ("b", "c.gone"))
    for path in (left, gone):
        (path / beside.CONTENT).mkdir(parents=True)
    removed, rmtree = [], shutil.rmtree

    def watched(path, **options):
        removed.append((path.name, left.exists()))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    with beside.folder(tmp_path / "data", resumes=True) as inside:
        assert inside.parent == left  # what is being removed is not taken over
    assert removed == [(gone.name, True), (left.name + ".gone", False)]
    assert not list(tmp_path.iterdir())
