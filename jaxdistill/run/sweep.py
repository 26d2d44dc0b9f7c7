"""A sweep: one configuration run at every combination of given values, one after the other."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxdistill import config as configs
from jaxdistill import errors, processes
from jaxdistill.config import Config, preflight, syntax, workflow
from jaxdistill.errors import ConfigError, DivergedError, UserError
from jaxdistill.evaluate import comparison
from jaxdistill.report import run_files, wording
from jaxdistill.report import sweep as pages
from jaxdistill.run import session, terminal
from jaxdistill.run.folder import RunDir
from jaxdistill.safe import json_file, lock, whole_file

SEED = "seed"  # runs that differ in nothing else are one row
MOST = 1000
_OWN = ("run", "run.dir", "run.name")
_LONGEST = 100  # characters of a run's folder


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its folder, such as "alpha=0.1,seed=2"; its number where names would
        be long, or two of them alike.
      values: key -> the value it has here.
      overrides: all that is changed in the configuration.
    """

    name: str
    values: Mapping[str, Any]
    overrides: tuple[str, ...]


def points_of(overrides: Sequence[str]) -> list[Point]:
    """Every combination of the values that overrides list, the last key the fastest.

    `key=a,b` is a key with two values, `key=a` one value for all, `key=[a, b]` one value that is a
    list.

    Args:
      overrides: such as "method.alpha=0.1,0.5" and "seed=1,2,3".

    Raises:
      ConfigError: for an override that is none, a key that is given twice, a value that stands
        twice, or too many runs.
    """
    fixed: list[str] = []
    axes: dict[str, list[Any]] = {}
    seen: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"sweep {override!r}: write it as key=value, or key=value,value")
        if key in seen:
            raise ConfigError(f"sweep {key}: is given twice: list all its values in one place")
        seen.add(key)
        if key in _OWN:
            raise ConfigError(f"sweep {key}: every run has its own below the sweep's: use -o DIR")
        values = syntax.parse(f"[{text}]")
        if values.faults or not isinstance(values.value, list) or len(values.value) < 2:
            fixed.append(override)
            continue
        if any(values.value.count(value) > 1 for value in values.value):
            raise ConfigError(f"sweep {override!r}: a value stands twice: leave one out")
        axes[key] = values.value
    if not axes:
        raise ConfigError("sweep: no key has several values: list them, such as seed=1,2,3")
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MOST:
        raise ConfigError(f"sweep: makes {count} runs, at most {MOST}: list fewer values")
    points = [_point(axes, chosen, fixed) for chosen in itertools.product(*axes.values())]
    names = {point.name for point in points}
    if len(names) == len(points) and max(map(len, names)) <= _LONGEST:
        return points
    return [
        dataclasses.replace(point, name=f"{number:0{len(str(count))}}")
        for number, point in enumerate(points)
    ]


def _point(axes: Mapping[str, list[Any]], chosen: Sequence[Any], fixed: Sequence[str]) -> Point:
    """The combination of the chosen values."""
    short = {key: key.rpartition(".")[2] for key in axes}
    if len(set(short.values())) < len(short):
        short = {key: key for key in axes}
    parts = []
    for key, value in zip(axes, chosen, strict=True):
        text = str(value)
        plain = isinstance(value, str | int | float) and re.fullmatch(r"[\w.+-]{1,30}", text)
        parts.append(f"{short[key]}={text if plain else axes[key].index(value)}")
    own = [f"{key}={json.dumps(value)}" for key, value in zip(axes, chosen, strict=True)]
    values = dict(zip(axes, chosen, strict=True))
    return Point(",".join(parts), values, (*fixed, *own))


def sweep(
    path: str | os.PathLike,
    overrides: Sequence[str],
    output: str | os.PathLike | None = None,
    *,
    run: Callable[..., Any] = session.train,
    resume: Callable[..., Any] = session.resume,
) -> dict[str, Any]:
    """Runs a configuration at every combination of values; called again, it resumes.

    A finished run is not run again, a run that was stopped resumes, one that diverges is noted, and
    the next one begins.

    Args:
      path: the configuration.
      overrides: as `points_of` reads them.
      output: folder of the sweep; default runs/sweep-NAME, of the name of the configuration.
      run: trains one configuration; `session.train`.
      resume: resumes one folder; `session.resume`.

    Returns:
      {dir, runs, rows}: the runs with values and status, and a row of means for each setting, with
      `spread`, the standard deviation over its seeds.

    Raises:
      ConfigError: if any of the runs cannot be run, before the first one; or for a folder that
        holds runs of other settings.
      DivergedError: at the end, naming the runs that did.
    """
    text, points = configs.read(path), points_of(overrides)
    if workflow.is_workflow(text):
        raise ConfigError(f"{path}: is a workflow: sweep the configuration of one of its steps")
    loaded = configs.loads(text, os.fspath(path), points[0].overrides)
    folder = pathlib.Path(output or f"runs/sweep-{loaded.run.name}")
    todo = [(point, _config(text, path, point, folder)) for point in points]
    _check(todo)
    folder.mkdir(parents=True, exist_ok=True)
    failed: list[UserError] = []
    with lock.held(folder):
        _write(folder, points)
        for number, (point, config) in enumerate(todo, 1):
            print(f"sweep: run {number} of {len(todo)}: {point.name}", file=sys.stderr, flush=True)
            try:
                _run(config, text, point, run, resume)
            except DivergedError as error:
                failed.append(DivergedError(f"{point.name}: {error}"))
                print(f"sweep: {failed[-1]}", file=sys.stderr, flush=True)
            finally:  # also of a run that was stopped
                _write(folder, points)
    try:
        terminal.say(f"report: {pages.write(folder)}", sys.stderr)
    except UserError as error:  # the runs are done all the same
        terminal.say(f"no report.html: {error}", sys.stderr)
    errors.check(failed)
    return _found(folder, points)


def _config(text: str, path: str | os.PathLike, point: Point, folder: pathlib.Path) -> Config:
    """The configuration of one run."""
    own = (f"run.dir={json.dumps(str(folder / point.name))}",)
    return configs.loads(text, os.fspath(path), (*point.overrides, *own))


def _check(todo: Sequence[tuple[Point, Config]]) -> None:
    """Refuses everything that can be told of the runs before the first one begins."""
    if processes.several(os.environ) or (todo[0][1].mesh.processes or 1) > 1:
        raise ConfigError(
            "sweep: runs one process: start `jaxdistill launch -- train` once for each setting"
        )
    for point, config in todo:
        here = pathlib.Path(config.run.dir)
        if (here / "RUN.json").exists():
            _same(here, config)
            continue
        try:
            errors.check(preflight.check(config))
        except UserError as error:
            raise type(error)(f"{point.name}: {error}") from error


def _same(folder: pathlib.Path, config: Config) -> None:
    """A run that is there is one of this sweep.

    Raises:
      ConfigError: naming the settings that differ.
    """
    RunDir.open(folder)
    there = dict(syntax.dotted(configs.load(folder / "config.resolved.yaml").settings()))
    ours = dict(syntax.dotted(config.settings()))
    apart = [key for key in ours.keys() | there.keys() if ours.get(key) != there.get(key)]
    if apart:
        raise ConfigError(
            f"{folder}: holds a run with other settings ({', '.join(sorted(apart)[:5])}): give "
            "the sweep another folder with -o DIR"
        )


def _run(
    config: Config, text: str, point: Point, run: Callable[..., Any], resume: Callable[..., Any]
) -> None:
    if (pathlib.Path(config.run.dir) / "RUN.json").exists():
        resume(config.run.dir)
    else:
        run(config, input_text=text, overrides=point.overrides)


def _write(folder: pathlib.Path, points: Sequence[Point]) -> None:
    """Notes in sweep.json how the runs stand and what came out of them."""
    text = json.dumps(_found(folder, points), indent=2, allow_nan=False)
    whole_file.write_text(folder / pages.FILE, text)


def _found(folder: pathlib.Path, points: Sequence[Point]) -> dict[str, Any]:
    runs = [_standing(folder, point) for point in points]
    return {"dir": os.fspath(folder), "runs": runs, "rows": list(_rows(folder, runs))}


def _standing(folder: pathlib.Path, point: Point) -> dict[str, Any]:
    """Name, values and status of a run."""
    file = folder / point.name / "RUN.json"
    status = json_file.read(file).get("status") if file.exists() else "not begun"
    return {"name": point.name, "values": dict(point.values), "status": status}


def _rows(folder: pathlib.Path, runs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The students after training, a row of means for all runs that differ in the seed alone."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        table = run_files.read_object(folder / run["name"] / "table.json", [])
        rows = map(run_files.as_object, run_files.as_list(table.get("rows")))
        after = [row for row in rows if row.get("name") == "student after"]
        if run["status"] != "done" or not after:
            continue
        named = {key: value for key, value in run["values"].items() if key != SEED}
        name = ", ".join(f"{key} = {json.dumps(value)}" for key, value in named.items())
        settings.setdefault(name or "all seeds", []).append(after[0])
    for name, rows in settings.items():
        known = [key for key in rows[0] if all(wording.is_number(row.get(key)) for row in rows)]
        yield comparison.together([{key: row[key] for key in known} for row in rows]) | {
            "name": name
        }
