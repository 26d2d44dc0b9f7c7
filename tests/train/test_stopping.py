"""Signals: one stop is one stop however often it is sent; a later one does not ask."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from jaxdistill.errors import Preempted
from jaxdistill.train import stopping

STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_outside_of_training_ends_at_once_and_inside_it_is_only_noted(number, monkeypatch):
    got = []
    own = lambda *_: got.append("own")
    before = signal.signal(number, own)
    try:
        with pytest.raises(Preempted, match=signal.Signals(number).name) as stopped:
            with stopping.listening():
                os.kill(os.getpid(), number)
        assert stopped.value.exit_code == 75
        noted = []
        with pytest.raises(Preempted, match="training has ended and is saved"):
            with stopping.listening() as stop, stop.deferred():
                assert stop.asked is None
                for again in STOPS:
                    os.kill(os.getpid(), again)
                    noted.append(stop.asked)
        assert noted == [signal.Signals(STOPS[0]).name] * 3
        os.kill(os.getpid(), number)  # the rest of that stop
        assert not got
        monkeypatch.setattr(stopping, "SAME_SECONDS", -1.0)
        os.kill(os.getpid(), number)  # another one
        assert got == ["own"] and signal.getsignal(number) is own
    finally:
        for each in STOPS:
            signal.signal(each, stopping._real(signal.getsignal(each)))
        signal.signal(number, before)


PROGRAM = """
    import signal
    import time
    from jaxdistill.train import stopping
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    stopping.SAME_SECONDS = {same}
    with stopping.listening() as outer, stopping.listening() as stop, stop.deferred():
        print("ready", flush=True)
        while not stop.asked:
            time.sleep(0.01)
        print("asked", flush=True)
        time.sleep({saving})
        print("saved", flush=True)
"""


@contextlib.contextmanager
def saving_process(same, saving):
    code = textwrap.dedent(PROGRAM.format(same=same, saving=saving))
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


def test_a_later_signal_kills_a_process_that_is_still_saving():
    with saving_process(same=0.0, saving=60) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT


def test_one_stop_that_comes_twice_saves():
    with saving_process(same=60.0, saving=0.3) as process:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "saved\n"
        assert process.wait(timeout=30) == 1  # Preempted, which this program does not catch


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_has_no_signals_and_is_never_asked():
    asked = []

    def work():
        with stopping.listening() as stop:
            asked.append(stop.asked)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [None] and signal.getsignal(signal.SIGTERM) is before
