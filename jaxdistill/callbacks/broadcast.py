"""Reports what a run does to all of its callbacks, and leaves out those that fail."""

import collections
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxdistill.callbacks.base import Callback, Ending, Start
from jaxdistill.safe.redact import redact

CONTROL = "control/"
_EVALUATION = "eval/"


class Broadcast:
    """The callbacks of one attempt of a run.

    Args:
      callbacks: by the names that reports and RUN.json give them.
      notice: called with the one sentence on a callback that failed.
    """

    def __init__(self, callbacks: Mapping[str, Callback], notice: Callable[[str], Any]):
        self._callbacks, self._notice = dict(callbacks), notice
        self._saved: collections.deque[tuple[int, pathlib.Path]] = collections.deque()
        self._table: Sequence[Mapping[str, Any]] = ()

    @contextlib.contextmanager
    def attempt(
        self, start: Callable[[Mapping[str, Any]], Start], kept: dict[str, Any]
    ) -> Iterator[None]:
        """Reports the start, and the end whichever it is.

        Args:
          start: what a callback kept -> what it is told.
          kept: name -> what that callback keeps; new entries are added to it.
        """
        for name in list(self._callbacks):
            told = start(kept.get(name, {}))
            answer = self._call(name, "start", told)
            if answer is not None and name not in kept:
                self._keep(name, answer, kept)
        try:
            yield
        except BaseException as error:
            status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            self._end(Ending(status, redact(str(error)) or type(error).__name__, self._table))
            raise
        self._end(Ending("done", None, self._table))

    def _keep(self, name: str, answer: Any, kept: dict[str, Any]) -> None:
        """Keeps what a callback wants kept, if that is an object of JSON."""
        try:
            if not isinstance(answer, Mapping):
                raise TypeError(f"{type(answer).__name__} is no mapping")
            own = json.loads(json.dumps(dict(answer), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            self._leave_out(name, "start", f"its answer cannot be kept: {error}")
        else:
            kept.update({name: own} if own else {})

    def listener(self, prefix: str = "") -> "CallbackListener":
        """What the writer of a training's numbers reports to; `prefix` begins every name."""
        return CallbackListener(self, prefix)

    def saved(self, step: int, path: pathlib.Path) -> None:
        """A checkpoint is complete; from any thread, passed on in the thread that trains."""
        if self._callbacks:
            self._saved.append((step, path))

    def measured(self, table: Sequence[Mapping[str, Any]]) -> None:
        """The rows that `end` reports."""
        self._table = table

    def all(self, method: str, *arguments: Any) -> None:
        """Calls a method of every callback, after the checkpoints that wait to be reported."""
        while self._saved:
            saved = self._saved.popleft()
            for name in list(self._callbacks):
                self._call(name, "checkpoint", *saved)
        for name in list(self._callbacks):
            self._call(name, method, *arguments)

    def _end(self, ending: Ending) -> None:
        self.all("end", ending)
        self._callbacks.clear()

    def _call(self, name: str, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._callbacks[name], method)(*arguments)
        except (Exception, SystemExit) as error:  # what a stranger's code raises ends no training
            self._leave_out(name, method, f"{type(error).__name__}: {error}")
            return None

    def _leave_out(self, name: str, method: str, reason: str) -> None:
        del self._callbacks[name]
        self._notice(
            f"callback {name} failed in {method}: {redact(reason)[:500]}; the run continues "
            "without it"
        )


class CallbackListener:
    """One training of a run, as its callbacks hear it."""

    def __init__(self, broadcast: Broadcast, prefix: str):
        self._broadcast, self._prefix = broadcast, prefix

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step or, where they are of held-out data, of an evaluation."""
        method = "record"
        if any(name.startswith(_EVALUATION) for name in values):
            method = "evaluation"
        named = {f"{self._prefix}{name}": value for name, value in values.items()}
        self._broadcast.all(method, step, named)

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """What was written after prompts."""
        self._broadcast.all("samples", step, rows)
