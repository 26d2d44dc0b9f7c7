"""The folder of a run's checkpoints: each appears, goes and is put aside in one move.

checkpoints/
  100/            a checkpoint: sealed by a manifest before it gets this name
  .saving-200     being written; left over where the process was killed
  .removing-50    no longer wanted, or left over
  bad/            checkpoints that turned out to be damaged: kept, and not used
  rolled_back/    checkpoints that somebody went back behind
"""

import contextlib
import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jaxdistill.errors import DamagedError, StorageError
from jaxdistill.safe import manifest
from jaxdistill.train.hooks import NO_HOOKS, Hooks

BAD = "bad"
ROLLED_BACK = "rolled_back"
_SAVING, _REMOVING = ".saving-", ".removing-"


@dataclasses.dataclass(frozen=True)
class Saved:
    """What the manifest of a checkpoint tells.

    Attributes:
      step: its step.
      time: when it was sealed, seconds since 1970.
      bytes: of all its files.
      meta: the JSON object that was saved with the state.
      metrics: of the evaluation at its step, where there was one; None for what is not finite.
      rank: larger is better; minus infinity for what cannot be compared.
    """

    step: int
    time: float
    bytes: int
    meta: Mapping[str, Any]
    metrics: Mapping[str, float | None] | None
    rank: float


def steps(directory: pathlib.Path) -> list[int]:
    """The steps of all checkpoints, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(one.name) for one in directory.iterdir() if one.name.isdecimal())


def read(directory: pathlib.Path, step: int) -> Saved:
    """What a checkpoint tells of itself.

    Raises:
      DamagedError: if its manifest is damaged.
    """
    content = manifest.read(directory / str(step))
    rank = content["rank"]
    return Saved(
        step=step,
        time=content["time"],
        bytes=sum(file["bytes"] for file in content["files"].values()),
        meta=content["meta"],
        metrics=content["metrics"],
        rank=-math.inf if rank is None else rank,
    )


def readable(directory: pathlib.Path) -> list[Saved]:
    """Every checkpoint whose manifest can be read, by ascending step."""
    numbers = []
    for step in steps(directory):
        with contextlib.suppress(DamagedError):
            numbers.append(read(directory, step))
    return numbers


def best(directory: pathlib.Path) -> int | None:
    """The step with the best finite metric, the newest of equals; None where there is none."""
    rank, step = max(((one.rank, one.step) for one in readable(directory)), default=(-math.inf, -1))
    return step if rank > -math.inf else None


def staging(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Where a checkpoint is written before it is one."""
    return directory / f"{_SAVING}{step}"


def commit(
    directory: pathlib.Path, step: int, facts: Mapping[str, Any], hooks: Hooks = NO_HOOKS
) -> None:
    """Seals what was staged and gives it its name; from then on it is there, also after a crash."""
    staged = staging(directory, step)
    hooks.at("checkpoint.seal")
    manifest.seal(staged, {"step": step, "time": round(time.time(), 3), **facts})
    hooks.at("checkpoint.commit")
    staged.rename(directory / str(step))
    manifest.sync(directory)
    hooks.at("checkpoint.committed")


def kept(all_saved: Iterable[Saved], latest: int, best: int) -> set[int]:
    """The steps that stay: the newest ones, and the best of those that can be compared."""
    ascending = sorted(all_saved, key=lambda one: one.step)
    ranked = sorted(
        (one for one in ascending if one.metrics is not None), key=lambda one: (one.rank, one.step)
    )
    chosen = ascending[-latest:] + (ranked[-best:] if best else [])
    return {one.step for one in chosen}


def retire(directory: pathlib.Path, keep: Collection[int], hooks: Hooks = NO_HOOKS) -> None:
    """Removes every readable checkpoint that is not to be kept; damaged ones are left."""
    for one in readable(directory):
        if one.step not in keep:
            # A name of its own first: a half-removed checkpoint must not look like one.
            going = directory / f"{_REMOVING}{one.step}"
            (directory / str(one.step)).rename(going)
            hooks.at("checkpoint.remove")
            shutil.rmtree(going, ignore_errors=True)


def leftovers(directory: pathlib.Path) -> list[pathlib.Path]:
    """What killed or failed saves and removals have left."""
    return [
        path for prefix in (_SAVING, _REMOVING) for path in sorted(directory.glob(f"{prefix}*"))
    ]


def sweep(directory: pathlib.Path) -> None:
    """Removes what killed or failed saves and removals have left."""
    for path in leftovers(directory):
        shutil.rmtree(path, ignore_errors=True)


def drop(path: pathlib.Path) -> None:
    """Removes a folder, or a link to one, under a name that says that it goes; gone is gone.

    Raises:
      StorageError: if it cannot be removed.
    """
    if not path.exists() and not path.is_symlink():
        return
    try:
        going = path
        if not path.name.startswith((_SAVING, _REMOVING)):
            going = path.with_name(f"{_REMOVING}{path.name}")
            if going.is_dir() and not going.is_symlink():
                shutil.rmtree(going)
            path.rename(going)
        if going.is_symlink() or not going.is_dir():
            going.unlink()
        else:
            shutil.rmtree(going)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed: {error.strerror or error}") from error


def set_aside(directory: pathlib.Path, step: int, where: str) -> pathlib.Path:
    """Moves a checkpoint to a folder beside, where nothing uses it and nothing is lost."""
    aside = directory / where
    aside.mkdir(exist_ok=True)
    place = aside / f"{step}-{time.time_ns()}"
    (directory / str(step)).rename(place)
    return place
