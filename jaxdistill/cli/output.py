"""What commands print."""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
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
        return print_json({"run_dir": folder, "metrics": result.metrics, "table": result.rows})
    print(f"run folder: {folder}")
    print(f"next: jaxdistill report {folder}; jaxdistill export {folder}@best -o DIR")
    return None


def printable(text: str) -> str:
    """Text without the control characters that could drive a terminal."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")
