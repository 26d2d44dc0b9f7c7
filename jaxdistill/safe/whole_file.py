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
