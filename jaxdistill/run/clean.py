"""What of a run's folder may go: what nothing reads any more, named and measured before it goes."""

import os
import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from jaxdistill.errors import StorageError
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
    found = []
    for path, why in _candidates(run):
        size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        found.append(Waste(path, why, size))
    return found


def remove(run: RunDir) -> list[Waste]:
    """Removes it, and returns what it was; nobody may be writing into the run.

    Raises:
      ConfigError: if a process holds the run.
      StorageError: if something cannot be removed.
    """
    with run.held():
        run.reread()
        gone = waste(run)
        for one in gone:
            try:
                drop(one.path)
            except OSError as error:
                raise StorageError(f"{one.path}: cannot be removed: {error.strerror}") from error
        if gone:
            run.event("cleaned", removed=[str(one.path.relative_to(run.path)) for one in gone])
    return gone


def drop(folder: pathlib.Path) -> None:
    """Removes a folder under another name: a half-removed checkpoint must not look like one."""
    going = folder.with_name(f".removing-{folder.name}")
    os.rename(folder, going)
    shutil.rmtree(going)


def _candidates(run: RunDir) -> Iterator[tuple[pathlib.Path, str]]:
    done = run.record["status"] == "done"
    for part in anew.PARTS:
        folder = run.path / anew.PARTS[part] / "checkpoints"
        if part == "control" and done and folder.is_dir():
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
        for pattern in (".saving-*", ".removing-*"):
            for path in sorted(folder.glob(pattern)):
                yield path, "left over by a process that was killed"
    if (run.path / anew.EARLIER).is_dir():
        yield run.path / anew.EARLIER, "what the run had before `--from-start`"
