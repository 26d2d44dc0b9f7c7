"""TensorBoard event files that a kill or a full disk leaves whole."""

import os
import pathlib
import socket
import struct
import typing
from collections.abc import Mapping

from jaxdistill.report.json_lines import JsonLinesWriter
from jaxdistill.train.hooks import NO_HOOKS, Hooks


class Board:
    """TensorBoard events, of tensorboardX's messages, written at once by the calling thread.

    tensorboardX's own writers either hand events to a thread through a bounded process queue, and
    the next call waits for ever when that thread has died of a full disk, or keep a half-written
    record in a buffer, which spoils the file.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        resume_step: int | None,
        wall_time: float,
        hooks: Hooks = NO_HOOKS,
    ):
        from tensorboardX.proto import event_pb2, summary_pb2

        # Any, because protobuf makes these modules' classes when they are imported.
        messages: typing.Any = event_pb2
        summaries: typing.Any = summary_pb2
        self._event, self._summary = messages.Event, summaries.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # Viewers read all files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(wall_time)}.{socket.gethostname()}"
        name += f".{len(list(folder.iterdir()))}.{os.getpid()}"
        self._file = JsonLinesWriter(folder / name, hooks)
        self._append(file_version="brain.Event:2", wall_time=wall_time)
        self._start = messages.SessionLog(status=messages.SessionLog.START)
        if resume_step is not None:
            self.restart(resume_step, wall_time)

    def restart(self, step: int, wall_time: float) -> None:
        """Lets TensorBoard hide what was written of the steps after this one."""
        self._append(step=step + 1, session_log=self._start, wall_time=wall_time)

    def write(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        """Appends the scalars of a step."""
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
        """Closes the file; calling it again does nothing."""
        self._file.close()
