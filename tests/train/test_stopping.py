"""Signals: the first asks, the second does not; and what was there before comes back."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from jaxdistill.errors import Preempted
from jaxdistill.train import stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_of_training_ends_at_once_and_inside_it_is_only_noted(number):
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=signal.Signals(number).name) as stopped:
        with stopping.listening():
            os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 75
    assert signal.getsignal(number) is before
    noted = []
    with pytest.raises(Preempted, match="training has ended and is saved"):
        with stopping.listening() as stop, stop.deferred():
            assert stop.asked is None
            os.kill(os.getpid(), number)
            noted.append(stop.asked)
            # The next one is the operating system's.
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert noted == [signal.Signals(number).name]
    assert signal.getsignal(number) is before


def test_the_second_signal_kills_a_process_that_is_still_saving():
    program = """
        import time
        from jaxdistill.train import stopping
        with stopping.listening() as stop, stop.deferred():
            print("ready", flush=True)
            while not stop.asked:
                time.sleep(0.01)
            print("asked", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT


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
