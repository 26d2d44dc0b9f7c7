"""The launcher without JAX: exit codes, signals, and that nothing is left behind."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxdistill import cli
from jaxdistill.cli import launch


def test_only_commands_that_train_are_launched(capsys):
    for words in ([], ["--"], ["--", "generate", "m"]):
        assert cli.main(["launch", "-n", "2", *words]) == 2
        assert "one of train, resume" in capsys.readouterr().err


def test_the_exit_code_is_the_first_failures_and_every_line_has_its_process(capfd, tmp_path):
    words = ["launch", "-n", "3", "--log-dir", str(tmp_path), "--restart", "2", "--", "train", "no"]
    assert cli.main(words) == 2
    said = capfd.readouterr().err
    for prefix in ("error", "[1] error", "[2] error"):
        assert f'{prefix}: "no": cannot read this configuration' in said
    assert "restart" not in said, "what the user got wrong is not tried again"
    for rank in range(3):
        assert "cannot read" in (tmp_path / f"rank-{rank}.log").read_text()


@pytest.mark.parametrize(("status", "code"), [(0, 0), (7, 7), (-9, 137), (-6, 134)])
def test_an_end_by_a_signal_has_the_shells_code(status, code):
    assert launch._exit_code(status) == code


def test_each_process_has_devices_of_its_own_and_a_private_coordinator(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8")
    mine = launch._environment(1, 2, 4, 1234)
    assert mine["JAX_COORDINATOR_BIND_ADDRESS"] == mine["JAX_COORDINATOR_ADDRESS"]
    assert mine["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:1234"
    assert mine["JAX_LOCAL_DEVICE_IDS"] == "4,5,6,7" and mine["JAX_NUM_CPU_DEVICES"] == "4"
    assert mine["XLA_FLAGS"] == "--xla_a=1"


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux promise")
def test_processes_die_with_a_launcher_that_is_killed(tmp_path):
    child = (
        "import os, pathlib, time; from jaxdistill.cli.launch import die_with_launcher as d; d();"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys; os.environ['JAXDISTILL_LAUNCHER'] = str(os.getpid());"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        pid = int((tmp_path / "pid").read_text())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    while _runs(pid):
        assert time.monotonic() < deadline, "an orphan"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_launcher_passes_its_signal_on_and_waits():
    """The processes here end by it at once; what a run does is in tests/run."""
    group = launch.Group(["serve", "missing"], 2, 1)
    group._start = lambda: [
        group._running.append(
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        )
        for _ in range(2)
    ]
    with group._passing_signals():
        group._start()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)  # of the same request
        assert group._watch() == 128 + signal.SIGTERM
    assert group.signals == [signal.SIGTERM]


@pytest.mark.parametrize("other", ["os.abort()", "sys.exit(1)", "sys.exit(0)"])
def test_processes_that_end_within_one_look_are_reported_and_the_cause_is_named(other, capfd):
    group = launch.Group(["serve", "missing"], 2, 1)
    for code in (other, "os.kill(os.getpid(), 9)"):
        group._running.append(subprocess.Popen([sys.executable, "-c", f"import os, sys; {code}"]))
    for process in group._running:
        process.wait()
    assert group._watch() == 128 + signal.SIGKILL
    assert "process 1 ended with signal SIGKILL" in capfd.readouterr().err


def test_a_restart_neither_changes_settings_nor_begins_anew_again():
    words = ["resume", "runs/a", "train.steps=9", "--from-start", "--json"]
    assert launch._resumed(words) == ["resume", "runs/a", "--json"]
