"""Text files that appear whole or not at all."""

import contextlib
import os
import pathlib


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file in UTF-8 beside its place, forces it to the disk, and moves it there.

    Raises:
      OSError: if it cannot be written; what was there before is then still there.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def usual_mode(path: pathlib.Path) -> None:
    """Gives a file the mode that new files have here: some writers make theirs private."""
    probe = path.with_name(path.name + ".mode")
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        mode = os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        probe.unlink()
    os.chmod(path, mode)
