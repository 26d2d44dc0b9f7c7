"""The page about a sweep: a row of means for each setting, then all runs beside each other."""

import os
import pathlib
import typing
from collections.abc import Mapping, Sequence

from jaxdistill.errors import DataError
from jaxdistill.report import curves, html, page, pictures, run_files, table

FILE = "sweep.json"
PAGE = "report.html"
MOST = 48  # runs that have a small picture each
CURVES = (
    ("Distance to the teacher, held-out", "eval/kl_t1"),
    ("Loss, held-out", "eval/loss"),
    ("Loss", "loss/total"),
)


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
    sweep = run_files.read_object(place / FILE, [])
    runs = [run_files.as_object(run) for run in run_files.as_list(sweep.get("runs"))]
    begun = [place / str(run.get("name")) for run in runs]
    begun = [run for run in begun if (run / "RUN.json").is_file()]
    if not begun:
        raise DataError(f"{place}: no run of this sweep has begun: `jaxdistill sweep` runs it")
    rows = [run_files.as_object(row) for row in run_files.as_list(sweep.get("rows"))]
    rows = [row for row in rows if isinstance(row.get("name"), str)]
    summary = _summary(rows, len(begun), len(runs))
    pictures.require()
    first = [summary, _multiples([run_files.load(run) for run in begun])]
    return html.build(begun, place / PAGE if out is None else out, first=first)


def _multiples(runs: Sequence[run_files.RunFiles]) -> page.PageSection:
    """A small picture for each run: its own curve in front of those of all others."""
    if not 1 < len(runs) <= MOST:
        return page.PageSection("Run by run", [])
    title, metric = next(
        (one for one in CURVES if all(len(curves.series(run.records, one[1])[0]) for run in runs)),
        CURVES[-1],
    )
    series = {run.name: curves.series(run.records, metric) for run in runs}
    end = max((int(steps[-1]) for steps, _ in series.values() if len(steps)), default=0)
    drawn = []
    for index, (name, (steps, values)) in enumerate(series.items()):
        if not len(steps):
            continue
        line = curves.Line(name, steps, values, "blue", "dots")
        others = [
            curves.Line(other, *points, "grey", "faint")
            for other, points in series.items()
            if other != name and len(points[0])
        ]
        svg = pictures.draw(
            curves.Panel(name, (curves.Chart((*others, line)),), end=end), f"multiple{index}"
        )
        drawn.append(page.Picture(name, svg, [page.Key(title, "blue", "dots", line.number)]))
    note = page.Text("Grey: all other runs of the sweep, on the same axes.")
    return page.PageSection("Run by run", [page.Pictures(drawn, small=True), note] if drawn else [])


def _summary(rows: Sequence[Mapping[str, typing.Any]], begun: int, count: int) -> page.PageSection:
    """Means over the seeds of each setting, with the standard deviation."""
    columns = table.columns(rows)
    lines = [
        page.TableRow(row["name"], [page.Cell(table.written(row, column)) for column in columns])
        for row in rows
    ]
    head = [(column.title, column.hint) for column in columns]
    note = f"{begun} of {count} runs have begun; students after training. Where several seeds are "
    note += "done: their mean ± their standard deviation."
    blocks: list[page.Block] = [page.Table(head, lines)] if lines else []
    return page.PageSection("Settings", [*blocks, page.Text(note)])
