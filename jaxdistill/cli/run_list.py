"""The runs below a folder: how each stands, what came out, and what sets them apart."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.config import syntax
from jaxdistill.errors import ConfigError
from jaxdistill.report import run_files

_DEPTH = 4  # folders below: runs of a workflow or a sweep lie in its own
_AFTER = "student after"
# What tells two runs apart without being a difference between them.
_OWN = ("run.name", "run.dir")


def found(folder: str) -> list[pathlib.Path]:
    """The folders of runs below a folder, or the folder itself, by name.

    Raises:
      ConfigError: there is no such folder.
    """
    top = pathlib.Path(folder)
    if not top.is_dir():
        raise ConfigError(f"{folder}: no such folder: give the one that holds runs")
    runs = []
    for place, below, files in os.walk(top):
        path = pathlib.Path(place)
        deep = len(path.relative_to(top).parts) >= _DEPTH
        if "RUN.json" in files or deep:
            runs += [path] if "RUN.json" in files else []
            below.clear()  # what lies in a run belongs to it
        below[:] = [name for name in sorted(below) if not name.startswith(".")]
    return sorted(runs)


def summary(run: pathlib.Path) -> dict[str, Any]:
    """One line on a run; what is damaged or missing is null."""
    info = run_files.read_object(run / "RUN.json", [])
    table = run_files.read_object(run / "table.json", [])
    rows = map(run_files.as_object, run_files.as_list(table.get("rows")))
    after = next((row for row in rows if row.get("name") == _AFTER), {})
    shape = {"status": str, "step": int, "total_steps": int, "method": str}
    known = run_files.fields(info, shape)
    numbers = run_files.fields(after, {"perplexity": (int, float), "kl_t1": (int, float)})
    names = (*shape, "perplexity", "kl_t1")
    return {"run": os.fspath(run), **{n: (known | numbers).get(n) for n in names}}


def differences(runs: Sequence[pathlib.Path]) -> dict[str, list[Any]]:
    """Dotted keys whose values differ between the runs' configurations, with a value for each."""
    configs = [dict(syntax.dotted(_config(run))) for run in runs]
    keys = sorted({key for config in configs for key in config} - set(_OWN))
    columns = {key: [config.get(key) for config in configs] for key in keys}
    return {
        key: values
        for key, values in columns.items()
        if any(value != values[0] for value in values)
    }


def _config(run: pathlib.Path) -> dict[str, Any]:
    try:
        text = (run / "config.resolved.yaml").read_text(encoding="utf-8")
        value = syntax.parse(text).value
    except (OSError, UnicodeError):
        return {}
    return value if isinstance(value, dict) else {}


def page(runs: Sequence[pathlib.Path], diff: bool) -> str:
    """The runs as a table for the terminal; with `diff`, a column for every key that differs."""
    head = ("run", "state", "step", "method", "perplexity", "KL to teacher")
    columns = [*zip(head, *(_cells(summary(run)) for run in runs), strict=True)]
    if diff:
        apart = differences(runs)
        columns += [(key, *map(_shown, values)) for key, values in apart.items()]
    widths = [max(map(len, column)) for column in columns]
    lines = (
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        for line in zip(*columns, strict=True)
    )
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    step = "-" if row["step"] is None else f"{row['step']}/{row['total_steps'] or '?'}"
    numbers = [row["perplexity"], row["kl_t1"]]
    shown = ["-" if number is None else f"{number:.4g}" for number in numbers]
    return (row["run"], row["status"] or "damaged", step, row["method"] or "-", *shown)


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
