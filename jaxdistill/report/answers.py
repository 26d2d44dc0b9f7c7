"""The page about accuracy on tasks: by votes, by rationales, right and wrong side by side."""

import os
import pathlib
import re
import typing
from collections.abc import Mapping, Sequence

from jaxdistill.errors import DataError
from jaxdistill.report import page, pictures, run_files, wording
from jaxdistill.report.curves import colour
from jaxdistill.report.pictures import PALETTE, dress, render
from jaxdistill.safe import json_file

PAGE = "answers.html"
SAMPLES = 3  # questions answered right, and as many answered wrong
_SHARE = ("value", "low", "high")
_ROW = {"gold": str, "text": str, "question": str}
NamedAnswers = tuple[str, Mapping[str, typing.Any]]  # name, and the numbers of one task


def write_answers(
    folders: Sequence[str | os.PathLike], out: str | os.PathLike | None = None
) -> pathlib.Path:
    """Writes the page about the answers of one or several models, as one offline HTML file.

    Args:
      folders: from `jaxdistill eval --tasks`, one per model; a name that ends in _N is taken for a
        student of N rationales per question.
      out: the file; default answers.html in the first folder.

    Raises:
      DataError: if a folder holds no such numbers.
      UserError: if matplotlib is not installed.
      StorageError: if the file cannot be written.
    """
    pictures.require()
    places = [pathlib.Path(folder) for folder in folders]
    results = {place: _numbers(place) for place in places}
    tasks = list(dict.fromkeys(task for numbers in results.values() for task in numbers))
    answers = page.Page(
        over="Task report",
        title="Answers: " + ", ".join(place.resolve().name for place in places),
        sections=[_section(task, number, results) for number, task in enumerate(tasks)],
    )
    return page.write(answers, places[0] / PAGE if out is None else pathlib.Path(out))


def _numbers(place: pathlib.Path) -> dict[str, typing.Any]:
    try:
        value = json_file.read(place / "tasks.json")
        return {task: _whole(row) for task, row in value.items()}
    except ValueError as error:
        raise DataError(
            f"{place / 'tasks.json'}: cannot be shown: {error}: `jaxdistill eval MODEL --tasks ... "
            "-o DIR` writes one"
        ) from error


def _whole(row: typing.Any) -> dict[str, typing.Any]:
    """The numbers of one task; what is not of its type, in a damaged file, is left out.

    Raises:
      ValueError: if the share of right greedy answers is not there, or a share is beyond 0 to 1.
    """
    json_file.check(row, {"greedy": dict})
    fields = run_files.fields(row, {"greedy": dict, "questions": int})
    if not 0 <= fields.get("questions", 0):
        raise ValueError(f"its field 'questions' is {fields['questions']}: must be 0 or more")
    json_file.check_shares(row["greedy"], _SHARE)
    if isinstance(row.get("unparsable"), dict):
        json_file.check_shares(row["unparsable"], _SHARE)
        fields["unparsable"] = row["unparsable"]
    for name in ("maj_at", "pass_at"):
        shares = run_files.fields(row, {name: dict}).get(name, {})
        if all(k.isdecimal() and isinstance(share, dict) for k, share in shares.items()):
            for share in shares.values():
                json_file.check_shares(share, _SHARE)
            fields[name] = shares
    return fields


def _section(task: str, number: int, results: Mapping[pathlib.Path, Mapping]) -> page.PageSection:
    """One task: its table, curves and samples."""
    models = [(place.resolve().name, rows[task]) for place, rows in results.items() if task in rows]
    head = [
        ("greedy", "higher is better"),
        ("unparsable", "lower is better"),
        ("vote of all samples", "higher is better"),
        ("one sample is right", "higher is better"),
    ]
    lines = [
        page.TableRow(name, [page.Cell(_interval(share)) for share in _shares(row)], colour(index))
        for index, (name, row) in enumerate(models)
    ]
    legend = [page.Key(line.name, line.colour) for line in lines]
    ways = [page.Key("greedy", colour(0)), page.Key("vote of all samples", colour(1))]
    drawn = [
        ("Accuracy by votes", _by_votes(models, f"votes{number}"), legend),
        ("Accuracy by rationales", _by_rationales(models, f"rationales{number}"), ways),
    ]
    note = "Bars are 95 % intervals over questions."
    questions = models[0][1].get("questions", 0)
    return page.PageSection(
        task,
        [
            page.Table(head, lines),
            page.Text(f"Measured on {questions} questions; brackets are 95 % intervals"),
            page.Pictures([page.Picture(t, svg, keys, note) for t, svg, keys in drawn if svg]),
            *_samples(next(iter(results)), task),
        ],
    )


def _shares(row: Mapping[str, typing.Any]) -> list[Mapping | None]:
    last = lambda name: list(row[name].values())[-1] if row.get(name) else None
    return [row["greedy"], row.get("unparsable"), last("maj_at"), last("pass_at")]


def _interval(share: Mapping[str, float] | None) -> str:
    if share is None:
        return "-"
    ends = [wording.percent(share[end]) for end in ("value", "low", "high")]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


Points = list[tuple[float, Mapping[str, float]]]


def _by_votes(models: Sequence[NamedAnswers], name: str) -> str | None:
    """maj@k against k for every model."""
    lines: list[tuple[int, Points, str]] = []
    for index, (_, row) in enumerate(models):
        points = [(float(k), share) for k, share in (row.get("maj_at") or {}).items()]
        lines += [(index, points, "-")] if len(points) > 1 else []
    return _curve(lines, "votes k", name) if lines else None


def _by_rationales(models: Sequence[NamedAnswers], name: str) -> str | None:
    """Accuracy against the number of rationales that a student read, greedy and by vote."""
    numbered = [
        (float(match.group(1)), row)
        for model, row in models
        if (match := re.search(r"_(\d{1,6})$", model))
    ]
    if len(numbered) < 2:
        return None
    numbered.sort(key=lambda pair: pair[0])
    lines: list[tuple[int, Points, str]] = [(0, [(n, row["greedy"]) for n, row in numbered], "-")]
    if all(row.get("maj_at") for _, row in numbered):
        voted = [(n, list(row["maj_at"].values())[-1]) for n, row in numbered]
        lines.append((1, voted, "--"))
    return _curve(lines, "rationales per question", name)


def _curve(lines: Sequence[tuple[int, Points, str]], label: str, name: str) -> str:
    def paint(figure: typing.Any) -> None:
        axis = figure.subplots()
        for index, points, style in lines:
            shade = PALETTE[colour(index)][0]
            x = [place for place, _ in points]
            y = [100 * share["value"] for _, share in points]
            low = [value - 100 * share["low"] for value, (_, share) in zip(y, points, strict=True)]
            high = [
                100 * share["high"] - value for value, (_, share) in zip(y, points, strict=True)
            ]
            bars = [[max(0.0, v) for v in low], [max(0.0, v) for v in high]]
            axis.errorbar(
                x, y, yerr=bars, color=shade, linestyle=style, linewidth=1.4, elinewidth=0.8,
                marker="o", markersize=3.5,
            )  # fmt: skip
        axis.set_xscale("log")
        ticks = sorted({place for _, points, _ in lines for place, _ in points})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        dress(axis, "both", "right, %", label)

    return render(paint, name, (5.4, 3.0))


def _samples(place: pathlib.Path, task: str) -> list[page.SamplePair]:
    """Questions with right and wrong reasoning of the first model side by side."""
    name = "".join(letter if letter.isalnum() else "_" for letter in task)
    try:
        text = (place / f"answers_{name}.jsonl").read_text(encoding="utf-8")
        rows = [json_file.parse(line) for line in text.split("\n") if line.strip()]
        for row in rows:
            json_file.check(row, _ROW)
    except (OSError, ValueError):
        return []
    samples = []
    for correct, verdict in ((True, "right"), (False, "wrong")):
        for row in [row for row in rows if row.get("correct") is correct][:SAMPLES]:
            title = f"{verdict}: gold {row['gold']}, answered {row.get('answer')}"
            other = _other(row)
            texts = [(title, str(row["text"])), *([other] if other else [])]
            samples.append(page.SamplePair(str(row["question"]), texts))
    return samples


def _other(row: Mapping[str, typing.Any]) -> tuple[str, str] | None:
    """A sample of the same question that came to another answer, if there is one."""
    votes, texts = (run_files.as_list(row.get(name)) for name in ("votes", "texts"))
    for vote, text in zip(votes, texts, strict=False):
        if vote is not None and vote != row.get("answer"):
            return f"another sample: {vote}", str(text)
    return None
