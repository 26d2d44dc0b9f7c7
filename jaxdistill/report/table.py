"""The comparison of teacher, student before, SFT control, student after; and it in words."""

import dataclasses
import html
import typing
from collections.abc import Callable, Mapping, Sequence

from jaxdistill.errors import DataError
from jaxdistill.report import wording

ROWS = ("teacher", "student before", "SFT control", "student after")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the comparison: its field in table.json and how its values are written.

    Attributes:
      field: the key in a row of table.json.
      title: above the column.
      write: value to text.
      better: "low" or "high" where one end is better, "" where neither is.
    """

    field: str
    title: str
    write: Callable[[int | float | None], str]
    better: str = ""

    @property
    def hint(self) -> str:
        """Which end is better, as a reader sees it."""
        return {"low": "lower is better", "high": "higher is better", "": ""}[self.better]


COLUMNS = (
    Column("perplexity", "perplexity", wording.number, "low"),
    Column("bits_per_byte", "bits/byte", wording.number, "low"),
    Column("kl_t1", "KL to teacher", wording.number, "low"),
    Column("reverse_kl", "reverse KL", wording.number, "low"),
    Column("agree_top1", "top-1 agreement", wording.percent, "high"),
    Column("agree_top5", "top-5 overlap", wording.percent, "high"),
    Column("acceptance", "accepted as draft", wording.percent, "high"),
    Column("ece", "calibration error", wording.percent, "low"),
    Column("accuracy", "choices right", wording.percent, "high"),
    Column("accuracy_per_byte", "choices right, per byte", wording.percent, "high"),
    Column("parameters", "parameters", wording.count),
    Column("zeros", "zeros", wording.percent),
    Column("parameters_non_embedding", "non-embedding", wording.count),
    Column("bytes", "size", wording.size),
    Column("disk_bytes", "on disk", wording.size, "low"),
    Column("peak_bytes", "memory", wording.size, "low"),
    Column("scored_tokens_per_second", "scored tokens/s", wording.count, "high"),
    Column("prefill_ms_p50", "prefill ms", wording.number, "low"),
    Column("prefill_ms_p95", "p95", wording.number, "low"),
    Column("decode_ms_p50", "decode ms/token", wording.number, "low"),
    Column("decode_ms_p95", "p95", wording.number, "low"),
    Column("decode_tokens_per_second", "decoded tokens/s", wording.number, "high"),
)


def ordered(rows: Sequence[Mapping[str, typing.Any]]) -> list[Mapping[str, typing.Any]]:
    """The rows in the order of the comparison; rows of other names come last, as given.

    Raises:
      DataError: a row has no name.
    """
    for row in rows:
        if not isinstance(row, Mapping) or not isinstance(row.get("name"), str):
            raise DataError(
                f"table row {row!r}: must be a mapping with a name, one of {', '.join(ROWS)}"
            )
    return sorted(rows, key=lambda row: ROWS.index(row["name"]) if row["name"] in ROWS else 9)


def by_teacher(
    rows: Sequence[Mapping[str, typing.Any]],
) -> dict[str, list[Mapping[str, typing.Any]]]:
    """Of several teachers the rows of each, on the held-out text that is for it; {} of one."""
    groups: dict[str, list[Mapping[str, typing.Any]]] = {}
    for row in ordered(rows):
        parts = row.get("by_teacher")
        for name, numbers in parts.items() if isinstance(parts, Mapping) else ():
            if isinstance(numbers, Mapping):
                groups.setdefault(name, []).append({**numbers, "name": row["name"]})
    return groups


def columns(rows: Sequence[Mapping[str, typing.Any]]) -> list[Column]:
    """The columns of which at least one row holds a value."""
    return [c for c in COLUMNS if any(_cell(row, c.field) is not None for row in rows)]


def comparison_table(rows: Sequence[Mapping[str, typing.Any]]) -> str:
    """The rows of table.json as aligned text without a last line end.

    Args:
      rows: mappings with "name" and the fields of `COLUMNS`; a missing or null field shows "-".

    Raises:
      DataError: a row has no name.
    """
    rows = ordered(rows)
    present = columns(rows)
    lines = [["", *(column.title for column in present)]]
    for row in rows:
        lines.append([wording.clean(row["name"]), *(written(row, column) for column in present)])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    aligned = (
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)


def html_table(rows: Sequence[Mapping[str, typing.Any]]) -> str:
    """The same as an HTML table without styles, as notebooks show it.

    Raises:
      DataError: a row has no name.
    """
    rows = ordered(rows)
    present = columns(rows)
    cell = lambda tag, text: f"<{tag}>{html.escape(text)}</{tag}>"
    head = "".join(cell("th", title) for title in ["", *(column.title for column in present)])
    lines = [
        cell("th", wording.clean(row["name"]))
        + "".join(cell("td", written(row, column)) for column in present)
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def written(row: Mapping[str, typing.Any], column: Column) -> str:
    """A value as its column writes it, with the spread over seeds where there is one."""
    text = column.write(_cell(row, column.field))
    spread = row.get("spread")
    deviation = spread.get(column.field) if isinstance(spread, Mapping) else None
    return f"{text} ± {column.write(deviation)}" if wording.is_number(deviation) else text


def recovered(rows: Sequence[Mapping[str, typing.Any]]) -> str:
    """What the comparison says, in words that claim no more than its numbers.

    The share of the perplexity gap that a student s recovers is
    `(ppl(before) - ppl(s)) / (ppl(before) - ppl(teacher))`. It is stated only where all three are
    finite and the teacher is better than the student before. The same share of the SFT control
    says how much of it plain fine-tuning on the same data would have given. Where bits per byte are
    known of all, they stand in place of perplexities, which other tokens would make another number.

    Args:
      rows: the rows of table.json.

    Returns:
      One to four sentences; what is missing is named instead of assumed.
    """
    measure = _measure(rows)
    perplexity = {row["name"]: _cell(row, measure.field) for row in ordered(rows)}
    distance = {row["name"]: _cell(row, "kl_t1") for row in ordered(rows)}
    needed = ("teacher", "student before", "student after")
    absent = [name for name in needed if perplexity.get(name) is None]
    if absent == ["teacher"]:
        before, after = (wording.number(perplexity[name]) for name in needed[1:])
        return (
            f"No teacher was measured, so no gap: the student's {measure.words} went from {before} "
            f"to {after}."
        )
    if absent:
        return f"Not comparable yet: no {measure.words} of {' and '.join(absent)}."
    finite = {name: float(p) for name, p in perplexity.items() if wording.is_number(p)}
    bad = [name for name in needed if name not in finite]
    if bad:
        names = " and ".join(f"{name} ({perplexity[name]})" for name in bad)
        return f"No share of the gap can be given: the {measure.words} of {names} is not finite."
    teacher, before, after = (finite[name] for name in needed)
    words, control = measure.words, perplexity.get("SFT control")
    sentences = [_gap_sentence(words, teacher, before, after)]
    sentences.append(_control_sentence(words, teacher, before, after, control))
    sentences.append(_distance_sentence(distance["student before"], distance["student after"]))
    return " ".join(filter(None, sentences))


class _Measure(typing.NamedTuple):
    """What models are compared by: a field of table.json, and its name in a sentence."""

    field: str
    words: str


def _measure(rows: Sequence[Mapping[str, typing.Any]]) -> _Measure:
    """Bits per byte where every row has them; else perplexity."""
    if rows and all(_cell(row, "bits_per_byte") is not None for row in rows):
        return _Measure("bits_per_byte", "bits per byte")
    return _Measure("perplexity", "perplexity")


def _gap_sentence(words: str, teacher: float, before: float, after: float) -> str:
    gap = before - teacher
    change = f"{wording.number(before)} to {wording.number(after)}"
    if gap <= 0:
        return (
            f"The teacher ({words} {wording.number(teacher)}) is no better than the student "
            f"before ({wording.number(before)}) on this text, so there was no gap to close; the "
            f"student went from {change}."
        )
    share = (before - after) / gap
    goal = f"teacher: {wording.number(teacher)}"
    if share < 0:
        text = (
            f"The student got worse: {words} from {change} ({goal}), which widens the gap to "
            f"the teacher by {_share(-share)}."
        )
    elif share > 1:
        text = f"The student's {words} ends below the teacher's: from {change} ({goal})."
    else:
        text = (
            f"The student recovered {_share(share)} of the {words} gap to the teacher: "
            f"from {change} ({goal})."
        )
    if gap < 0.01 * before:
        text += (
            f" The gap itself is only {_share(gap / before)} of the {words}, so the share says "
            "little."
        )
    return text


def _control_sentence(
    words: str, teacher: float, before: float, after: float, control: int | float | None
) -> str:
    if control is None:
        return (
            "There is no SFT control, so how much of this plain fine-tuning on the same data "
            "would have given is not known."
        )
    if not wording.is_number(control):
        return f"The {words} of the SFT control ({control}) is not finite."
    difference = 100 * (after - control) / control
    side = "below" if difference < 0 else "above"
    if abs(difference) < 0.005:
        text = f"Its {words} equals that of the SFT control ({wording.number(control)})"
    else:
        text = (
            f"Its {words} is {wording.number(abs(difference), 3)}% {side} that of the SFT "
            f"control ({wording.number(control)})"
        )
    if before > teacher:
        share = (before - control) / (before - teacher)
        verb = "recovered" if share >= 0 else "lost"
        text += f", which {verb} {_share(abs(share))} of the gap"
    return text + "."


def _distance_sentence(before: int | float | None, after: int | float | None) -> str:
    """Whether the student came nearer to the teacher, which perplexity alone does not say."""
    if not (wording.is_number(before) and wording.is_number(after)):
        return ""
    verb = "fell" if after < before else "rose" if after > before else "stayed the same,"
    return f"Its KL to the teacher {verb} from {wording.number(before)} to {wording.number(after)}."


def _share(share: float) -> str:
    """A percentage that does not round up to "100.0%" or down to "0.0%" what is neither."""
    if 0.9995 <= share < 1:
        return "99.9%"
    if 0 < share < 0.0005:
        return "less than 0.1%"
    return wording.percent(share)


def _cell(row: Mapping[str, typing.Any], field: str) -> int | float | None:
    value = row.get(field)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
