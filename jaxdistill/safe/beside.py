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
_GONE = ".gone"  # at the end of the name of what is being removed: nobody takes it over
_RANDOM = re.compile("[0-9a-f]{12}")
_YOUNG_SECONDS = 60.0  # so long may a folder that is being made have no lock yet
_log = logging.getLogger("jaxdistill")


@contextlib.contextmanager
def folder(
    place: pathlib.Path, told: Callable[[str], Any] = _log.warning, *, resumes: bool = False
) -> Iterator[pathlib.Path]:
    """A folder beside `place`, to be filled and moved there; gone afterwards, if it is not.

    Args:
      place: its parent exists.
      told: called with a sentence for every leftover that was removed.
      resumes: whether the folder may hold what a killed process had put into it, the newest of
        several; it then also stays where this process is asked to stop. Otherwise it is empty.

    Raises:
      OSError: if it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        made = _taken_over(place, stack) if resumes else None
        sweep(place, told, but=made)
        if made is None:
            made = _new(place, stack)
        stays = False
        try:
            yield made / CONTENT
        except (KeyboardInterrupt, SystemExit):
            stays = resumes
            raise
        finally:
            if not stays:
                _remove(made)


def _new(place: pathlib.Path, stack: contextlib.ExitStack) -> pathlib.Path:
    """An empty folder that this process holds.

    Raises:
      OSError: if it cannot be made.
    """
    while True:
        made = place.with_name(f"{_prefix(place)}{uuid.uuid4().hex[:12]}")
        made.mkdir()
        try:
            stack.enter_context(lock.held(made))
            (made / CONTENT).mkdir()
        except (OSError, UserError) as error:
            if isinstance(error, UserError) and not made.exists():
                continue  # it was taken for a leftover: this process had stood still for a minute
            shutil.rmtree(made, ignore_errors=True)  # the disk is full
            raise
        return made


def _taken_over(place: pathlib.Path, stack: contextlib.ExitStack) -> pathlib.Path | None:
    """The newest folder that a killed process was filling, now held by this one; or None."""
    for left in sorted(_left(place), key=_age, reverse=True):
        if left.name.endswith(_GONE):
            continue
        with contextlib.ExitStack() as mine, contextlib.suppress(OSError, UserError):
            mine.enter_context(lock.held(left))
            if (left / CONTENT).is_dir() and not (left / OLD).exists():
                stack.push(mine.pop_all())
                return left
    return None


def sweep(
    place: pathlib.Path,
    told: Callable[[str], Any] = _log.warning,
    but: pathlib.Path | None = None,
) -> None:
    """Removes what killed processes left beside a place, `but` one; what a live one fills stays."""
    for left in _left(place):
        if left == but:
            continue
        if left.name.endswith(_GONE):
            shutil.rmtree(left, ignore_errors=True)
            continue
        with contextlib.suppress(OSError, UserError):  # its process lives, or it is not ours
            with lock.held(left):
                size = sum(path.stat().st_size for path in left.rglob("*") if path.is_file())
                _remove(left)
            told(f"{left}: removed, {size} bytes that a killed process had left")


def _remove(made: pathlib.Path) -> None:
    """Removes a folder whose lock this process holds.

    First it loses its name, in one move: the lock goes with the rest, and who made it anew in what
    is half removed would be a second owner.
    """
    gone = made.with_name(made.name + _GONE)
    with contextlib.suppress(OSError):
        os.rename(made, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _left(place: pathlib.Path) -> list[pathlib.Path]:
    """The folders of ours beside a place, without those that are being made at this moment.

    Who makes one has locked it before there is content in it.
    """
    if not place.parent.is_dir():
        return []
    remains = []
    for left in sorted(place.parent.iterdir()):
        with contextlib.suppress(OSError):  # another process has just removed it
            young = time.time() - _age(left) < _YOUNG_SECONDS
            if _ours(left, place) and ((left / CONTENT).exists() or not young):
                remains.append(left)
    return remains


def _ours(left: pathlib.Path, place: pathlib.Path) -> bool:
    """Whether a folder is one that `folder` made: by its name, and by what is in it."""
    random = left.name.removeprefix(_prefix(place)).removesuffix(_GONE)
    named = left.name.startswith(_prefix(place)) and _RANDOM.fullmatch(random)
    if not named or left.is_symlink() or not left.is_dir():
        return False
    return {path.name for path in left.iterdir()} <= {lock.FILE, CONTENT, OLD}


def _prefix(place: pathlib.Path) -> str:
    return f".{place.name}-"


def _age(path: pathlib.Path) -> float:
    content = path / CONTENT
    return os.stat(content if content.is_dir() else path).st_mtime
