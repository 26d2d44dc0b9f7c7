"""The commands about what a run has on disk: ckpt ls, verify and rollback, and clean."""

import argparse
import datetime
import pathlib
from typing import Any

from jaxdistill.cli.output import print_json
from jaxdistill.errors import ConfigError, DamagedError
from jaxdistill.safe import manifest
from jaxdistill.train import step_folders


def ls(arguments: argparse.Namespace) -> None:
    """Lists the checkpoints of a run, without reading their arrays."""
    directory = _directory(arguments.run_dir)
    best = step_folders.best(directory)
    rows = []
    for step in step_folders.steps(directory):
        row: dict[str, Any] = {"step": step, "best": step == best}
        try:
            one = step_folders.read(directory, step)
            row |= {"saved": one.time, "bytes": one.bytes, "metrics": one.metrics}
        except DamagedError as error:
            if step not in step_folders.steps(directory):
                continue  # a run that goes on has removed it
            row |= {"damaged": str(error)}
        rows.append(row)
    if arguments.json:
        return print_json(rows)
    for row in rows:
        print(_line(row))
    if not rows:
        print(f"{arguments.run_dir}: no checkpoints yet")
    return None


def _line(row: dict[str, Any]) -> str:
    if "damaged" in row:
        return f"{row['step']:>10}  damaged: {row['damaged']}"
    when = datetime.datetime.fromtimestamp(row["saved"]).isoformat(" ", "seconds")
    metrics = row["metrics"] or {}
    shown = ", ".join(f"{name} {value:.5g}" for name, value in metrics.items() if value is not None)
    best = "  best" if row["best"] else ""
    return f"{row['step']:>10}  {when}  {row['bytes'] / 1e6:10.1f} MB  {shown}{best}"


def verify(arguments: argparse.Namespace) -> None:
    """Reads every file of every checkpoint against its checksum."""
    directory = _directory(arguments.run_dir)
    rows, damaged = [], []
    for step in step_folders.steps(directory):
        try:
            manifest.verify(directory / str(step))
            rows.append({"step": step, "ok": True})
        except DamagedError as error:
            if step not in step_folders.steps(directory):
                continue  # a run that goes on has removed it
            damaged.append(str(error))
            rows.append({"step": step, "ok": False, "damaged": str(error)})
    if arguments.json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{row['step']:>10}  {'ok' if row['ok'] else row['damaged']}")
    if damaged:
        raise DamagedError(
            f"{arguments.run_dir}: {len(damaged)} of {len(rows)} checkpoints are damaged; "
            "`jaxdistill resume` puts them aside and goes on from the newest sound one"
        )


def rollback(arguments: argparse.Namespace) -> None:
    """Puts the checkpoints after a step aside, so that `resume` goes on from there."""
    directory = _directory(arguments.run_dir)
    steps = step_folders.steps(directory)
    if arguments.step not in steps:
        have = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"{directory}: no checkpoint of step {arguments.step}; there are: {have}")
    manifest.verify(directory / str(arguments.step))
    from jaxdistill.run.folder import RunDir

    run = RunDir.open(arguments.run_dir)
    later = [step for step in steps if step > arguments.step]
    with run.held():
        for step in later:
            step_folders.set_aside(directory, step, step_folders.ROLLED_BACK)
        run.event("rolled_back", to=arguments.step, steps=later)
        run.update(status="stopped", step=arguments.step)
    moved = ", ".join(map(str, later)) or "none: it is the newest"
    print(f"put aside: {moved}; next: jaxdistill resume {arguments.run_dir}")


def clean(arguments: argparse.Namespace) -> None:
    """Lists what of a run may go, and with --yes removes it."""
    from jaxdistill.run import clean as cleaning
    from jaxdistill.run.folder import RunDir

    run = RunDir.open(arguments.run_dir)
    removed = cleaning.remove(run) if arguments.yes else cleaning.waste(run)
    total = sum(one.bytes for one in removed)
    if arguments.json:
        rows = [{"path": str(one.path), "why": one.why, "bytes": one.bytes} for one in removed]
        return print_json({"removed": arguments.yes, "bytes": total, "entries": rows})
    for one in removed:
        print(f"{one.bytes / 1e6:10.1f} MB  {one.path}: {one.why}")
    if not removed:
        print(f"{arguments.run_dir}: nothing to remove")
    elif arguments.yes:
        print(f"removed {total / 1e6:.1f} MB")
    else:
        print(f"would remove {total / 1e6:.1f} MB; --yes removes it")
    return None


def _directory(run_dir: str) -> pathlib.Path:
    folder = pathlib.Path(run_dir)
    if not (folder / "RUN.json").is_file():
        raise ConfigError(f"{run_dir}: holds no run (no RUN.json): give a run folder")
    return folder / "checkpoints"
