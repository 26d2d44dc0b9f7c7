"""Standard streams that end: a reader that is gone, a full disk, a lost terminal, none at all."""

import contextlib
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any


def stand_in() -> None:
    """Opens what this process was started without (`>&-`), as if it were /dev/null.

    Otherwise the next file that is opened would have its number, and receive what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue  # its number is another file's by now
        os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8"))


@contextlib.contextmanager
def surviving(*names: str) -> Iterator[None]:
    """Lets standard streams (stdout, stderr) end, told to nobody.

    For commands whose work is in files, what cannot be shown must not end it; and what is told of
    an error must not become another one.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            redirect = {"stdout": contextlib.redirect_stdout, "stderr": contextlib.redirect_stderr}
            stream = getattr(sys, name)
            stack.enter_context(redirect[name](_Surviving(stream)))
        try:
            yield
        finally:
            for name in names:
                getattr(sys, name).flush()


class _Surviving:
    """A text stream that takes everything, also once the one behind it takes nothing more."""

    def __init__(self, stream: Any):
        self._stream, self._lost = stream, False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], Any]) -> None:
        if self._lost:
            return
        try:
            work()
        except UnicodeError:
            raise  # the fault of the text
        except (OSError, ValueError):
            self._lost = True
            to_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def to_nowhere(stream: Any) -> None:
    """What is in its buffer goes nowhere, or closing it at the end would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def settle() -> None:
    """Empties standard output; what cannot be shown any more is dropped."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        to_nowhere(sys.stdout)


def has_no_reader(stream: Any) -> bool:
    """Whether the other end of a pipe is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return True
