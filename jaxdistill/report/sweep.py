"""The page about a sweep: a row of means for each setting, then all runs beside each other."""

import os
import pathlib
import typing
from collections.abc import Mapping, Sequence

from jaxdistill.errors import DataError
from jaxdistill.report import html, page, run_files, table

FILE = "sweep.json"
PAGE = "report.html"


def is_sweep(folder: str | os.PathLike) -> bool:
    """Whether a folder is that of a sweep."""
    return (pathlib.Path(folder) / FILE).is_file()


def write(folder: str | os.PathLike, out: str | os.PathLike | None = None) -> pathlib.Path:
    """Writes the page about a sweep, finished or not, as one HTML file.

    Args:
      folder: of the sweep.
      out: the file; default report.html in the folder.

    Raises:
      DataError: if no run of it has begun.
      UserError: if matplotlib is not installed.
      StorageError: if the file cannot be written.
    """
    place = pathlib.Path(folder)
    found = run_files.read_object(place / FILE, [])
    runs = [run_files.as_object(run) for run in run_files.as_list(found.get("runs"))]
    begun = [place / str(run.get("name")) for run in runs]
    begun = [run for run in begun if (run / "RUN.json").is_file()]
    if not begun:
        raise DataError(f"{place}: no run of this sweep has begun: `jaxdistill sweep` runs it")
    rows = [run_files.as_object(row) for row in run_files.as_list(found.get("rows"))]
    rows = [row for row in rows if isinstance(row.get("name"), str)]
    summary = _summary(rows, len(begun), len(runs))
    return html.build(begun, place / PAGE if out is None else out, first=summary)


def _summary(rows: Sequence[Mapping[str, typing.Any]], begun: int, count: int) -> page.Section:
    """Means over the seeds of each setting, with the standard deviation."""
    columns = table.columns(rows)
    lines = [
        page.Row(row["name"], [page.Cell(table.written(row, column)) for column in columns])
        for row in rows
    ]
    head = [(column.title, column.hint) for column in columns]
    note = f"{begun} of {count} runs have begun; students after training. Where several seeds are "
    note += "done: their mean ± their standard deviation."
    blocks: list[page.Block] = [page.Table(head, lines)] if lines else []
    return page.Section("Settings", [*blocks, page.Text(note)])
