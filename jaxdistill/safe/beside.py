"""Folders that are filled beside their place; what killed processes left there is swept, told."""

import contextlib
import logging
import os
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.safe import lock

CONTENT, OLD = "content", "old"  # what is being made, and what it takes the place of
_RANDOM = re.compile("[0-9a-f]{12}")
_YOUNG_SECONDS = 60.0  # so long may a folder that is being made have no lock yet
_log = logging.getLogger("jaxdistill")


@contextlib.contextmanager
def folder(
    place: pathlib.Path, told: Callable[[str], Any] = _log.warning
) -> Iterator[pathlib.Path]:
    """An empty folder beside `place`, to be filled and moved there; gone afterwards, if it is not.

    Args:
      place: its parent exists.
      told: called with a sentence for every leftover that was removed.

    Raises:
      OSError: if it cannot be made.
    """
    sweep(place, told)
    made = place.with_name(f"{_prefix(place)}{uuid.uuid4().hex[:12]}")
    made.mkdir()
    try:
        with lock.held(made):
            inside = made / CONTENT
            inside.mkdir()
            yield inside
    finally:
        shutil.rmtree(made, ignore_errors=True)


def sweep(place: pathlib.Path, told: Callable[[str], Any] = _log.warning) -> None:
    """Removes what killed processes left beside a place; what a live one fills stays."""
    if not place.parent.is_dir():
        return
    for left in sorted(place.parent.iterdir()):
        if not _ours(left, place):
            continue
        with contextlib.suppress(OSError, UserError):  # its process lives, or it is not ours
            if not (left / lock.FILE).exists() and time.time() - _age(left) < _YOUNG_SECONDS:
                continue
            with lock.held(left):
                size = sum(path.stat().st_size for path in left.rglob("*") if path.is_file())
                shutil.rmtree(left)
            told(f"{left}: removed, {size} bytes that a killed process had left")


def _ours(left: pathlib.Path, place: pathlib.Path) -> bool:
    """Whether a folder is one that `folder` made: by its name, and by what is in it."""
    random = left.name.removeprefix(_prefix(place))
    named = left.name != random and _RANDOM.fullmatch(random)
    if not named or left.is_symlink() or not left.is_dir():
        return False
    return {path.name for path in left.iterdir()} <= {lock.FILE, CONTENT, OLD}


def _prefix(place: pathlib.Path) -> str:
    return f".{place.name}-"


def _age(path: pathlib.Path) -> float:
    return os.stat(path).st_mtime
