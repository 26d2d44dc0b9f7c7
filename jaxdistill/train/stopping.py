"""SIGTERM and Ctrl-C: the first asks a run to stop with its state saved, a second does not ask."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from jaxdistill.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
        # The next signal is the operating system's, which asks nobody.
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.asked = signal.Signals(number).name
        if not self._deferred:
            raise Preempted(f"{self.asked}: no step was in flight")


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Takes over the signals of this process, and gives them back.

    In another thread than the main one, which has no signals, nobody is ever asked to stop.

    Raises:
      Preempted: at the first signal, unless it is deferred.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {each: signal.signal(each, stop._handle) for each in _SIGNALS}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
