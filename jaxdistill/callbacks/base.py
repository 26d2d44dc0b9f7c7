"""The callback protocol: what a run reports, and when."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Start:
    """A run that begins or resumes.

    Attributes:
      run_dir: its folder.
      name: `run.name` of the configuration.
      run_id: 32 hexadecimal digits, the same for every attempt of the run.
      config: the configuration with every default, keys and passwords redacted.
      step: the step it begins at; 0 for a new run.
      kept: what this callback's `start` returned in the first attempt; {} in that one.
    """

    run_dir: pathlib.Path
    name: str
    run_id: str
    config: Mapping[str, Any]
    step: int
    kept: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Ending:
    """How an attempt of a run ended.

    Attributes:
      status: "done", "stopped" (a signal, Ctrl-C) or "failed".
      reason: in words, redacted; None when done.
      table: the rows of the comparison measured so far, as in table.json.
    """

    status: str
    reason: str | None
    table: Sequence[Mapping[str, Any]]


class Callback:
    """Hears what a run does; a subclass overrides what it wants to hear.

    One process of the run calls it, in the thread that trains, so a slow callback slows the run.
    A callback that raises an Exception is reported and left out from there on; the run continues.
    A rollback trains steps again: their numbers are then reported a second time.

    >>> class Losses(Callback):
    ...     def __init__(self):
    ...         self.values = []
    ...
    ...     def record(self, step, values):
    ...         self.values.append((step, values["loss/total"]))
    >>> losses = Losses()
    >>> losses.record(1, {"loss/total": 2.5})
    >>> losses.values
    [(1, 2.5)]
    """

    def start(self, run: Start) -> Mapping[str, Any] | None:
        """A run begins or resumes; what is returned is kept as JSON and given back on resume."""

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a training step; names of the SFT control's begin with "control/"."""

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of an evaluation on held-out data; named as in `record`."""

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """What teacher and student write after the same prompts."""

    def checkpoint(self, step: int, path: pathlib.Path) -> None:
        """A checkpoint is complete on disk; reported at the next record or at the end."""

    def end(self, ending: Ending) -> None:
        """The attempt ended; nothing follows."""
