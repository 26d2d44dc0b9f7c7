"""The page of a workflow: its steps, the models side by side, pictures and samples, in one file."""

import dataclasses
import importlib.resources
import json
import os
import pathlib
import typing
from collections.abc import Mapping, Sequence

import jinja2
import markupsafe

from jaxdistill import whole_file
from jaxdistill.errors import DataError, StorageError, UserError
from jaxdistill.redact import redact
from jaxdistill.report import diagrams, html, pictures, table, wording

PAGE = "report.html"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture with its words and legend."""

    title: str
    svg: str
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """One comparison of the workflow.

    Attributes:
      name: of its step.
      held_out: what it was measured on.
      sentences: what it shows, in words.
      head: titles of the columns.
      lines: per model its name, its colour and its cells.
      figures: reliability, and quality against size and speed.
      samples: (prompt, [(name, text), ...]).
    """

    name: str
    held_out: str
    sentences: Sequence[str]
    head: Sequence[table.Column]
    lines: Sequence[tuple[str, str, Sequence[str]]]
    figures: Sequence[Figure]
    samples: Sequence[tuple[str, Sequence[tuple[str, str]]]]


def write_story(folder: str | os.PathLike, out: str | os.PathLike | None = None) -> pathlib.Path:
    """Writes the page about a workflow, finished or not, or a comparison, as one HTML file.

    The page loads nothing and runs no script; text that comes from models or files is escaped.

    Args:
      folder: of the workflow, or one that holds comparison.json.
      out: the file; default report.html in the folder.

    Raises:
      DataError: if the folder holds neither.
      UserError: if matplotlib is not installed.
      StorageError: if the file cannot be written.
    """
    place = pathlib.Path(folder)
    state = _json(place / "workflow.json")
    if not state and (place / "comparison.json").is_file():
        state = {"name": place.resolve().name, "steps": {".": {"kind": "compare"}}}
    if not isinstance(state.get("steps"), dict):
        raise DataError(
            f"{place}: holds no workflow and no comparison; `jaxdistill workflow FILE` or "
            "`jaxdistill compare ... -o DIR` makes one"
        )
    pictures.require()
    path = place / PAGE if out is None else pathlib.Path(out)
    try:
        whole_file.write_text(path, render(place, state))
    except OSError as error:
        raise StorageError(f"{path}: the page cannot be written: {error}") from error
    return path


def is_story(folder: str | os.PathLike) -> bool:
    """Whether a folder is that of a workflow or of a comparison, and not of a run."""
    names = ("workflow.json", "comparison.json")
    return any((pathlib.Path(folder) / name).is_file() for name in names)


def render(folder: pathlib.Path, state: Mapping[str, typing.Any]) -> str:
    """The page as text."""
    files = importlib.resources.files("jaxdistill.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = wording.visible
    template = environment.from_string(files.joinpath("story.html.jinja").read_text("utf-8"))
    steps = {name: state["steps"][name] for name in _order(state)}
    return template.render(
        style=markupsafe.Markup(html.palette() + files.joinpath("page.css").read_text("utf-8")),
        title=str(state.get("name") or folder.name),
        steps=[_step(name, step) for name, step in steps.items()],
        options=[
            (name, redact(json.dumps(step.get("options", {}), indent=1)))
            for name, step in steps.items()
        ],
        parts=[
            part
            for name, step in steps.items()
            if step.get("kind") == "compare" and (part := _part(folder, name, step))
        ],
        figures=_prunings(folder, steps),
        as_markup=markupsafe.Markup,
    )


def _order(state: Mapping[str, typing.Any]) -> list[str]:
    have = state["steps"]
    named = [name for name in state.get("order", []) if name in have]
    return named + [name for name in have if name not in named]


def _step(name: str, step: Mapping[str, typing.Any]) -> tuple[str, str, str, str, str]:
    """(name, kind, status, time, what came out)."""
    found = step.get("found") or {}
    words = []
    if found.get("parameters"):
        before, after = found["parameters"]
        words.append(f"{wording.count(after)} of {wording.count(before)} parameters")
        words.append(f"{len(found['layers'])} layers")
    if found.get("rows"):
        words.append(f"{found['rows']:,} rows, {found['tokens']:,} tokens")
    for rows in list((found.get("tables") or {}).values())[:1]:
        last = next((row for row in rows if row.get("name") == "student after"), {})
        if wording.is_number(last.get("perplexity")):
            words.append(f"held-out perplexity {wording.number(last['perplexity'])}")
    if found.get("scheme"):
        words.append(str(found["scheme"]))
    time = wording.duration(step.get("seconds"))
    return name, str(step.get("kind", "")), str(step.get("status", "")), time, ", ".join(words)


def _part(folder: pathlib.Path, name: str, step: Mapping[str, typing.Any]) -> Part | None:
    found = _json(folder / name / "comparison.json")
    rows = [row for row in found.get("rows", []) if isinstance(row, dict) and row.get("name")]
    if not rows:
        return None
    head = table.columns(rows)
    legend = [(str(row["name"]), diagrams.colour(i)) for i, row in enumerate(rows)]
    figures = []
    svg = diagrams.pareto(rows, f"{name}-pareto")
    if svg:
        note = "On the grey line: models that no other beats in both."
        figures.append(Figure("Quality against size and speed", svg, note, legend))
    svg = diagrams.reliability(rows, f"{name}-reliability")
    if svg:
        note = "On the diagonal a model is as often right as it is sure. Dots: share of tokens."
        figures.append(Figure("Reliability", svg, note, legend))
    samples = [
        (str(one.get("prompt", "")), [(str(n), str(t)) for n, t in one.items() if n != "prompt"])
        for one in found.get("samples", [])
    ]
    contrast = (step.get("options") or {}).get("contrast")
    return Part(
        name="side by side" if name == "." else name,
        held_out=str(found.get("held_out", "")),
        sentences=contrasted(rows, *contrast) if contrast else [],
        head=head,
        lines=[
            (str(row["name"]), colour, [table.written(row, column) for column in head])
            for row, (_, colour) in zip(rows, legend, strict=True)
        ],
        figures=figures,
        samples=samples,
    )


def contrasted(rows: Sequence[Mapping[str, typing.Any]], ours: str, theirs: str) -> list[str]:
    """By how much one model of the table is better or worse than another, a sentence a quantity.

    With several seeds a difference is called within their spread where it is smaller than the sum
    of the two standard deviations.
    """
    by_name = {row["name"]: row for row in rows}
    if ours not in by_name or theirs not in by_name:
        return []
    left, right = by_name[ours], by_name[theirs]
    made = []
    for field, words, write, better in (
        ("kl_t1", "KL to the teacher", wording.number, "low"),
        ("agree_top1", "top-1 agreement", wording.percent, "high"),
        ("acceptance", "expected acceptance as a draft", wording.percent, "high"),
        ("perplexity", "perplexity", wording.number, "low"),
    ):
        a, b = left.get(field), right.get(field)
        if not (wording.is_number(a) and wording.is_number(b)):
            continue
        gain = (b - a) if better == "low" else (a - b)
        side = "better" if gain > 0 else "worse" if gain < 0 else "the same"
        share = f" ({wording.percent(abs(a - b) / abs(b))})" if b and better == "low" else ""
        text = f"{words}: {ours} {write(a)}, {theirs} {write(b)}: {ours} is {side}"
        text += f" by {write(abs(gain))}{share}" if gain else ""
        spreads = [row.get("spread", {}).get(field) for row in (left, right)]
        if all(map(wording.is_number, spreads)) and abs(gain) < sum(spreads):
            text += ", within the spread of the seeds"
        made.append(f"{text}.")
    return made


def _prunings(folder: pathlib.Path, steps: Mapping[str, Mapping]) -> list[Figure]:
    """What layers are worth, for every importance step, with what the first pruning kept."""
    from jaxdistill.compress import importance as scores  # brings JAX, which other pages do without

    figures = []
    for name, step in steps.items():
        if step.get("kind") != "importance" or step.get("status") != "done":
            continue
        try:
            found = scores.load(folder / name / scores.FILE)
        except UserError:
            continue
        users = [
            (user, other["found"]["layers"])
            for user, other in steps.items()
            if other.get("kind") == "prune"
            and other.get("found")
            and f"${{{name}}}" in str(other.get("options", {}).get("importance"))
        ]
        for user, kept in users or [("", range(len(found.influence)))]:
            svg = diagrams.layers(found.influence, list(kept), f"{name}-{user}", found.loss)
            legend = [("stay", "blue"), ("left out", "orange")]
            title = f"What layers are worth ({name}{f', {user}' if user else ''})"
            note = f"{found.facts.get('rows')} rows of {found.facts.get('data', 'text')}."
            figures.append(Figure(title, svg, note, legend))
    return figures


def _json(path: pathlib.Path) -> dict[str, typing.Any]:
    """A JSON object, or {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
