import io
import json
import re
import sys

import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.report.console import ProgressLine

METRICS = {
    "loss/total": 1.8431,
    "loss/ce": 2.31,
    "agree/top1": 0.7123,
    "knobs/taid_t": 0.523,
    "optim/lr": 9.1e-5,
    "optim/grad_norm": 0.84,
    "perf/tokens_per_second": 41234.0,
    "perf/teacher_share": 0.46,
    "perf/memory_gib": 61.2,
}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def screen(terminal):
    """What was drawn, without the terminal sequences of colour and position."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def fields(line):
    return dict(re.findall(r'(\S+?)=("(?:[^"\\]|\\.)*"|\S+)', line))


def test_a_pipe_gets_one_line_of_key_value_per_record():
    pipe, clock = io.StringIO(), Clock()
    with ProgressLine(1000, stream=pipe, log_every=10, clock=clock) as progress:
        for step in range(1, 31):
            clock.now = 2.0 * step
            progress.step(step, METRICS)
    lines = pipe.getvalue().splitlines()
    assert [fields(line)["step"] for line in lines] == [f"{s}/1000" for s in (1, 10, 20, 30)]
    last = fields(lines[-1])
    assert last["done"] == "3.0%"
    assert float(last["loss/total"]) == 1.8431
    assert float(last["optim/lr"]) == 9.1e-5
    assert last["elapsed"] == "1m00s"
    assert last["eta"] == "32m20s"  # 970 steps of 2 seconds
    assert "\x1b" not in pipe.getvalue() and "\r" not in pipe.getvalue()


def test_the_last_step_and_evaluations_are_always_shown_in_a_pipe():
    pipe = io.StringIO()
    progress = ProgressLine(25, stream=pipe, log_every=10)
    for step in range(1, 26):
        progress.step(step, METRICS)
        if step == 13:
            progress.step(step, {"eval/perplexity": 12.5})
    steps = [fields(line)["step"] for line in pipe.getvalue().splitlines()]
    assert steps == ["1/25", "10/25", "13/25", "20/25", "25/25"]
    assert "eval/perplexity=12.5" in pipe.getvalue()


def test_metrics_that_are_absent_are_not_shown():
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        with ProgressLine(10, stream=stream) as progress:
            progress.step(1, {**METRICS, "guard/skipped": 0} if stream is terminal else METRICS)
        shown = screen(stream) if stream is terminal else stream.getvalue()
        assert "mfu" not in shown and "TFLOP" not in shown and "skipped" not in shown
    with ProgressLine(10, stream=terminal) as progress:
        progress.step(1, {**METRICS, "perf/mfu": 0.38, "guard/skipped": 2})
    assert "mfu 38.0%" in screen(terminal)
    assert "skipped 2" in screen(terminal)


def test_a_terminal_gets_dense_rows_in_place(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    terminal, clock = Terminal(), Clock()
    with ProgressLine(10_000, stream=terminal, clock=clock) as progress:
        for step in (1100, 1200):
            clock.now += 100.0
            progress.step(step, METRICS)
        progress.step(1200, {"eval/agree_top1": 0.7})
    text = screen(terminal)
    rows = text.splitlines()[-4:]
    assert "step 1200/10000 │ 12.0% │ 3m20s so far │ eta 2h26m" in text
    assert any(row.startswith("loss 1.843 │ ce 2.310 │ agree 71.2% │ taid_t 0.523") for row in rows)
    assert any("41.2k trained tok/s │ teacher 46.0% │ 61.2 GiB" in row for row in rows)
    assert "held-out  agree_top1 70.0%" in text
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


def test_rows_fit_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    terminal = Terminal()
    with ProgressLine(10, stream=terminal) as progress:
        progress.step(3, METRICS)
    assert max(len(row) for row in screen(terminal).replace("\r", "\n").splitlines()) <= 60
    for words in ("loss 1.843", "taid_t 0.523", "lr 9.1e-05", "grad 0.840", "61.2 GiB"):
        assert words in screen(terminal), "broken at the end of a row"


@pytest.mark.parametrize("mode", ["plain", "rich"])
def test_hostile_text_reaches_no_terminal(mode):
    stream = Terminal()
    hostile = "\x1b]0;owned\x07[red]x[/red] [/nothing] \x1b[2J\nsecond"
    with ProgressLine(10, stream=stream, mode=mode) as progress:
        progress.step(1, {**METRICS, "knobs/\x1b[31mevil[/]": 1.0})
        progress.event(hostile)
    assert "\x1b]0" not in stream.getvalue() and "\x1b[2J" not in stream.getvalue()
    assert "\x1b[31mevil" not in stream.getvalue()
    assert "[red]x[/red] [/nothing]  second" in screen(stream)
    assert "evil[/]" in screen(stream)


def test_an_event_in_a_pipe_is_one_quoted_field():
    pipe = io.StringIO()
    progress = ProgressLine(10, stream=pipe)
    progress.step(5, METRICS)
    progress.event('saved "a"\nb')
    line = pipe.getvalue().splitlines()[-1]
    assert json.loads(fields(line)["event"]) == 'saved "a" b'
    assert fields(line)["step"] == "5/10"


def test_nonfinite_and_missing_values_are_shown_as_they_are():
    pipe = io.StringIO()
    progress = ProgressLine(10, stream=pipe)
    progress.step(1, {"loss/total": float("nan"), "loss/ce": None})
    assert "loss/total=nan" in pipe.getvalue() and "loss/ce" not in pipe.getvalue()


def test_a_broken_pipe_does_not_stop_the_run():
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("reader is gone")

    progress = ProgressLine(10, stream=Broken(), mode="plain")
    progress.step(1, METRICS)
    progress.event("still here")
    progress.close()


def test_a_stream_of_ascii_gets_question_marks():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    ProgressLine(10, stream=stream).event("é")
    assert raw.getvalue() == b'step=0/10 event="?"\n'


def test_none_is_silent_and_modes_are_checked():
    stream = Terminal()
    with ProgressLine(10, stream=stream, mode="none") as progress:
        progress.step(10, METRICS)
        progress.event("x")
    assert stream.getvalue() == ""
    with pytest.raises(ConfigError, match="logging.progress = 'fancy'.*auto, rich, plain, none"):
        ProgressLine(10, mode="fancy")


def test_a_dumb_terminal_is_a_pipe(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    ProgressLine(10, stream=stream).step(1, METRICS)
    assert stream.getvalue().startswith("step=1/10 ")


def test_the_time_left_survives_a_step_back():
    clock = Clock()
    progress = ProgressLine(100, stream=io.StringIO(), clock=clock)
    assert progress.seconds_left() is None
    for step in (10, 20):
        clock.now += 10
        progress.step(step, METRICS)
    assert progress.seconds_left() == 80
    clock.now += 1000
    progress.step(5, METRICS)
    assert progress.seconds_left() is None
    clock.now += 5
    progress.step(10, METRICS)
    assert progress.seconds_left() == 90


def test_output_piped_elsewhere_is_left_alone(capsys):
    before = sys.stdout
    with ProgressLine(10, stream=Terminal(), mode="rich"):
        assert sys.stdout is before
        print('{"json": 1}')
    assert capsys.readouterr().out == '{"json": 1}\n'
