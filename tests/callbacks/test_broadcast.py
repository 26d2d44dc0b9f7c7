"""What callbacks are told, in which order, and what follows when one of them fails."""

import pathlib
import threading

import numpy as np
import pytest

from jaxdistill.callbacks import CONTROL, Broadcast, Callback, Start
from jaxdistill.errors import Preempted


class Heard(Callback):
    """Writes down every call."""

    def __init__(self, kept=None):
        self.calls, self._kept = [], kept

    def start(self, run):
        self.calls.append(("start", run.step, dict(run.kept)))
        return self._kept

    def record(self, step, values):
        self.calls.append(("record", step, dict(values)))

    def evaluation(self, step, values):
        self.calls.append(("evaluation", step, dict(values)))

    def samples(self, step, rows):
        self.calls.append(("samples", step, rows))

    def checkpoint(self, step, path):
        self.calls.append(("checkpoint", step, path, threading.current_thread().name))

    def end(self, ending):
        self.calls.append(("end", ending.status, ending.reason, ending.table))


class Failing(Heard):
    """Raises in one method."""

    def __init__(self, method):
        super().__init__()
        self.tried = 0

        def fail(*_):
            self.tried += 1
            raise OSError("no route to https://me:hunter2@host")

        setattr(self, method, fail)


def start(own):
    return Start(pathlib.Path("run"), "tiny", "0" * 32, {"seed": 1}, 4, own)


def test_everything_is_reported_in_order():
    heard = Heard()
    told = Broadcast({"heard": heard}, pytest.fail)
    with told.attempt(start, {}):
        told.listener().record(5, {"loss/total": 2.0})
        saver = threading.Thread(target=told.saved, args=(5, pathlib.Path("run/5")), name="saver")
        saver.start()
        saver.join()
        told.listener().record(6, {"eval/perplexity": 3.0})
        told.listener().samples(6, [{"prompt": "a"}])
        told.listener(CONTROL).record(1, {"loss/total": 4.0})
        told.listener(CONTROL).record(1, {"eval/perplexity": 5.0})
        told.saved(6, pathlib.Path("run/6"))
        told.measured([{"name": "student after"}])
    here = threading.current_thread().name
    assert heard.calls == [
        ("start", 4, {}),
        ("record", 5, {"loss/total": 2.0}),
        ("checkpoint", 5, pathlib.Path("run/5"), here),
        ("evaluation", 6, {"eval/perplexity": 3.0}),
        ("samples", 6, [{"prompt": "a"}]),
        ("record", 1, {"control/loss/total": 4.0}),
        ("evaluation", 1, {"control/eval/perplexity": 5.0}),
        ("checkpoint", 6, pathlib.Path("run/6"), here),
        ("end", "done", None, [{"name": "student after"}]),
    ]


def test_what_a_callback_keeps_comes_back():
    kept = {"old": {"id": "x"}}
    first, again = Heard({"id": "y"}), Heard({"id": "z"})
    with Broadcast({"new": first, "old": again}, pytest.fail).attempt(start, kept):
        pass
    assert kept == {"old": {"id": "x"}, "new": {"id": "y"}}
    assert first.calls[0] == ("start", 4, {}) and again.calls[0] == ("start", 4, {"id": "x"})


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Preempted("SIGTERM: saved"), "stopped", "SIGTERM: saved"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (ValueError("password=hunter2hunter2"), "failed", "password=[redacted]"),
    ],
)
def test_the_end_says_how(error, status, reason):
    heard = Heard()
    told = Broadcast({"heard": heard}, pytest.fail)
    with pytest.raises(type(error)), told.attempt(start, {}):
        raise error
    assert heard.calls[-1] == ("end", status, reason, ())


@pytest.mark.parametrize(
    "method", ["start", "record", "evaluation", "samples", "checkpoint", "end"]
)
def test_one_that_fails_is_left_out_and_reported_once(method):
    failing, heard, told_of = Failing(method), Heard(), []
    told = Broadcast({"mine": failing, "heard": heard}, told_of.append)
    with told.attempt(start, {}):
        for step in (1, 2):
            told.listener().record(step, {"loss/total": 1.0})
            told.listener().record(step, {"eval/perplexity": 1.0})
            told.listener().samples(step, [])
            told.saved(step, pathlib.Path("run"))
    assert failing.tried == 1
    assert told_of == [
        f"callback mine failed in {method}: OSError: no route to https://[redacted]@host; "
        "the run continues without it"
    ]
    assert [call[0] for call in heard.calls].count("record") == 2
    assert heard.calls[-1][0] == "end"


class Quits(Callback):
    """Ends the process, as some clients do where their settings are wrong."""

    def record(self, step, values):
        raise SystemExit(2)


def test_one_that_ends_the_process_is_left_out():
    heard, told_of = Heard(), []
    told = Broadcast({"quits": Quits(), "heard": heard}, told_of.append)
    with told.attempt(start, {}):
        told.listener().record(1, {"loss/total": 1.0})
    assert [call[0] for call in heard.calls] == ["start", "record", "end"]
    assert told_of == [
        "callback quits failed in record: SystemExit: 2; the run continues without it"
    ]


@pytest.mark.parametrize(
    "answer",
    [7, "text", [1], object(), {"id": object()}, {"id": float("nan")}, {("a",): 1}, np.ones(3)],
)
def test_an_answer_that_cannot_be_kept_is_reported(answer):
    kept, heard, told_of = {}, Heard({"id": "y"}), []
    told = Broadcast({"odd": Heard(answer), "heard": heard}, told_of.append)
    with told.attempt(start, kept):
        pass
    assert kept == {"heard": {"id": "y"}} and heard.calls[-1][0] == "end"
    (said,) = told_of
    assert said.startswith("callback odd failed in start: its answer cannot be kept: ")
