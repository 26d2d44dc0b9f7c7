"""Named points where a test may break a run; nothing happens unless an environment variable asks.

    JAXDISTILL_FAULT="checkpoint.seal:2:kill"    the second time a save is about to be sealed

A point is a call, `faults.point("checkpoint.seal")`, which without the variable returns at once.
"""

import errno
import os
import signal
import time
from collections.abc import Callable

VARIABLE = "JAXDISTILL_FAULT"

# Where a run can be broken: in the order in which a step comes by.
POINTS = (
    "step.before",  # the batch is there, the step is not dispatched
    "step.after",  # the step is dispatched, its numbers are not read
    "metrics.append",  # a record is about to be written
    "metrics.appended",  # it is written, and not yet forced to the disk
    "checkpoint.begin",  # the state is about to be copied to the host
    "checkpoint.copied",  # it is copied, and being written in the background
    "checkpoint.seal",  # all arrays are written, their checksums are not
    "checkpoint.commit",  # sealed, and not yet given its name
    "checkpoint.committed",  # named; older ones are not yet removed
    "checkpoint.remove",  # an older one has lost its name, its files are there
    "metrics.cut",  # a resumed run has not yet cut the records of lost steps off
    "eval.before",  # the step is known to be sound and not yet evaluated
)


def _full(name: str) -> None:
    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected at {name})")


ACTIONS: dict[str, Callable[[str], None]] = {
    "kill": lambda name: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda name: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda name: os.kill(os.getpid(), signal.SIGINT),
    "full": _full,
    "wait": lambda name: time.sleep(2.0),
}


class _Plan:
    """The fault that is asked for: a point, the how-manieth time it is reached, an action."""

    def __init__(self, text: str):
        name, _, rest = text.partition(":")
        count, _, action = rest.partition(":")
        if name not in POINTS or action not in ACTIONS or not count.isdecimal():
            raise ValueError(
                f"{VARIABLE} = {text!r}: must be POINT:N:ACTION, POINT one of {', '.join(POINTS)}, "
                f"ACTION one of {', '.join(ACTIONS)}"
            )
        self._name, self._left, self._action = name, int(count), ACTIONS[action]

    def __call__(self, name: str) -> None:
        assert name in POINTS
        if name == self._name:
            self._left -= 1
            if self._left == 0:
                self._action(name)


_plan: _Plan | None = None


def arm(text: str) -> None:
    """Asks for a fault as the environment variable would, in place of any other; "" for none.

    Raises:
      ValueError: if there is no such point or action.
    """
    global _plan
    _plan = _Plan(text) if text else None


def point(name: str) -> None:
    """Does what was asked for at this point, which is nothing as a rule."""
    if _plan is not None:
        _plan(name)


arm(os.environ.get(VARIABLE, ""))
