"""SIGTERM, SIGHUP, Ctrl-C: one asks a run to stop with its state saved, a later one ends it.

One stop often comes as several signals: `timeout` sends one to the process and one to its group, a
service manager one to every process of a service, among them a launcher that passes its own on.
What comes within `SAME_SECONDS` of the first is the same request.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from jaxdistill.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_SECONDS = 3.0


class Stop:
    """Whether this process was asked to stop.

    Attributes:
      asked: the name of the signal, or None.
    """

    def __init__(self):
        self.asked: str | None = None
        self._deferred = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted: who trains looks at `asked` after every step.

        Raises:
          Preempted: at the end, if nobody acted on a signal that came inside.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.asked:
            raise Preempted(f"{self.asked}: training has ended and is saved")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if _repeated(number):
            return
        self.asked = signal.Signals(number).name
        if not self._deferred:
            raise Preempted(f"{self.asked}: no step was in flight")


_asked_at: float | None = None  # when this process was first asked, by whatever listener


def _repeated(number: int) -> bool:
    """Whether a signal belongs to the request before; one that does not ends the process."""
    global _asked_at
    now = time.monotonic()
    if _asked_at is None:
        _asked_at = now
        return False
    if now - _asked_at > SAME_SECONDS:
        # It is the operating system's, which asks nobody.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return True


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Takes over the signals of this process, and gives them back.

    In another thread than the main one, which has no signals, nobody is ever asked to stop. A
    process that is told to ignore SIGHUP, by `nohup`, goes on ignoring it.

    Raises:
      Preempted: at the first signal, unless it is deferred.
    """
    global _asked_at
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    outermost = not any(_ours(signal.getsignal(each)) for each in SIGNALS)
    if outermost:
        _asked_at = None
    mine = [one for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
    before = {each: _real(signal.signal(each, stop._handle)) for each in mine}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            # The rest of a stop that is under way must not end what cleans up after it.
            late = outermost and _asked_at is not None
            signal.signal(each, _Late(handler) if late else handler)


def end_quietly() -> None:
    """At the end of a process that was asked to stop and has done so: nothing can hurry it."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


class _Late:
    """Lets what is left of a stop pass by; then what was there before takes over."""

    def __init__(self, before: Any):
        self.before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _asked_at is None or time.monotonic() - _asked_at > SAME_SECONDS:
            signal.signal(number, self.before)
            os.kill(os.getpid(), number)


def _real(handler: Any) -> Any:
    """What was there before a stop, where its rest was still let pass by."""
    return handler.before if isinstance(handler, _Late) else handler


def _ours(handler: Any) -> bool:
    return isinstance(getattr(handler, "__self__", None), Stop)
