"""A folder held by one process: the lock file names the holder, the system lets go of the dead."""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from jaxdistill.errors import ConfigError, StorageError

FILE = "LOCK"
_TRIES, _PAUSE = 10, 0.03  # seconds
# A link in a folder, planted or stale, must not direct writes to a file elsewhere; a pipe of that
# name must not make the open wait for ever.
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@contextlib.contextmanager
def held(
    folder: pathlib.Path, taken_over: Callable[[str], Any] = lambda dead: None
) -> Iterator[None]:
    """Holds a folder, so that no second process writes into it.

    The operating system lets go of the lock of a process that has died. Names of processes on other
    hosts are trusted as far as the file system carries locks between them.

    Args:
      folder: it exists.
      taken_over: called with the name of a dead holder that is still in the file.

    Raises:
      ConfigError: naming the process that holds it.
      StorageError: if the folder cannot be written.
    """
    path = folder / FILE
    try:
        lock = open(os.open(path, _FLAGS, 0o644), "r+", errors="replace")
    except OSError as error:
        raise cannot_write(path, error) from error
    with lock:
        if not _locked(lock):
            holder = _holder(lock) or "another process"
            raise ConfigError(
                f"{folder}: is being written by {holder}: wait until it ends, or stop it"
            )
        if not _is_at(lock, path):  # who held it before has removed it
            raise StorageError(f"{path}: was removed at this moment: try again")
        if dead := _holder(lock):
            taken_over(dead)
        own = {"pid": os.getpid(), "host": platform.node(), "started": round(time.time())}
        try:
            _rewrite(lock, json.dumps(own))
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the lock ends with the process anyway
                _rewrite(lock, "")


def _locked(lock: IO[str]) -> bool:
    """Whether the lock could be had; who only looked whether the folder is free lets go at once."""
    for last in (False,) * _TRIES + (True,):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if not last:
                time.sleep(_PAUSE)
    return False


def _is_at(lock: IO[str], path: pathlib.Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def cannot_write(path: pathlib.Path, error: OSError) -> StorageError:
    """The error for a place that cannot be written."""
    reason = error.strerror or str(error)
    return StorageError(f"{path}: cannot be written: {reason}: free space or mend the folder")


def _holder(lock: IO[str]) -> str:
    """Who wrote a lock file, or "" where it was let go; whatever else stands there, as text."""
    lock.seek(0)
    text = lock.read(1000).strip()
    try:
        owner = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["started"]))
        return f"process {owner['pid']} on {owner['host']}, since {since}"
    except (ValueError, TypeError, KeyError, OverflowError, OSError, RecursionError):
        return "".join(char if char.isprintable() else "?" for char in text)


def _rewrite(lock: IO[str], text: str) -> None:
    # Without a buffer, which would be written once more, and fail once more, when it is closed.
    os.ftruncate(lock.fileno(), 0)
    os.pwrite(lock.fileno(), text.encode(), 0)
