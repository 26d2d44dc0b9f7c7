"""The files a run leaves behind: metrics.jsonl, events.jsonl, TensorBoard events, samples."""

import contextlib
import json
import logging
import math
import numbers
import os
import pathlib
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxdistill.errors import ConfigError, DataError, StorageError
from jaxdistill.report import json_lines
from jaxdistill.report.board import Board
from jaxdistill.safe.redact import redacted
from jaxdistill.train.hooks import NO_HOOKS, Hooks

_logger = logging.getLogger("jaxdistill.report")


@typing.runtime_checkable
class Listener(typing.Protocol):
    """What a writer tells besides its files."""

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Is called with every record."""

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Is called with what was written after prompts."""


class MetricsWriter:
    """Appends what a run measures to its folder, and never stops the run for it.

    A record of `metrics.jsonl` is one JSON object on one line, `{"step", "time", ...scalars}`;
    a value that is not finite is written as null and its name is listed under "nonfinite". The
    same scalars go to `tensorboard/`. What cannot be written (the disk is full) is dropped,
    counted in `dropped`, and reported once.

    Args:
      run_dir: the folder of the run; created when missing.
      tensorboard: whether to write TensorBoard event files too.
      resume_step: None for a run that begins, otherwise the step that a resumed run has
        reached: records of later steps, which it computes again, are removed, so the file has no
        gap and no repeat. 0 restarts a run that had saved nothing.
      notice: called with the one warning; by default it is logged.
      clock: the source of "time", seconds since 1970.
      hooks: what the caller handed in.
      listener: is told of every record and of samples, after they are written.

    Raises:
      StorageError: the folder or a file cannot be opened, or a new run finds records of another.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        tensorboard: bool = True,
        resume_step: int | None = None,
        *,
        notice: Callable[[str], typing.Any] | None = None,
        clock: Callable[[], float] = time.time,
        hooks: Hooks = NO_HOOKS,
        listener: Listener | None = None,
    ):
        self.run_dir = pathlib.Path(run_dir)
        self.dropped = 0
        self._notice = notice or _logger.warning
        self._warned: set[str] = set()
        self._clock, self._hooks, self._listener = clock, hooks, listener
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            metrics = self.run_dir / "metrics.jsonl"
            if resume_step is None:
                _refuse_records(metrics)
            events = self.run_dir / "events.jsonl"
            left_out = {metrics: json_lines.cut(metrics, resume_step, hooks)}
            left_out[events] = json_lines.cut(events, None, hooks)
            self._metrics = json_lines.JsonLinesWriter(metrics, self._hooks)
            self._events = json_lines.JsonLinesWriter(events, hooks)
        except OSError as error:
            raise StorageError(
                f"{self.run_dir}: the metric files of the run cannot be opened: {error}; "
                "give a run directory that can be written to"
            ) from error
        self._board = None
        if tensorboard:
            with self._guard("tensorboard"):
                folder = self.run_dir / "tensorboard"
                self._board = Board(folder, resume_step, self._clock(), hooks)
        for path, lines in left_out.items():
            self._tell_damaged(path, lines)

    def write(self, step: int, scalars: Mapping[str, typing.Any]) -> None:
        """Appends one record: metric names to numbers (Python, numpy or jax scalars)."""
        record: dict[str, typing.Any] = {"step": int(step), "time": round(self._clock(), 3)}
        values = {name: _plain(name, value) for name, value in scalars.items()}
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        record.update({k: None if k in nonfinite else v for k, v in values.items()})
        if nonfinite:
            record["nonfinite"] = nonfinite
        with self._guard("metrics.jsonl"):
            self._metrics.append(json_lines.encoded(record))
        if self._board is not None:
            with self._guard("tensorboard"):
                self._board.write(int(step), values, record["time"])
        if self._listener is not None:
            self._listener.record(int(step), values)

    def rewind(self, step: int) -> None:
        """Removes the records after a step, which will be computed again; events stay."""
        metrics = self.run_dir / "metrics.jsonl"
        with self._guard("metrics.jsonl"):
            self._metrics.close()
            damaged = json_lines.cut(metrics, step, self._hooks)
            self._metrics = json_lines.JsonLinesWriter(metrics, self._hooks)
            self._tell_damaged(metrics, damaged)
        if self._board is not None:
            with self._guard("tensorboard"):
                self._board.restart(step, self._clock())

    def _tell_damaged(self, path: pathlib.Path, lines: Sequence[int]) -> None:
        if lines:
            self._notice(_damaged(path, lines))
            self.event("damaged_records", **_damage(path, lines))

    def event(self, kind: str, **fields: typing.Any) -> None:
        """Appends one line to events.jsonl: `{"time", "kind", ...fields}`."""
        with self._guard("events.jsonl"):
            self._events.append(_event_line(self._clock(), kind, fields))

    def samples(
        self,
        step: int,
        rows: Sequence[Mapping[str, str]],
        marks: Sequence[Sequence[tuple[str, float]]] = (),
    ) -> None:
        """Writes what teacher and student say at a step, for people (.md) and the report (.jsonl).

        Args:
          step: the training step.
          rows: one mapping per prompt: "prompt", "teacher", "student", other names as wished.
          marks: of each row the student's tokens, with log q - log p in nats; the report has them
            in colour. () where that is not known.
        """
        every = marks or [()] * len(rows)
        stem = self.run_dir / "samples" / f"step_{step:06d}"
        with self._guard("samples"):
            stem.parent.mkdir(exist_ok=True)
            whole = [
                {"step": step, **row, **({"marks": [*map(list, own)]} if own else {})}
                for row, own in zip(rows, every, strict=True)
            ]
            lines = [json.dumps(json_lines.safe(one)) + "\n" for one in whole]
            stem.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
            stem.with_suffix(".md").write_text(
                _samples_page(step, rows), encoding="utf-8", errors="replace"
            )
        if self._listener is not None:
            self._listener.samples(step, rows)

    def sync(self) -> None:
        """Forces both files to the disk: call it before a checkpoint that counts on them."""
        with self._guard("metrics.jsonl"):
            self._metrics.sync()
            self._events.sync()

    def close(self) -> None:
        """Writes what is buffered and closes the files; calling it again does nothing."""
        self.sync()
        self._metrics.close()
        self._events.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _guard(self, output: str) -> Iterator[None]:
        """Turns a failed write into a count and one warning."""
        try:
            yield
        except OSError as error:
            self.dropped += 1
            if output not in self._warned:
                self._warned.add(output)
                self._notice(
                    f"{output} cannot be written ({error}); training goes on, "
                    "records are dropped until it can"
                )


class SilentWriter(MetricsWriter):
    """Accepts what a MetricsWriter accepts and writes nothing: for all processes but one."""

    def __init__(self):
        self.dropped = 0

    def write(self, *_: typing.Any, **__: typing.Any) -> None:
        """Nothing."""

    rewind = event = samples = sync = close = write


def append_event(
    run_dir: str | os.PathLike, kind: str, hooks: Hooks = NO_HOOKS, **fields: typing.Any
) -> None:
    """Appends one line to the events.jsonl of a run that no MetricsWriter has open.

    Raises:
      OSError: it cannot be written.
    """
    path = pathlib.Path(run_dir) / "events.jsonl"
    damaged = json_lines.cut(path, None, hooks)
    file = json_lines.JsonLinesWriter(path, hooks)
    try:
        if damaged:
            print(_damaged(path, damaged), file=sys.stderr)
            told = _damage(path, damaged)
            file.append(_event_line(time.time(), "damaged_records", told))
        file.append(_event_line(time.time(), kind, fields))
    finally:
        file.close()


def read_metrics(run_dir: str | os.PathLike) -> list[dict]:
    """The records of a run's metrics.jsonl, also while the run is still writing it.

    Args:
      run_dir: the folder of the run.

    Returns:
      One dict per line, in order. A torn last line (the run was killed, or is writing just now)
      is left out; no file yet gives an empty list.

    Raises:
      ConfigError: there is no such folder.
      DataError: a line other than the last is not a record.
    """
    folder = pathlib.Path(run_dir)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run directory; `jaxdistill train` makes one")
    records, damaged = json_lines.scan(folder / "metrics.jsonl")
    if damaged:
        raise DataError(
            f"{folder / 'metrics.jsonl'}:{damaged[0]}: not a JSON object; "
            "the file was damaged after it was written: remove that line"
        )
    return records


def _refuse_records(path: pathlib.Path) -> None:
    records, _ = json_lines.scan(path)
    if records:
        raise StorageError(
            f"{path}: holds {len(records)} records of another run, the last of step "
            f"{records[-1].get('step')}; resume that run or choose another run directory"
        )


def _damaged(path: pathlib.Path, lines: Sequence[int]) -> str:
    """What is told about lines that were put aside."""
    where = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
    return (
        f"{path}: {len(lines)} damaged line(s) (line {where}) were put aside in "
        f"{json_lines.aside(path).name}; the other records stand"
    )


def _damage(path: pathlib.Path, lines: Sequence[int]) -> dict[str, typing.Any]:
    return {"file": path.name, "lines": list(lines[:100]), "aside": json_lines.aside(path).name}


def _event_line(now: float, kind: str, fields: Mapping[str, typing.Any]) -> bytes:
    record = {"time": round(now, 3), "kind": kind, **fields}
    return json_lines.encoded(redacted(json_lines.safe(record)))


def _plain(name: str, value: typing.Any) -> int | float:
    """A scalar as the Python number it is."""
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name} must be one number, not {value!r}") from error


def _samples_page(step: int, rows: Sequence[Mapping[str, str]]) -> str:
    """The samples as Markdown, each text in a fence longer than any fence inside it."""
    parts = [f"# Samples at step {step}\n"]
    for index, row in enumerate(rows, start=1):
        parts.append(f"## {index}\n")
        for name, text in row.items():
            longest = max((len(run) for run in re.findall("`+", str(text))), default=0)
            fence = "`" * max(3, longest + 1)
            parts.append(f"**{name}**\n\n{fence}text\n{text}\n{fence}\n")
    return "\n".join(parts)
