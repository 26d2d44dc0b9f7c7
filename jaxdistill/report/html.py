"""The page about one run or several: result, curves, samples, remarks, and how to reproduce it."""

import dataclasses
import datetime
import math
import os
import pathlib
import typing
from collections.abc import Mapping, Sequence

from jaxdistill.errors import DataError
from jaxdistill.report import curves, page, pictures, run_files, table, wording
from jaxdistill.report.run_files import RunFiles, as_list
from jaxdistill.safe.redact import redact

_MAX_EVENTS = 60


def build(
    run_dirs: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    first: Sequence[page.PageSection] = (),
) -> pathlib.Path:
    """Writes the report of a run, or the comparison of several, as one offline HTML file.

    Text that comes from a run (samples, configuration, names) is escaped. The same files give the
    same bytes. A run that is not finished, or lacks some files, gives a page that says what is
    missing.

    Args:
      run_dirs: one run directory or several.
      out: the file to write; by default `report.html` in the run directory, and for several runs
        `comparison.html` in the first.
      first: sections above all others.

    Returns:
      The path of the file.

    Raises:
      ConfigError: a folder is not a run directory.
      DataError: none is given.
      UserError: matplotlib is not installed (`pip install jaxdistill[report]`).
      StorageError: the file cannot be written.
    """
    folders = [run_dirs] if isinstance(run_dirs, str | os.PathLike) else list(run_dirs)
    if not folders:
        raise DataError("no run directory given; name at least one")
    pictures.require()
    runs = _distinct([run_files.load(folder) for folder in folders])
    default = "report.html" if len(runs) == 1 else "comparison.html"
    path = pathlib.Path(folders[0]) / default if out is None else pathlib.Path(out)
    return page.write(_page(runs, first), path)


def _page(runs: Sequence[RunFiles], above: Sequence[page.PageSection]) -> page.Page:
    alone = len(runs) == 1
    ledes = [
        (_lede(run), "" if alone else run.name, curves.colour(index))
        for index, run in enumerate(runs)
    ]
    return page.Page(
        over="Distillation report",
        title=runs[0].name if alone else f"{len(runs)} runs compared",
        status=_status(runs[0]) if alone else "",
        ledes=ledes,
        facts=_facts(runs[0]) if alone else [],
        sections=[
            *above,
            _result(runs),
            _training(runs),
            _samples(runs),
            _remarks(runs),
            _reproduce(runs),
        ],
        sources=[_as_of(run) for run in runs],
    )


def _heading(run: RunFiles, runs: Sequence[RunFiles]) -> list[page.Block]:
    """The name of a run, where there are several."""
    return [page.Text(run.name, "heading")] if len(runs) > 1 else []


def _distinct(runs: list[RunFiles]) -> list[RunFiles]:
    """Runs of the same folder name get a number, so that legends and tables distinguish them."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=f"{run.name} ({names[: i + 1].count(run.name)})")
        if names.count(run.name) > 1
        else run
        for i, run in enumerate(runs)
    ]


def _status(run: RunFiles) -> str:
    return str(run.info.get("status") or "")


def _step(run: RunFiles) -> int | None:
    return max((record["step"] for record in run.records), default=None)


def _total_steps(run: RunFiles) -> int | None:
    total = run.info.get("total_steps")
    return total if isinstance(total, int) else None


def _as_of(run: RunFiles) -> str:
    """What the page was made from, in a sentence that does not depend on when that was."""
    times = [r["time"] for r in run.records if wording.is_number(r.get("time"))]
    text = f"{run.name}: {len(run.records)} records"
    if times:
        when = datetime.datetime.fromtimestamp(max(times), datetime.UTC)
        text += f", the last of step {_step(run)} at {when:%Y-%m-%d %H:%M} UTC"
    return text


def _lede(run: RunFiles) -> str:
    if run.rows:
        return table.recovered(run.rows)
    step, total, status = _step(run), _total_steps(run), _status(run)
    where = f"step {step}" + (f" of {total}" if total else "")
    if step is None:
        return "Nothing has been recorded yet."
    verb = "is" if status in ("running", "") else "ended"
    return (
        f"The run {verb} at {where}. The comparison with teacher and SFT control is still missing."
    )


def _row(run: RunFiles, name: str) -> dict[str, typing.Any]:
    return next((row for row in run.rows if row["name"] == name), {})


def _parameters(run: RunFiles, role: str) -> int | float | None:
    """How many parameters a model has, from the comparison or from RUN.json."""
    row = _row(run, "teacher" if role == "teacher" else "student after")
    described = run.info.get(role)
    stated = described.get("parameters") if isinstance(described, dict) else None
    for value in (row.get("parameters"), stated):
        if wording.is_number(value) and value > 0:
            return value
    return None


def _source(run: RunFiles, role: str) -> str:
    described = run.info.get(role)
    source = described.get("source", "") if isinstance(described, dict) else described
    return wording.abbreviated(pathlib.PurePath(str(source or "")).name)


def _facts(run: RunFiles) -> list[tuple[str, str, str]]:
    """The header card: (label, value, remark), only what is known."""
    teacher, student = _parameters(run, "teacher"), _parameters(run, "student")
    before, after = _row(run, "student before"), _row(run, "student after")
    facts = []
    several = run.info.get("teachers")
    if isinstance(several, dict) and several:
        facts.append(("Teachers", str(len(several)), ", ".join(map(str, several))))
    if teacher:
        facts.append(("Teacher", wording.count(teacher), _source(run, "teacher")))
    if student:
        facts.append(("Student", wording.count(student), _source(run, "student")))
    if teacher and student:
        facts.append(("Compression", f"{wording.number(teacher / student, 3)}×", "parameters"))
    for field, label, write in (
        ("perplexity", "Perplexity", wording.number),
        ("kl_t1", "KL to the teacher", wording.number),
        ("agree_top1", "Top-1 agreement", wording.percent),
    ):
        if wording.is_number(after.get(field)):
            known = wording.is_number(before.get(field))
            remark = f"before: {write(before[field])}" if known else ""
            facts.append((label, write(after[field]), remark))
    step, total = _step(run), _total_steps(run)
    if step is not None:
        facts.append(("Steps", f"{step:,}", f"of {total:,}" if total else ""))
    seconds, how = _wall_time(run)
    if seconds is not None:
        facts.append(("Time", wording.duration(seconds), how))
    device = run.info.get("device")
    if device:
        mesh = run.info.get("mesh")
        facts.append(("Device", _phrase(device), f"mesh {_phrase(mesh)}" if mesh else ""))
    return facts


def _wall_time(run: RunFiles) -> tuple[int | float | None, str]:
    """The time of all attempts; one that was killed, or still runs, counts to its last record."""
    times = sorted(r["time"] for r in run.records if wording.is_number(r.get("time")))
    attempts = [a for a in as_list(run.info.get("attempts")) if isinstance(a, dict)]
    starts = [start for a in attempts if wording.is_number(start := a.get("started"))]
    if attempts and len(starts) == len(attempts):
        total = 0.0
        for attempt, start, after in zip(attempts, starts, [*starts[1:], math.inf], strict=True):
            end = attempt.get("ended")
            if not wording.is_number(end):
                end = max((time for time in times if start <= time <= after), default=start)
            total += max(end - start, 0)
        return total, f"{len(attempts)} attempts" if len(attempts) > 1 else ""
    if len(times) > 1:
        return times[-1] - times[0], "first record to last"
    return None, ""


def _phrase(value: typing.Any) -> str:
    """A small mapping or list as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_phrase(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_phrase(item) for item in value)
    return str(value)


def _result(runs: Sequence[RunFiles]) -> page.PageSection:
    """The comparison, one table for all runs; bars share their scale."""
    rows = [row for run in runs for row in run.rows]
    columns = table.columns(rows)
    lines, notes = [], []
    for index, run in enumerate(runs):
        if not run.rows:
            continue
        if len(runs) > 1:
            lines.append(page.TableRow(run.name, colour=curves.colour(index)))
        for row in table.ordered(run.rows):
            cells = [_cell(column, row, rows, run.rows) for column in columns]
            lines.append(page.TableRow(row["name"], cells, strong=row["name"] == "student after"))
        for name, own in table.by_teacher(run.rows).items():
            lines.append(page.TableRow(f"for teacher {name}"))
            for row in own:
                cells = [_cell(column, row, rows, own) for column in columns]
                lines.append(
                    page.TableRow(row["name"], cells, strong=row["name"] == "student after")
                )
        if run.held_out:
            about = f"{run.name}: " if len(runs) > 1 else ""
            notes.append(page.Text(f"{about}measured on {run.held_out}"))
    head = [(column.title, column.hint) for column in columns]
    return page.PageSection("Result", [page.Table(head, lines), *notes] if lines else [])


def _training(runs: Sequence[RunFiles]) -> page.PageSection:
    """The curves."""
    drawn = [
        page.Picture(
            panel.title,
            pictures.draw(panel, f"panel{index}"),
            [page.Key(line.label, line.colour, line.style, line.number) for line in panel.lines],
            panel.note,
        )
        for index, panel in enumerate(curves.panels(runs))
    ]
    note = page.Text(
        "Numbers in the legends are the last recorded values unless a note says otherwise. "
        "Thin lines are what was recorded, thick lines a running median."
    )
    return page.PageSection("Training", [page.Pictures(drawn), note] if drawn else [])


def _cell(
    column: table.Column, row: Mapping, rows: Sequence[Mapping], own: Sequence[Mapping]
) -> page.Cell:
    """A cell; best is the better one of the two ways to train this student, when both are known."""
    value = row.get(column.field)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return page.Cell(wording.MISSING)
    text = column.write(value)
    top = max((r[column.field] for r in rows if wording.is_number(r.get(column.field))), default=0)
    bar = 100 * value / top if column.better and wording.is_number(value) and top > 0 else None
    rivals = [
        r[column.field]
        for r in own
        if r["name"] in ("SFT control", "student after") and wording.is_number(r.get(column.field))
    ]
    best = False
    if len(rivals) == 2 and row["name"] in ("SFT control", "student after"):
        best = (column.better == "low" and value == min(rivals) != max(rivals)) or (
            column.better == "high" and value == max(rivals) != min(rivals)
        )
    return page.Cell(text, None if bar is None else round(max(bar, 0.0), 2), best)


def _samples(runs: Sequence[RunFiles]) -> page.PageSection:
    """What the models of every run say, teacher before student."""
    order = {"teacher": 0, "student before": 1, "SFT control": 2, "student": 3, "student after": 3}
    blocks: list[page.Block] = []
    for run in runs:
        if not (run.samples or run.samples_page):
            continue
        where = [run.name] if len(runs) > 1 else []
        where += [] if run.samples_step is None else [f"at step {run.samples_step}"]
        blocks += [page.Text(", ".join(where))] if where else []
        marks = run.marks or [[]] * len(run.samples)
        for sample, own in zip(run.samples, marks, strict=True):
            answers = [(name, text) for name, text in sample.items() if name != "prompt"]
            answers.sort(key=lambda answer: order.get(answer[0], 9))
            blocks.append(page.SamplePair(sample.get("prompt", ""), answers, own))
        blocks += [page.Text(run.samples_page, "code")] if run.samples_page else []
    return page.PageSection("Samples", blocks)


def _remarks(runs: Sequence[RunFiles]) -> page.PageSection:
    """What went wrong and was survived, and what is missing."""
    blocks: list[page.Block] = []
    for run in runs:
        incidents = _incidents(run)
        if incidents or run.missing:
            blocks += [*_heading(run, runs), page.Remarks(incidents, run.missing)]
    return page.PageSection("Remarks", blocks)


def _incidents(run: RunFiles) -> list[str]:
    """What went wrong and was survived."""
    lines = []
    skipped = curves.skipped_steps(run)
    if skipped:
        some = ", ".join(str(step) for step in skipped[:12])
        more = f" and {len(skipped) - 12} more" if len(skipped) > 12 else ""
        lines.append(f"{len(skipped)} step(s) skipped: {some}{more}.")
    for kind, what in (
        ("rerun", "row(s) of steps that were not finite were run again"),
        ("rollback", "rollback(s) to a checkpoint, with batches left out"),
        ("spike", "loss spike(s)"),
    ):
        at = [str(event.get("step")) for event in run.events if event.get("kind") == kind]
        if at:
            lines.append(f"{len(at)} {what}: at step {', '.join(at[:12])}.")
    if run.quarantined:
        lines.append(f"{run.quarantined:,} record(s) of the data set aside (quarantine/).")
    nonfinite = sum(1 for record in run.records if record.get("nonfinite"))
    if nonfinite:
        lines.append(f"{nonfinite} record(s) hold numbers that are not finite; curves break there.")
    attempts = as_list(run.info.get("attempts"))
    if len(attempts) > 1:
        lines.append(f"The run was resumed {len(attempts) - 1} time(s).")
    reason = run.info.get("exit_reason")
    if reason and _status(run) not in ("done", "running"):
        lines.append(f"It ended as {_status(run) or 'unknown'}: {reason}")
    return lines


def _reproduce(runs: Sequence[RunFiles]) -> page.PageSection:
    """Command, versions, fingerprints, configurations and events."""
    blocks: list[page.Block] = []
    for run in runs:
        blocks += _heading(run, runs)
        texts = dict(run.texts)
        if command := texts.pop("Command", ""):
            blocks.append(page.Text(command, "code"))
        blocks.append(page.Pairs(_identity(run)))
        blocks += [page.Text(text, "code", title) for title, text in texts.items()]
        if run.events:
            blocks.append(page.Log(f"Events ({len(run.events)})", _events(run)))
    return page.PageSection("Reproduce", blocks)


def _events(run: RunFiles) -> list[tuple[str, str, str]]:
    """The last events as (time, kind, the rest)."""
    lines = []
    for event in run.events[-_MAX_EVENTS:]:
        when = event.get("time")
        clock = (
            f"{datetime.datetime.fromtimestamp(when, datetime.UTC):%m-%d %H:%M:%S}"
            if wording.is_number(when) and 0 <= when < 4e9
            else ""
        )
        rest = {key: value for key, value in event.items() if key not in ("time", "kind")}
        lines.append((clock, str(event.get("kind", "")), redact(_phrase(rest))))
    return lines


def _identity(run: RunFiles) -> dict[str, dict[str, str]]:
    """The short facts that identify the run: code, versions, machine, fingerprints."""
    machine = {
        key: _phrase(run.info[key])
        for key in ("git_sha", "method", "device", "mesh", "seed", "schema")
        if run.info.get(key) not in (None, "")
    }
    versions = run.info.get("versions")
    return {
        "Run": machine,
        "Versions": {k: str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
        "Fingerprints": run.fingerprints,
    }
