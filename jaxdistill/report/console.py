"""The progress of a run: dense live rows on a terminal, one line per record in a pipe."""

import collections
import json
import math
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from jaxdistill.errors import ConfigError
from jaxdistill.report import wording

MODES = ("auto", "rich", "plain", "none")

# Metric -> (label, how to write the value): the labels of the live rows, in their order.
_LEARNING: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss/total": ("loss", wording.number),
    "loss/ce": ("ce", wording.number),
    "loss/divergence": ("div", wording.number),
    "loss/kl_t1": ("kl", wording.number),
    "loss/*": ("", wording.number),
    "agree/top1": ("agree", wording.percent),
    "agree/*": ("agree ", wording.percent),
    "knobs/*": ("", "{:.4g}".format),
    "optim/lr": ("lr", "{:.3g}".format),
    "optim/grad_norm": ("grad", wording.number),
    "optim/*": ("", wording.number),
    "teacher/entropy": ("teacher entropy", wording.number),
    "student/entropy": ("student entropy", wording.number),
    "teacher/*": ("teacher ", wording.number),
    "student/*": ("student ", wording.number),
}
_MACHINE: dict[str, tuple[str, Callable[[float], str]]] = {
    "perf/tokens_per_second": ("trained tok/s", wording.count),
    "perf/mfu": ("mfu", wording.percent),
    "perf/tflops_per_second": ("TFLOP/s", wording.number),
    "perf/teacher_share": ("teacher", wording.percent),
    "perf/data_share": ("data", wording.percent),
    "perf/checkpoint_share": ("ckpt", wording.percent),
    "perf/memory_gib": ("GiB", "{:.4g}".format),
    "data/epoch": ("epoch", "{:.4g}".format),
    "data/*": ("", "{:.4g}".format),
    "guard/skipped": ("skipped", "{:.0f}".format),
}


class ProgressLine:
    """Shows where a run is; use as a context manager, which gives a terminal back as it was.

    On a terminal the rows are redrawn in place; in a pipe every record is one line of
    `key=value` with the names of metrics.jsonl. A failure here (a closed pipe) does not stop the
    run.

    Args:
      total_steps: the step the run ends with.
      mode: "rich", "plain", "none", or "auto": rich on a terminal, plain elsewhere.
      stream: where to write.
      log_every: in plain mode, the steps between lines; the first and the last step, and those
        with an evaluation, are always printed.
      clock: seconds that never go back.

    Raises:
      ConfigError: an unknown mode.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        mode: str = "auto",
        stream: typing.Any = None,
        log_every: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        if mode not in MODES:
            raise ConfigError(f"logging.progress = {mode!r}: must be one of {', '.join(MODES)}")
        self._stream = sys.stderr if stream is None else stream
        self._total = total_steps
        self._log_every = max(1, log_every)
        self._clock = clock
        self._began = clock()
        self._step: int | None = None
        self._scalars: dict[str, float] = {}
        # Step and time of the last calls: the pace, and from it the time left.
        self._pace: collections.deque[tuple[int, float]] = collections.deque(maxlen=64)
        self._mode = _resolve(mode, self._stream)
        self._live = self._start_live() if self._mode == "rich" else None

    def step(self, step: int, scalars: Mapping[str, typing.Any]) -> None:
        """Takes the metrics of a step; evaluation metrics (`eval/...`) may come alone."""
        numbers = {name: float(value) for name, value in scalars.items() if value is not None}
        evaluation = {k: v for k, v in numbers.items() if k.startswith("eval/")}
        first = self._step is None
        training = {k: v for k, v in numbers.items() if k not in evaluation}
        if training or not evaluation:
            if self._pace and step < self._pace[-1][0]:
                self._pace.clear()  # the run went back to a checkpoint
            if not self._pace or step > self._pace[-1][0]:
                self._pace.append((step, self._clock()))
            self._step, self._scalars = step, training
        if self._mode == "plain":
            if first or evaluation or step % self._log_every == 0 or step >= self._total:
                self._print(self._record(step, numbers))
        elif self._mode == "rich" and evaluation:
            values = (f"{k.removeprefix('eval/')} {_value(k, v)}" for k, v in evaluation.items())
            self._print(Text(f"step {step}  held-out  " + "  ".join(values), style="cyan"))

    def event(self, text: str) -> None:
        """Shows a notice: a checkpoint was saved, a step was skipped, an evaluation begins."""
        notice = wording.clean(text)
        step = 0 if self._step is None else self._step
        if self._mode == "plain":
            self._print(f"step={step}/{self._total} event={json.dumps(notice, ensure_ascii=False)}")
        elif self._mode == "rich":
            self._print(Text(f"step {step}  {notice}", style="dim"))

    def close(self) -> None:
        """Leaves the last rows standing and gives the terminal back; may be called again."""
        live, self._live = self._live, None
        if live is not None:
            try:
                live.stop()
            except (OSError, ValueError):
                pass
        self._mode = "none"

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def seconds_left(self) -> float | None:
        """The time to the last step at the pace of the last calls, or None before there is one."""
        pace = tuple(self._pace)  # the drawing thread reads while the run writes
        if len(pace) < 2:
            return None
        (first, began), (last, ended) = pace[0], pace[-1]
        return max(self._total - last, 0) * (ended - began) / (last - first)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[typing.Any]:
        """The live rows: bar and times, what is learned, what the machine does."""
        step = self._step or 0
        bar = ProgressBar(total=max(self._total, 1), completed=step, width=24)
        facts = [f"step {step}/{self._total}", wording.percent(step / max(self._total, 1))]
        facts.append(f"{wording.duration(self._clock() - self._began)} so far")
        if self._step is None:
            facts.append("waiting for the first step (compiling)")
        left = self.seconds_left()
        if left is not None:
            facts.append(f"eta {wording.duration(left)}")
        separator = " | " if options.ascii_only else " │ "
        head = console.render_lines(bar, options.update(width=24), pad=False, new_lines=False)
        yield from head[0]
        yield Text(" " + separator.join(facts), style="bold", no_wrap=True, overflow="ellipsis")
        for table in (_LEARNING, _MACHINE):
            segments = list(_segments(self._scalars, table))
            yield from _flow(segments, separator, options.max_width)

    def _start_live(self) -> Live:
        console = Console(file=self._stream, force_terminal=True, highlight=False, emoji=False)
        live = Live(
            self,
            console=console,
            refresh_per_second=4,
            # Output that is piped elsewhere (`--json`) must not be drawn into the terminal.
            redirect_stdout=bool(getattr(sys.stdout, "isatty", lambda: False)()),
            redirect_stderr=self._stream is sys.stderr,
        )
        live.start()
        return live

    def _record(self, step: int, numbers: Mapping[str, float]) -> str:
        fields = [
            f"step={step}/{self._total}",
            f"done={wording.percent(step / max(self._total, 1))}",
        ]
        fields += [f"{_key(k)}={v:.5g}" for k, v in _ordered(numbers)]
        left = self.seconds_left()
        fields += [f"elapsed={wording.duration(self._clock() - self._began)}"]
        if left is not None:
            fields.append(f"eta={wording.duration(left)}")
        return " ".join(fields)

    def _print(self, line: str | Text) -> None:
        try:
            if self._live is not None:
                self._live.console.print(line)
            else:
                encoding = getattr(self._stream, "encoding", None) or "utf-8"
                text = str(line).encode(encoding, "replace").decode(encoding)
                self._stream.write(text + "\n")
                self._stream.flush()
        except (OSError, ValueError):
            # The reader of the pipe is gone; the run is not about it.
            self.close()


def _resolve(mode: str, stream: typing.Any) -> str:
    if mode != "auto":
        return mode
    try:
        terminal = bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        terminal = False
    return "rich" if terminal else "plain"


def _key(name: str) -> str:
    return wording.clean(name).replace(" ", "_").replace("=", "_")


def _value(name: str, value: float) -> str:
    return wording.percent(value) if "agree" in name else wording.number(value)


def _pick(
    name: str, table: Mapping[str, tuple[str, Callable[[float], str]]]
) -> tuple[str, Callable[[float], str]] | None:
    """The row of a metric: its own, or that of its group with the metric's last word."""
    if name in table:
        return table[name]
    group, _, word = name.partition("/")
    if f"{group}/*" in table:
        prefix, write = table[f"{group}/*"]
        return wording.clean(prefix + word), write
    return None


def _ordered(numbers: Mapping[str, float]) -> list[tuple[str, float]]:
    """The metrics in the order of the tables above; those in neither come last."""
    order = [*_LEARNING, *_MACHINE]

    def place(item: tuple[str, float]) -> int:
        name = item[0]
        group = name.partition("/")[0] + "/*"
        if name in order:
            return order.index(name)
        return order.index(group) if group in order else len(order)

    return sorted(numbers.items(), key=place)


def _segments(
    numbers: Mapping[str, float], table: Mapping[str, tuple[str, Callable[[float], str]]]
) -> Iterator[Text]:
    """One piece of text per metric the table knows, its value in bold."""
    for name, value in _ordered(numbers):
        row = _pick(name, table)
        if row is None or (name == "guard/skipped" and not value):
            continue
        label, write = row
        style = "bold" if math.isfinite(value) else "bold red"
        parts = [(f"{label} ", "dim"), (write(value), style)]
        if name in ("perf/tokens_per_second", "perf/tflops_per_second", "perf/memory_gib"):
            parts = [(write(value), style), (f" {label}", "dim")]
        yield Text.assemble(*parts)


def _flow(segments: list[Text], separator: str, width: int) -> Iterator[Text]:
    """The segments in as few rows as the width allows, never broken inside."""
    row, used = Text(), 0
    for segment in segments:
        if used and used + len(separator) + len(segment) > width:
            yield row
            row, used = Text(), 0
        if used:
            row.append(separator, style="dim")
        row.append_text(segment)
        used = len(row)
    if used:
        yield row
