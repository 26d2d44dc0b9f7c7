"""The files a run leaves behind: metrics.jsonl, events.jsonl, TensorBoard events, samples."""

import contextlib
import json
import logging
import math
import numbers
import os
import pathlib
import re
import socket
import struct
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxdistill.errors import DataError, StorageError
from jaxdistill.redact import redacted
from jaxdistill.train import faults

# A link in a run directory, planted or stale, must not direct writes to a file elsewhere.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_logger = logging.getLogger("jaxdistill.report")


class MetricsWriter:
    """Appends what a run measures to its folder, and never stops the run for it.

    A record of `metrics.jsonl` is one JSON object on one line, `{"step", "time", ...scalars}`;
    a value that is not finite is written as null and its name is listed under "nonfinite". The
    same scalars go to `tensorboard/`. What cannot be written (the disk is full) is dropped,
    counted in `dropped`, and told once.

    Args:
      run_dir: the folder of the run; made when missing.
      tensorboard: whether to write TensorBoard event files too.
      resume_step: None for a run that begins, otherwise the number of the step the run goes on
        after: records of later steps, which will be computed again, are removed, so the file
        continues without gap or repeat. 0 restarts a run that had saved nothing.
      notice: called with the one warning; by default it is logged.
      clock: the source of "time", seconds since 1970.

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
    ):
        self.run_dir = pathlib.Path(run_dir)
        self.dropped = 0
        self._notice = notice or _logger.warning
        self._warned: set[str] = set()
        self._clock = clock
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            metrics = self.run_dir / "metrics.jsonl"
            if resume_step is None:
                _refuse_records(metrics)
            _cut(metrics, resume_step)
            _cut(self.run_dir / "events.jsonl", None)
            self._metrics = _Appender(metrics)
            self._events = _Appender(self.run_dir / "events.jsonl")
        except OSError as error:
            raise StorageError(
                f"{self.run_dir}: the metric files of the run cannot be opened: {error}; "
                "give a run directory that can be written to"
            ) from error
        self._board = None
        if tensorboard:
            with self._guard("tensorboard"):
                self._board = _Board(self.run_dir / "tensorboard", resume_step, self._clock())

    def write(self, step: int, scalars: Mapping[str, typing.Any]) -> None:
        """Appends one record: metric names to numbers (Python, numpy or jax scalars)."""
        record: dict[str, typing.Any] = {"step": int(step), "time": round(self._clock(), 3)}
        values = {name: _plain(name, value) for name, value in scalars.items()}
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        record.update({k: None if k in nonfinite else v for k, v in values.items()})
        if nonfinite:
            record["nonfinite"] = nonfinite
        with self._guard("metrics.jsonl"):
            self._metrics.append(_json_line(record))
        if self._board is not None:
            with self._guard("tensorboard"):
                self._board.write(int(step), values, record["time"])

    def rewind(self, step: int) -> None:
        """Removes the records after a step, which will be computed again; events stay."""
        metrics = self.run_dir / "metrics.jsonl"
        with self._guard("metrics.jsonl"):
            self._metrics.close()
            _cut(metrics, step)
            self._metrics = _Appender(metrics)
        if self._board is not None:
            with self._guard("tensorboard"):
                self._board.restart(step, self._clock())

    def event(self, kind: str, **fields: typing.Any) -> None:
        """Appends one line to events.jsonl: `{"time", "kind", ...fields}`."""
        with self._guard("events.jsonl"):
            self._events.append(_event_line(self._clock(), kind, fields))

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Writes what teacher and student say at a step, for people (.md) and the report (.jsonl).

        Args:
          step: the training step.
          rows: one mapping per prompt: "prompt", "teacher", "student", other names as wished.
        """
        stem = self.run_dir / "samples" / f"step_{step:06d}"
        with self._guard("samples"):
            stem.parent.mkdir(exist_ok=True)
            lines = [json.dumps(_json_safe({"step": step, **row})) + "\n" for row in rows]
            stem.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
            stem.with_suffix(".md").write_text(
                _samples_page(step, rows), encoding="utf-8", errors="replace"
            )

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
    """Takes what a MetricsWriter takes and keeps nothing: for all processes but one."""

    def __init__(self):
        self.dropped = 0

    def write(self, step: int, scalars: Mapping[str, typing.Any]) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def event(self, kind: str, **fields: typing.Any) -> None:
        """Nothing."""

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def append_event(run_dir: str | os.PathLike, kind: str, **fields: typing.Any) -> None:
    """Appends one line to the events.jsonl of a run that no MetricsWriter has open.

    Raises:
      OSError: it cannot be written.
    """
    path = pathlib.Path(run_dir) / "events.jsonl"
    _cut(path, None)
    file = _Appender(path)
    try:
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
      DataError: there is no such folder, or a line other than the last is not a record.
    """
    folder = pathlib.Path(run_dir)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run directory; `jaxdistill train` makes one")
    records, damaged = scan(folder / "metrics.jsonl")
    if damaged:
        raise DataError(
            f"{folder / 'metrics.jsonl'}:{damaged[0]}: not a JSON object; "
            "the file was damaged after it was written: remove that line"
        )
    return records


def scan(path: pathlib.Path) -> tuple[list[dict], list[int]]:
    """All records of a JSON-lines file, and the numbers of the lines that are damaged.

    A last line without its line end is still being written, which is no damage.
    """
    records, damaged = [], []
    if not path.exists():
        return records, damaged
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, start=1):
            record = _parse(line)
            if record is not None:
                records.append(record)
            elif line.endswith(b"\n") and line.strip():
                damaged.append(line_number)
    return records, damaged


def _parse(line: bytes) -> dict | None:
    """The record on a line, or None where there is no whole one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _cut(path: pathlib.Path, last_step: int | None) -> None:
    """Removes the torn last line of a file, and records after `last_step` when one is given."""
    if not os.path.lexists(path):
        return
    faults.point("metrics.cut")
    kept: list[bytes] = []
    dropped, apart = False, False
    with open(os.open(path, os.O_RDWR | _NOFOLLOW), "r+b") as file:
        for line in file:
            record = _parse(line)
            if record is None or (last_step is not None and not _until(record, last_step)):
                dropped = True
                continue
            apart = apart or dropped  # something to keep follows something that goes
            kept.append(line)
        if not apart:
            # Cutting the end off needs no space and cannot be interrupted half-way.
            file.truncate(sum(map(len, kept)))
            return
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _until(record: dict, last_step: int) -> bool:
    return isinstance(record.get("step"), int) and record["step"] <= last_step


def _refuse_records(path: pathlib.Path) -> None:
    records, _ = scan(path)
    if records:
        raise StorageError(
            f"{path}: holds {len(records)} records of another run, the last of step "
            f"{records[-1].get('step')}; resume that run or choose another run directory"
        )


class _Appender:
    """A file that grows by whole records, written at once without a buffer of its own."""

    def __init__(self, path: pathlib.Path):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NOFOLLOW, 0o644)
        self._end = os.fstat(self._file).st_size

    def append(self, record: bytes) -> None:
        faults.point("metrics.append")
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
                faults.point("metrics.appended")
        except OSError:
            # Half a record would spoil the next one: take it back, which needs no space.
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(record)

    def sync(self) -> None:
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class _Board:
    """TensorBoard events, of tensorboardX's messages, written at once by the calling thread.

    tensorboardX's own writers either hand events to a thread through a bounded process queue, and
    the next call waits for ever when that thread has died of a full disk, or keep a half-written
    record in a buffer, which spoils the file.
    """

    def __init__(self, folder: pathlib.Path, resume_step: int | None, wall_time: float):
        from tensorboardX.proto import event_pb2, summary_pb2

        # Any, because protobuf makes these modules' classes when they are imported.
        messages: typing.Any = event_pb2
        summaries: typing.Any = summary_pb2
        self._event, self._summary = messages.Event, summaries.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # Viewers read all files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(wall_time)}.{socket.gethostname()}"
        name += f".{len(list(folder.iterdir()))}.{os.getpid()}"
        self._file = _Appender(folder / name)
        self._append(file_version="brain.Event:2", wall_time=wall_time)
        self._start = messages.SessionLog(status=messages.SessionLog.START)
        if resume_step is not None:
            self.restart(resume_step, wall_time)

    def restart(self, step: int, wall_time: float) -> None:
        """Lets TensorBoard hide what was written of the steps after this one."""
        self._append(step=step + 1, session_log=self._start, wall_time=wall_time)

    def write(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        entries = [
            self._summary.Value(tag=name, simple_value=value) for name, value in values.items()
        ]
        self._append(step=step, wall_time=wall_time, summary=self._summary(value=entries))

    def _append(self, **fields: typing.Any) -> None:
        """One record: length, checksum of the length, message, checksum of the message."""
        from tensorboardX.record_writer import masked_crc32c

        message = self._event(**fields).SerializeToString()
        length = struct.pack("<Q", len(message))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, message)]
        self._file.append(length + sums[0] + message + sums[1])

    def close(self) -> None:
        self._file.close()


def _event_line(now: float, kind: str, fields: Mapping[str, typing.Any]) -> bytes:
    return _json_line(redacted(_json_safe({"time": round(now, 3), "kind": kind, **fields})))


def _json_line(record: dict) -> bytes:
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def _plain(name: str, value: typing.Any) -> int | float:
    """A scalar as the Python number it is."""
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name} must be one number, not {value!r}") from error


def _json_safe(value: typing.Any) -> typing.Any:
    """The value as JSON can hold it: null for numbers that are not finite, text for objects."""
    if isinstance(value, Mapping):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


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
