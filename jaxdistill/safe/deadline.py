"""Ends a call of somebody else's Python code in this process, where the main thread makes it."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

_AGAIN = 1.0  # seconds after which a call that caught what ended it is ended once more


class TooLate(BaseException):
    """The time is over; no Exception, so that `except Exception` of the code does not keep it."""


def possible() -> bool:
    """Whether `within` can end anything here: in the main thread alone, where signals arrive."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TooLate in the block where it takes longer, again and again until the block ends.

    By the alarm of the process: Python code, regular expressions, sleeping and reading end; a
    library that never looks at signals does not. A timer that was set is set again afterwards.

    Args:
      seconds: more than 0.

    Raises:
      TooLate: in the block.
    """
    assert possible(), "signals arrive in the main thread"
    armed = True

    def late(*_: Any) -> None:
        if armed:
            raise TooLate

    handler = signal.signal(signal.SIGALRM, late)
    began = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        try:
            yield
        finally:
            armed = False
    finally:
        # Two alarms are a second apart: one that came above cannot come here.
        if left:
            left = max(left - (time.monotonic() - began), 1e-3)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
