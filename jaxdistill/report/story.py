"""The page about a workflow or a comparison: models side by side, importance, steps."""

import json
import os
import pathlib
import typing
from collections.abc import Mapping, Sequence

from jaxdistill.errors import DataError, UserError
from jaxdistill.report import diagrams, page, pictures, run_files, table, wording
from jaxdistill.report.curves import colour
from jaxdistill.safe.redact import redact

PAGE = "report.html"


def write_story(folder: str | os.PathLike, out: str | os.PathLike | None = None) -> pathlib.Path:
    """Writes the page about a workflow, finished or not, or a comparison, as one HTML file.

    Args:
      folder: of the workflow, or one that holds comparison.json.
      out: the file; default report.html in the folder.

    Raises:
      DataError: if the folder holds neither.
      UserError: if matplotlib is not installed.
      StorageError: if the file cannot be written.
    """
    place = pathlib.Path(folder)
    state = run_files.read_object(place / "workflow.json", [])
    if not state and (place / "comparison.json").is_file():
        state = {"name": place.resolve().name, "steps": {".": {"kind": "compare"}}}
    if not isinstance(state.get("steps"), dict):
        raise DataError(
            f"{place}: holds no workflow and no comparison; `jaxdistill workflow FILE` or "
            "`jaxdistill compare ... -o DIR` makes one"
        )
    pictures.require()
    return page.write(_page(place, state), place / PAGE if out is None else pathlib.Path(out))


def is_story(folder: str | os.PathLike) -> bool:
    """Whether a folder is that of a workflow or of a comparison, and not of a run."""
    names = ("workflow.json", "comparison.json")
    return any((pathlib.Path(folder) / name).is_file() for name in names)


def _page(folder: pathlib.Path, state: Mapping[str, typing.Any]) -> page.Page:
    # What is not of its type, in a damaged file, is left out.
    steps = {name: run_files.fields(state["steps"][name], _STEP) for name in _order(state)}
    comparisons = {
        name: comparison
        for name, step in steps.items()
        if step.get("kind") == "compare"
        and (comparison := run_files.read_object(folder / name / "comparison.json", []))
        and _rows(comparison)
    }
    sections = [_comparison(name, comparison) for name, comparison in comparisons.items()]
    sections.append(page.PageSection("Importance", _prunings(folder, steps)))
    if len(steps) > 1 or not comparisons:
        sections.append(_steps(steps))
    contrasts = {name: _contrast(steps[name]) for name in comparisons}
    return page.Page(
        over="Workflow report",
        title=str(state.get("name") or folder.name),
        ledes=[
            (sentence, "", "")
            for name, names in contrasts.items()
            if names
            for sentence in contrasted(_rows(comparisons[name]), *names)
        ],
        sections=sections,
    )


_STEP = {"kind": str, "status": str, "seconds": (int, float), "options": dict, "found": dict}
_BAR = ("confidence", "accuracy", "share")


def _rows(comparison: Mapping[str, typing.Any]) -> list[dict[str, typing.Any]]:
    """The rows that have a name, without values of a wrong type."""
    rows = []
    for row in run_files.as_list(comparison.get("rows")):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            continue
        bars = run_files.as_list(row.get("reliability"))
        whole = all(run_files.are_shares(bar, _BAR) for bar in bars)
        rows.append(row | {"reliability": bars if whole else []})
    return rows


def _order(state: Mapping[str, typing.Any]) -> list[str]:
    have = state["steps"]
    order = [name for name in run_files.as_list(state.get("order")) if isinstance(name, str)]
    named = [name for name in dict.fromkeys(order) if name in have]
    return named + [name for name in have if name not in named]


def _steps(steps: Mapping[str, Mapping[str, typing.Any]]) -> page.PageSection:
    """How every step stands, and its options."""
    rows = []
    for name, step in steps.items():
        fields = (step.get("kind", ""), step.get("status", ""))
        cells = [*fields, wording.duration(step.get("seconds")), _outcome(step)]
        rows.append(page.TableRow(name, [page.Cell(str(cell)) for cell in cells]))
    options = [
        page.Text(redact(json.dumps(step.get("options", {}), indent=1)), "code", name)
        for name, step in steps.items()
    ]
    head = [(title, "") for title in ("kind", "status", "time", "result")]
    return page.PageSection("Steps", [page.Table(head, rows), *options])


def _outcome(step: Mapping[str, typing.Any]) -> str:
    """What came out of a step, in words."""
    result = step.get("found", {})
    facts = []
    counts = run_files.as_list(result.get("parameters"))
    if len(counts) == 2:
        before, after = counts
        facts.append(f"{wording.count(after)} of {wording.count(before)} parameters")
        facts.append(f"{len(_layers(step))} layers")
    if all(wording.is_number(result.get(name)) for name in ("rows", "tokens")):
        facts.append(f"{result['rows']:,} rows, {result['tokens']:,} tokens")
    for rows in list(run_files.as_object(result.get("tables")).values())[:1]:
        rows = [row for row in run_files.as_list(rows) if isinstance(row, dict)]
        last = next((row for row in rows if row.get("name") == "student after"), {})
        if wording.is_number(last.get("perplexity")):
            facts.append(f"held-out perplexity {wording.number(last['perplexity'])}")
    if result.get("scheme"):
        facts.append(str(result["scheme"]))
    return ", ".join(facts)


def _layers(step: Mapping[str, typing.Any]) -> list[int]:
    layers = run_files.as_list(step.get("found", {}).get("layers"))
    return [layer for layer in layers if isinstance(layer, int)]


def _contrast(step: Mapping[str, typing.Any]) -> list[str]:
    names = run_files.as_list(step.get("options", {}).get("contrast"))
    return names if len(names) == 2 and all(isinstance(name, str) for name in names) else []


def _comparison(name: str, comparison: Mapping[str, typing.Any]) -> page.PageSection:
    """The table of a comparison, its pictures and its samples."""
    rows = _rows(comparison)
    columns = table.columns(rows)
    lines = [
        page.TableRow(
            str(row["name"]),
            [page.Cell(table.written(row, column)) for column in columns],
            colour(index),
        )
        for index, row in enumerate(rows)
    ]
    drawn = (
        (
            "Quality against size and speed",
            diagrams.pareto(rows, f"{name}-pareto"),
            "Grey line: models that no other model beats in both.",
        ),
        (
            "Reliability",
            diagrams.reliability(rows, f"{name}-reliability"),
            "On the diagonal, accuracy equals confidence. Size of the dots: share of tokens.",
        ),
    )
    legend = [page.Key(line.name, line.colour) for line in lines]
    samples = [
        page.SamplePair(
            str(sample.get("prompt", "")),
            [(str(model), str(text)) for model, text in sample.items() if model != "prompt"],
        )
        for sample in run_files.as_list(comparison.get("samples"))
        if isinstance(sample, dict)
    ]
    return page.PageSection(
        "side by side" if name == "." else name,
        [
            page.Table([(column.title, column.hint) for column in columns], lines),
            page.Text(f"Measured on {comparison.get('held_out', '')}"),
            page.Pictures([page.Picture(t, svg, legend, note) for t, svg, note in drawn if svg]),
            *samples,
        ],
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
    sentences = []
    for field, quantity, write, better in (
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
        text = f"{quantity}: {ours} {write(a)}, {theirs} {write(b)}: {ours} is {side}"
        text += f" by {write(abs(gain))}{share}" if gain else ""
        spreads = [run_files.as_object(row.get("spread")).get(field) for row in (left, right)]
        known = [spread for spread in spreads if wording.is_number(spread)]
        if len(known) == 2 and abs(gain) < sum(known):
            text += ", within the spread of the seeds"
        sentences.append(f"{text}.")
    return sentences


def _prunings(folder: pathlib.Path, steps: Mapping[str, Mapping]) -> list[page.Block]:
    """Layer importance from every importance step, and which layers the prunings kept."""
    from jaxdistill.compress import importance  # imports JAX, which other pages do without

    drawn = []
    for name, step in steps.items():
        if step.get("kind") != "importance" or step.get("status") != "done":
            continue
        try:
            scores = importance.load(folder / name / importance.FILE)
        except UserError:
            continue
        users = [
            (user, _layers(other))
            for user, other in steps.items()
            if other.get("kind") == "prune"
            and other.get("found")
            and f"${{{name}}}" in str(other.get("options", {}).get("importance"))
        ]
        legend = [page.Key("kept", "blue"), page.Key("removed", "orange")]
        note = f"{scores.facts.get('rows')} rows of {scores.facts.get('data', 'text')}."
        for user, layers in users or [("", range(len(scores.influence)))]:
            svg = diagrams.layers(scores.influence, list(layers), f"{name}-{user}", scores.loss)
            title = f"Layer importance ({name}{f', {user}' if user else ''})"
            drawn.append(page.Picture(title, svg, legend, note))
    return [page.Pictures(drawn)] if drawn else []
