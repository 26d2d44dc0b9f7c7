"""A run whose checkpoints are gone does not begin anew by itself: who wants that says so."""

import os
import pathlib
import time

from jaxdistill.errors import DamagedError, StorageError
from jaxdistill.run.folder import RunDir
from jaxdistill.train import step_folders

EARLIER = "earlier"  # in the run folder: what a run had before it was begun anew
_STAY = {"config.input.yaml", "config.resolved.yaml", "overrides.txt", "RUN.json", "LOCK"}
_STAY |= {"events.jsonl", "events.damaged.jsonl", EARLIER}
PARTS = {"student": "", "control": "control"}  # a training of the run -> its folder inside


def check(run: RunDir) -> None:
    """Refuses to go on where checkpoints have been written and none is there.

    Raises:
      DamagedError: saying what is missing, and the ways to go on.
    """
    for part in PARTS:
        check_part(run, part)


def check_part(run: RunDir, part: str) -> None:
    """`check` of one training of a run."""
    place = run.path / PARTS[part] / "checkpoints"
    if step_folders.steps(place):
        return
    saved = run.record.get("saved", {}).get(part)
    bad = _count(place / step_folders.BAD)
    if saved is None and not bad:
        return  # it was stopped before its first save
    first = "" if saved is None else f", though there were some from step {saved} on"
    damaged = f" ({bad} damaged ones are in {step_folders.BAD}/)" if bad else ""
    raise DamagedError(
        f"{place}: no checkpoint is there{first}{damaged}: training would begin again at step 0. "
        f"Restore the folder, or begin anew with `jaxdistill resume {run.path} --from-start`: what "
        f"the run has written so far is then kept in {run.path / EARLIER}"
    )


def begin(run: RunDir) -> pathlib.Path:
    """Puts aside all that a run has made, so that it begins anew; only its records of events stay.

    Killed on the way, the run still refuses to go on, and the next call completes it.

    Returns:
      where everything is kept.

    Raises:
      StorageError: if the folder cannot be written.
    """
    place = run.path / EARLIER / str(time.time_ns())
    try:
        place.mkdir(parents=True)
        (place / "RUN.json").write_bytes((run.path / "RUN.json").read_bytes())
        for path in sorted(run.path.iterdir()):
            if path.name not in _STAY:
                os.rename(path, place / path.name)
    except OSError as error:
        raise StorageError(f"{place}: cannot be written: {error}") from error
    run.forget()
    run.event("from_start", earlier=str(place))
    return place


def _count(folder: pathlib.Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
