"""What of a run's folder may go: what nothing reads any more, named and measured before it goes."""

import pathlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from jaxdistill.run import anew
from jaxdistill.run.folder import RunDir
from jaxdistill.train import step_folders


@dataclass(frozen=True)
class Waste:
    """Something that may go.

    Attributes:
      path: a folder within the run's.
      why: what it is, in a few words.
      bytes: of all its files.
    """

    path: pathlib.Path
    why: str
    bytes: int


def waste(run: RunDir) -> list[Waste]:
    """All that may go: the run keeps its newest and its best checkpoint, and all its records."""
    left = []
    for path, why in _candidates(run):
        left.append(Waste(path, why, sum(map(_bytes, path.rglob("*")))))
    return left


def remove(run: RunDir) -> list[Waste]:
    """Removes it, and returns what it was; nobody may be writing into the run.

    Raises:
      ConfigError: if a process holds the run.
      StorageError: if something cannot be removed.
    """
    with run.held():
        run.reread()
        gone = waste(run)
        if any(one.path == _control(run) for one in gone):
            run.forget_saved("control")  # first: a run without it must not wait for its checkpoints
        for one in gone:
            step_folders.drop(one.path)
        if gone:
            run.event("cleaned", removed=[str(one.path.relative_to(run.path)) for one in gone])
    return gone


def _control(run: RunDir) -> pathlib.Path:
    return run.path / anew.PARTS["control"] / "checkpoints"


def _bytes(path: pathlib.Path) -> int:
    """Of a file; 0 of a folder, and of what has just gone."""
    try:
        state = path.lstat()
    except FileNotFoundError:
        return 0
    return 0 if stat.S_ISDIR(state.st_mode) else state.st_size


def _candidates(run: RunDir) -> Iterator[tuple[pathlib.Path, str]]:
    done = run.record["status"] == "done"
    for part in anew.PARTS:
        folder = run.path / anew.PARTS[part] / "checkpoints"
        if folder == _control(run) and done and folder.is_dir():
            yield folder, "checkpoints of the finished control"
            continue
        steps = step_folders.steps(folder)
        kept = {steps[-1] if steps else None, step_folders.best(folder)}
        for step in steps:
            if done and step not in kept:
                yield folder / str(step), "neither the newest nor the best checkpoint"
        for name, why in (
            (step_folders.BAD, "damaged checkpoints that were set aside"),
            (step_folders.ROLLED_BACK, "checkpoints that were rolled back"),
        ):
            if (folder / name).is_dir():
                yield folder / name, why
    places = [run.path / anew.PARTS[part] for part in anew.PARTS]
    if run.record["status"] != "running":  # else one may be on its way
        for place in [*places, *(place / "checkpoints" for place in places)]:
            for path in step_folders.leftovers(place):
                yield path, "left over by a process that was killed"
    if (run.path / anew.EARLIER).is_dir():
        yield run.path / anew.EARLIER, "what the run had before `--from-start`"
