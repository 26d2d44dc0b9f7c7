"""What a run directory holds, read into one value; anything may be missing, and is then named."""

import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import typing
from collections.abc import Iterable, Mapping

from jaxdistill.errors import ConfigError, DamagedError
from jaxdistill.report import json_lines
from jaxdistill.safe import json_file
from jaxdistill.safe.redact import redact

# A page is for reading: what is longer is cut, and says so.
_MAX_TEXT = 200_000
_MAX_SAMPLES = 24
_MAX_SAMPLE_TEXT = 6_000
_MAX_MARKS = 1_000


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What the files of one run say.

    Attributes:
      name: the name the run was given, or that of its folder.
      info: RUN.json, or {}.
      records: the records of metrics.jsonl.
      events: the lines of events.jsonl.
      rows: the rows of table.json, or [].
      held_out: what the table was measured on.
      samples: mappings of names ("prompt", "teacher", "student") to text, of the latest step.
      marks: of each sample its tokens, (text, log q - log p in nats), or none.
      samples_step: that step, or None where it is not known.
      samples_page: the latest samples file as text, where there are no structured ones.
      quarantined: the records of data set aside, or None when there is no such file.
      texts: title -> text of the small files that reproduce the run.
      fingerprints: name -> digest.
      missing: sentences about what is not there, or not whole.
    """

    name: str
    info: dict[str, typing.Any]
    records: list[dict]
    events: list[dict]
    rows: list[dict]
    held_out: str
    samples: list[dict[str, str]]
    marks: list[list[tuple[str, float]]]
    samples_step: int | None
    samples_page: str
    quarantined: int | None
    texts: dict[str, str]
    fingerprints: dict[str, str]
    missing: list[str]


def load(run_dir: str | os.PathLike) -> RunFiles:
    """Reads a run directory, of a run that is finished, running or broken off.

    Raises:
      ConfigError: there is no such folder, or nothing in it is a file of a run.
    """
    folder = pathlib.Path(run_dir)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run directory; `jaxdistill train` makes one")
    known = ("RUN.json", "metrics.jsonl", "table.json", "config.resolved.yaml", "events.jsonl")
    if not any((folder / name).exists() for name in known):
        raise ConfigError(
            f"{folder}: not a run directory: it holds none of {', '.join(known)}; "
            "give the folder that `jaxdistill train` named at its start"
        )
    missing: list[str] = []
    info = read_object(folder / "RUN.json", missing)
    records = _lines(folder / "metrics.jsonl", missing)
    table = read_object(folder / "table.json", missing)
    rows = [
        row
        for row in as_list(table.get("rows"))
        if isinstance(row, dict) and isinstance(row.get("name"), str)
    ]
    samples, marks, samples_step, samples_page = _samples(folder, missing)
    _name_missing(folder, records, rows, missing)
    return RunFiles(
        name=str(info.get("name") or folder.resolve().name),
        info=info,
        records=[r for r in records if isinstance(r.get("step"), int)],
        events=_lines(folder / "events.jsonl", missing),
        rows=rows,
        held_out=str(table.get("held_out") or ""),
        samples=samples,
        marks=marks,
        samples_step=samples_step,
        samples_page=samples_page,
        quarantined=_count_lines(folder / "quarantine"),
        texts=_texts(folder, info),
        fingerprints=_facts(read_object(folder / "fingerprints.json", missing)),
        missing=missing,
    )


def _name_missing(
    folder: pathlib.Path, records: list[dict], rows: list[dict], missing: list[str]
) -> None:
    if not records:
        missing.append("No metrics yet: the run has not finished a step that was recorded.")
    elif not any(key.startswith("eval/") for record in records for key in record):
        missing.append("No evaluation on held-out text was recorded during training.")
    if not rows:
        missing.append(
            "No comparison with the teacher and the student before: table.json is written when "
            "the run has been evaluated."
        )
    if not (folder / "config.resolved.yaml").exists():
        missing.append("No config.resolved.yaml: the settings of the run are not known.")


def read_object(path: pathlib.Path, missing: list[str]) -> dict[str, typing.Any]:
    """A JSON object from a file; {} where there is none, or where `missing` names a damaged one."""
    if not path.exists():
        return {}
    try:
        return json_file.read(path)
    except DamagedError:
        missing.append(f"{path.name} is damaged (no JSON object) and was left out.")
        return {}


def _lines(path: pathlib.Path, missing: list[str]) -> list[dict]:
    records, damaged = json_lines.scan(path)
    if damaged:
        where = ", ".join(str(number) for number in damaged[:5])
        missing.append(f"{path.name}: {len(damaged)} damaged line(s) were left out (line {where}).")
    return records


def as_list(value: typing.Any) -> list:
    """The value, or [] where it is no list."""
    return value if isinstance(value, list) else []


def fields(value: typing.Any, shape: json_file.FieldTypes) -> dict[str, typing.Any]:
    """The fields of an object that are of their types; of what is no object, none."""
    record = as_object(value)
    kept = {}
    for name, types in shape.items():
        with contextlib.suppress(ValueError):
            json_file.check(record, {name: types})
            kept[name] = record[name]
    return kept


def are_shares(value: typing.Any, names: Iterable[str]) -> bool:
    """Whether the fields of an object are numbers from 0 to 1."""
    try:
        json_file.check_shares(value, names)
    except ValueError:
        return False
    return True


def _text(path: pathlib.Path, limit: int = _MAX_TEXT) -> str:
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(limit + 1)
    return text if len(text) <= limit else text[:limit] + "\n[the rest is not shown]"


def _samples(
    folder: pathlib.Path, missing: list[str]
) -> tuple[list[dict[str, str]], list[list[tuple[str, float]]], int | None, str]:
    """The samples of the latest step: structured ones where there are any, else a page of text."""
    paths = sorted((folder / "samples").glob("*.jsonl")) or [folder / "samples.jsonl"]
    rows: list[dict] = [row for row in _lines(paths[-1], missing) if _has_text(row)]
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    step = max(steps, default=None)
    rows = [row for row in rows if step is None or row.get("step") == step]
    samples = [
        {
            str(name): text if len(text) <= _MAX_SAMPLE_TEXT else text[:_MAX_SAMPLE_TEXT] + " [...]"
            for name, text in row.items()
            if isinstance(text, str)
        }
        for row in rows[:_MAX_SAMPLES]
    ]
    if len(rows) > _MAX_SAMPLES:
        missing.append(f"{len(rows) - _MAX_SAMPLES} more samples are in {paths[-1].name}.")
    pages = sorted((folder / "samples").glob("*.md"))
    page = "" if samples or not pages else _text(pages[-1])
    if page:
        match = re.search(r"(\d+)", pages[-1].stem)
        step = int(match.group(1)) if match else None
    return samples, [*map(_marks, rows[: len(samples)])], step, page


def _marks(row: Mapping[str, typing.Any]) -> list[tuple[str, float]]:
    """The tokens of a sample with their numbers; none where one of them is something else."""
    marks = as_list(row.get("marks"))[:_MAX_MARKS]
    pairs = [one for one in marks if isinstance(one, list) and len(one) == 2]
    told = [
        (text, float(gap))
        for text, gap in pairs
        if isinstance(text, str) and isinstance(gap, int | float) and not isinstance(gap, bool)
    ]
    return told if len(told) == len(marks) else []


def _has_text(row: dict) -> bool:
    return any(isinstance(value, str) for value in row.values())


def _count_lines(folder: pathlib.Path) -> int | None:
    """Records in the files of a folder, one for each data set; None where there is none."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        return None
    total = 0
    for path in files:
        with open(path, "rb") as lines:
            total += sum(1 for line in lines if line.strip())
    return total


def _texts(folder: pathlib.Path, info: dict[str, typing.Any]) -> dict[str, str]:
    command = _text(folder / "command.txt") or info.get("command") or ""
    if isinstance(command, list):
        arguments = [str(argument) for argument in command]
        # Where the program was installed is of no use to another reader.
        names = [pathlib.PurePath(argument).name for argument in arguments[:1]]
        names = ["jaxdistill" if name == "__main__.py" else name for name in names]
        command = shlex.join([*names, *arguments[1:]])
    texts = {
        "Command": str(command),
        "Overrides": _text(folder / "overrides.txt"),
        "Configuration as given": _text(folder / "config.input.yaml"),
        "Configuration with every default": _text(folder / "config.resolved.yaml"),
    }
    return {title: redact(text.strip()) for title, text in texts.items() if text.strip()}


def _facts(sealed: dict[str, typing.Any]) -> dict[str, str]:
    """What a run is made of and ran on; its settings are in the configuration."""
    facts = _flat(as_object(sealed.get("facts")))
    return {name: value for name, value in facts.items() if not name.startswith("config.")}


def as_object(value: typing.Any) -> dict:
    """The value, or {} where it is no object."""
    return value if isinstance(value, dict) else {}


def _flat(value: typing.Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat.update(_flat(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(item)
    return flat
