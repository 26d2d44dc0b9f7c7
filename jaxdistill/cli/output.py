"""What commands print."""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def narration() -> Iterator[logging.Logger]:
    """Writes what the library's loggers say to stderr; of several processes the first one speaks.

    Yields:
      the logger for what a command itself says.
    """
    logger = logging.getLogger("jaxdistill")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level, logger.propagate
    first = os.environ.get("JAX_PROCESS_ID", "0") == "0"
    logger.setLevel(logging.INFO if first else logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextlib.contextmanager
def surviving() -> Iterator[None]:
    """Lets standard output and error end (`| head`, a full disk, a lost terminal), told to nobody.

    For commands whose work is in files: what cannot be shown must not end it.
    """
    with (
        contextlib.redirect_stdout(_Surviving(sys.stdout)),
        contextlib.redirect_stderr(_Surviving(sys.stderr)),
    ):
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()


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
            # What is in its buffer goes nowhere, or closing it would fail once more.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def stdout_is_json(wanted: bool) -> Iterator[None]:
    """Sends what is printed inside to stderr, so that stdout holds only the result."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """Prints strict JSON: a number that is not finite becomes null."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    number = float(value)
    return number if math.isfinite(number) else None


def print_run(result: Any, as_json: bool) -> None:
    """Prints where a run is kept and what to do next, or all its numbers."""
    folder = os.fspath(result.run_dir)
    if as_json:
        return print_json({"run_dir": folder, "metrics": result.metrics, "table": result.table})
    print(f"run folder: {folder}")
    print(f"next: jaxdistill report {folder}; jaxdistill export {folder}@best -o DIR")
    return None


def printable(text: str) -> str:
    """Text without the control characters that could drive a terminal."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")
