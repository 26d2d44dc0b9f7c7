"""A guarded function: its own process, its own limits, nobody left behind."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from jaxdistill.safe.guarded import Guarded, TimedOut


def test_a_function_that_dies_is_replaced():
    with Guarded("os:_exit", seconds=5.0) as end:
        for _ in range(2):
            with pytest.raises(TimedOut, match="died"):
                end(3)
    with Guarded("os:listdir", seconds=5.0) as listing:
        with pytest.raises(RuntimeError, match="FileNotFoundError"):
            listing("/no/such/folder")
        assert listing("/") and listing._process.pid != os.getpid()


def test_values_come_back_as_they_went():
    value = [None, True, 0.5, "\ud800 \0 é", {"a": [1]}]
    with Guarded("copy:copy", seconds=5.0) as same:
        assert same(value) == value
        assert same("x" * 5_000_000) == "x" * 5_000_000


def test_time_and_memory_are_bounded():
    with Guarded("time:sleep", seconds=0.2) as sleep:
        sleep(0)  # the process runs
        start = time.monotonic()
        with pytest.raises(TimedOut, match="no result within 0.2 s"):
            sleep(600)
        assert time.monotonic() - start < 60
    with Guarded("builtins:bytearray", seconds=20.0, memory=1 << 28) as much:
        with pytest.raises(RuntimeError, match="MemoryError"):
            much(1 << 30)


def test_the_process_is_replaced_in_time_and_ends_with_its_owner():
    with Guarded("os:getpid", seconds=5.0, calls=2) as who:
        first, second, third = who(), who(), who()
    assert first == second != third
    for process in (first, third):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_keys_stay_in_the_parent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    with Guarded("os:getenv", seconds=5.0) as look:
        assert look("OPENAI_API_KEY") is None and look("PATH")


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from jaxdistill.safe.guarded import Guarded\nprint('once')\n"
        "with Guarded('os:getpid', seconds=5.0) as who: who()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "once\n"


def test_an_endless_call_ends_when_its_parent_was_killed(tmp_path):
    note = tmp_path / "pid"
    script = (
        "import threading, os, time\nfrom jaxdistill.safe.guarded import Guarded\n"
        "run = Guarded('builtins:exec', seconds=1.0)\nrun('pass')\n"
        f"open({str(note)!r}, 'w').write(str(run._process.pid))\n"
        "threading.Thread(target=run, args=('while True: pass',), daemon=True).start()\n"
        "time.sleep(0.3)\nos.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    child, deadline = int(note.read_text()), time.monotonic() + 60
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        if pathlib.Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return  # ended, and nobody has asked it how
        time.sleep(0.2)
    assert not os.path.exists(f"/proc/{child}")
