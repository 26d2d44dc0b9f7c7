"""Which pictures a report shows, as plain data: panels, charts and lines."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxdistill.report import wording
from jaxdistill.report.run_files import RunFiles

# The palette, light and dark, by token; the page turns tokens into CSS variables.
COLOURS = ("blue", "orange", "green", "purple", "red", "teal", "brown", "grey")

_NAMES = {
    "loss/total": "total",
    "loss/ce": "cross-entropy",
    "loss/kl_t1": "KL to the teacher",
    "agree/top1": "top-1",
    "optim/lr": "learning rate",
    "optim/grad_norm": "gradient norm",
    "perf/tokens_per_second": "trained tokens/s",
    "perf/mfu": "model FLOP utilisation",
    "perf/tflops_per_second": "TFLOP/s",
    "perf/memory_gib": "memory, GiB",
    "eval/loss": "loss",
    "eval/ce": "cross-entropy",
    "eval/perplexity": "perplexity",
    "eval/kl_t1": "KL to the teacher",
    "eval/agree_top1": "top-1",
    "eval/reward_mean": "reward",
    "reward/mean": "reward",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      label: its name in the legend.
      steps: [P] the steps.
      values: [P] the values; NaN breaks the line.
      colour: a token of `COLOURS`.
      style: "noisy" (thin, with a thick median), "solid", "dots" (few points, held-out),
        "level" (one value, a dashed horizontal), "faint" (what another line is compared with).
      percent: whether values are shares of 1.
      digest: the one number in the legend: the "last" value, the "median" or the "mean".
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: str
    style: str = "solid"
    percent: bool = False
    digest: str = "last"

    def at(self, step: int) -> str:
        """The value at a step as text, or "" where there is none."""
        place = int(np.searchsorted(self.steps, step))
        found = place < len(self.steps) and self.steps[place] == step
        value = self.values[0] if self.style == "level" else self.values[place] if found else None
        return "" if value is None or not np.isfinite(value) else self._written(float(value))

    @property
    def number(self) -> str:
        """The number of the legend as text; values that are not finite do not count."""
        finite = self.values[np.isfinite(self.values)]
        if not len(finite):
            return wording.MISSING
        value = {"last": finite[-1], "median": np.median(finite), "mean": finite.mean()}[
            self.digest
        ]
        return self._written(float(value))

    def _written(self, value: float) -> str:
        if self.percent:
            return wording.percent(value)
        return wording.count(value) if value >= 1e4 else wording.number(value)


@dataclasses.dataclass(frozen=True)
class Chart:
    """One coordinate system: lines over steps, or shares stacked to one."""

    lines: tuple[Line, ...]
    label: str = ""
    stacked: bool = False
    percent: bool = False
    marks: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of the page: a title, charts above each other, and a remark.

    Attributes:
      title: above the picture.
      charts: top to bottom, with a common axis of steps.
      note: a sentence below, or "".
      end: the last step of the axis, the same for all pictures of a page.
    """

    title: str
    charts: tuple[Chart, ...]
    note: str = ""
    end: int = 0

    @property
    def lines(self) -> list[Line]:
        """All lines, for the legend."""
        return [line for chart in self.charts for line in chart.lines]


def series(records: Sequence[Mapping], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric; what was not finite is NaN, a repeated step counts once.

    Returns:
      steps: int64 [P], ascending. values: float64 [P].
    """
    points: dict[int, float] = {}
    for record in records:
        if metric in record:
            value = record[metric]
            points[record["step"]] = float(value) if wording.is_number(value) else np.nan
    steps = sorted(points)
    return np.array(steps, np.int64), np.array([points[step] for step in steps], np.float64)


def skipped_steps(run: RunFiles) -> tuple[int, ...]:
    """The steps whose update was skipped: from the events, or where the total guard/skipped grows.

    Events name each step; the total is recorded at some steps only, so it stands in where there
    are no events. What was run again with success, or rolled back, was not skipped in the end.
    """
    named: set[int] = set()
    for event in run.events:
        kind, step, to = str(event.get("kind")), event.get("step"), event.get("to")
        if "skip" in kind and isinstance(step, int):
            named.add(step)
        elif kind == "rerun" and event.get("verdict") == "transient" and isinstance(step, int):
            named = {one for one in named if one < step}
        elif kind == "rollback" and isinstance(to, int):
            named = {one for one in named if one <= to}
    steps, totals = series(run.records, "guard/skipped")
    grown = np.diff(np.nan_to_num(totals), prepend=0.0) > 0
    return tuple(sorted(named or {int(step) for step in steps[grown]}))


def panels(runs: Sequence[RunFiles]) -> list[Panel]:
    """The pictures of one run, or of several runs laid over each other."""
    planned = _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)
    end = max((record["step"] for run in runs for record in run.records), default=0)
    drawable = (
        dataclasses.replace(panel, charts=tuple(filter(_has_points, panel.charts)), end=end)
        for panel in planned
    )
    return [panel for panel in drawable if panel.charts]


def _has_points(chart: Chart) -> bool:
    return any(np.isfinite(line.values).any() for line in chart.lines if line.style != "level")


def _of_one(run: RunFiles) -> list[Panel]:
    """All that one run has to show."""
    return [
        _loss(run),
        _distance(run),
        _by_teacher(run),
        _agreement(run),
        _perplexity(run),
        _rewards(run),
        _knobs(run),
        _optimizer(run),
        _entropy(run),
        _time_shares(run),
        _throughput(run),
    ]


def _recorded(run: RunFiles, group: str) -> list[str]:
    """The metrics of a group that a run recorded, in alphabetical order."""
    return sorted({n for record in run.records for n in record if n.startswith(f"{group}/")})


def _loss(run: RunFiles) -> Panel:
    marks = skipped_steps(run)
    first = ("loss/total", "loss/ce", "loss/divergence")
    metrics = [*first, *(n for n in _recorded(run, "loss") if n not in (*first, "loss/kl_t1"))]
    lines = (*_lines(run, metrics, "noisy"), *_held_out(run, "eval/loss", len(metrics)))
    note = f"Red ticks on the axis: {len(marks)} skipped step(s)." if marks else ""
    return Panel("Loss", (Chart(lines, marks=marks),), note)


def _distance(run: RunFiles) -> Panel:
    lines = (*_lines(run, ["loss/kl_t1"], "noisy"), *_held_out(run, "eval/kl_t1", 1))
    return Panel(
        "Distance to the teacher", (Chart(lines, "KL(teacher || student), nats per token"),)
    )


def _by_teacher(run: RunFiles) -> Panel:
    """Of several teachers: how far the student is from each, and whose tokens it learns from."""
    names = {metric.split("/")[1] for metric in _recorded(run, "teachers")}
    charts = []
    for what, label, percent in (
        ("kl_t1", "KL(teacher || student), nats per token", False),
        ("share", "share of the tokens that count", True),
    ):
        lines = []
        for place, name in enumerate(sorted(names)):
            metric = f"teachers/{name}/{what}"
            own = _lines(run, [metric], "noisy", first=place, percent=percent)
            own += _held_out(run, f"eval/{metric}", place, percent=percent)
            held = [", held-out" if line.style == "dots" else "" for line in own]
            lines += [
                dataclasses.replace(line, label=f"{name}{more}")
                for line, more in zip(own, held, strict=True)
            ]
        charts.append(Chart(tuple(lines), label, percent=percent))
    return Panel("By teacher", tuple(charts))


def _agreement(run: RunFiles) -> Panel:
    metrics = sorted(_recorded(run, "agree"), key=lambda name: name != "agree/top1")
    lines = (
        *_lines(run, metrics, "noisy", percent=True),
        *_held_out(run, "eval/agree_top1", max(len(metrics), 1), percent=True),
    )
    chart = Chart(lines, "same most likely token", percent=True)
    return Panel("Agreement with the teacher", (chart,))


def _optimizer(run: RunFiles) -> Panel:
    kinds = (("optim/lr", "solid"), ("optim/grad_norm", "noisy"))
    return Panel(
        "Optimizer",
        tuple(
            Chart(tuple(_lines(run, [metric], style, first=index)), _NAMES[metric])
            for index, (metric, style) in enumerate(kinds)
        ),
    )


def _entropy(run: RunFiles) -> Panel:
    lines = _lines(run, ["teacher/entropy", "student/entropy"], "noisy")
    lines = [dataclasses.replace(line, label=line.label.split("/")[0]) for line in lines]
    return Panel("Entropy of the next token", (Chart(tuple(lines), "nats per token"),))


def _of_several(runs: Sequence[RunFiles]) -> list[Panel]:
    """One picture per quantity, one colour per run."""
    quantities = [
        ("Loss", "loss/total", "noisy", False),
        ("Distance to the teacher", "loss/kl_t1", "noisy", False),
        ("Distance to the teacher, held-out", "eval/kl_t1", "dots", False),
        ("Agreement with the teacher", "agree/top1", "noisy", True),
        ("Agreement with the teacher, held-out", "eval/agree_top1", "dots", True),
        ("Perplexity, held-out", "eval/perplexity", "dots", False),
        ("Learning rate", "optim/lr", "solid", False),
        ("Throughput, trained tokens/s", "perf/tokens_per_second", "noisy", False),
    ]
    plotted = []
    for title, metric, style, percent in quantities:
        lines = [
            Line(run.name, *series(run.records, metric), colour(index), style, percent)
            for index, run in enumerate(runs)
        ]
        lines = [line for line in lines if len(line.steps)]
        plotted.append(Panel(title, (Chart(tuple(lines), percent=percent),)))
    return plotted


def _lines(
    run: RunFiles, metrics: Sequence[str], style: str, *, first: int = 0, percent: bool = False
) -> list[Line]:
    """A line per metric that was recorded, colours in the order of the metrics."""
    lines = []
    for index, metric in enumerate(metrics):
        steps, values = series(run.records, metric)
        if len(steps):
            label = _NAMES.get(metric) or _label(metric)
            lines.append(Line(label, steps, values, colour(first + index), style, percent))
    return lines


def _held_out(run: RunFiles, metric: str, first: int, *, percent: bool = False) -> list[Line]:
    """The line of an evaluation metric, or nothing."""
    return [
        dataclasses.replace(line, label=f"{line.label}, held-out")
        for line in _lines(run, [metric], "dots", first=first, percent=percent)
    ]


def _perplexity(run: RunFiles) -> Panel:
    """Held-out perplexity over the steps between the levels of the comparison."""
    lines = _held_out(run, "eval/perplexity", 0)
    levels = {"teacher": "green", "student before": "grey", "SFT control": "orange"}
    for row in run.rows:
        value = row.get("perplexity")
        if lines and row["name"] in levels and wording.is_number(value):
            steps = lines[0].steps[[0, -1]]
            level = np.full(2, float(value))
            lines.append(Line(row["name"], steps, level, levels[row["name"]], "level"))
    return Panel("Perplexity on held-out text", (Chart(tuple(lines)),))


def _rewards(run: RunFiles) -> Panel:
    """What answers earned in training and on held-out questions, and how often these are right."""
    earned = (*_lines(run, ["reward/mean"], "noisy"), *_held_out(run, "eval/reward_mean", 1))
    shares = [n for n in _recorded(run, "eval") if re.match("eval/(pass|maj)_at_", n)]
    right = Chart(
        tuple(_lines(run, shares, "dots", percent=True)), "held-out questions", percent=True
    )
    return Panel("Rewards", (Chart(earned, "mean reward of an answer"), right))


def _knobs(run: RunFiles) -> Panel:
    """The knobs that move, those within [0, 1] apart from the others; the rest are named."""
    moving: dict[bool, list[Line]] = {True: [], False: []}
    constant = []
    for line in _lines(run, _recorded(run, "knobs"), "solid"):
        finite = line.values[np.isfinite(line.values)]
        if len(finite) and (finite == finite[0]).all():
            constant.append(f"{line.label} = {wording.number(float(finite[0]))}")
        elif len(finite):
            moving[bool(finite.min() >= 0 and finite.max() <= 1)].append(line)
    charts = tuple(Chart(tuple(lines)) for lines in moving.values() if lines)
    note = f"Constant: {', '.join(constant)}." if constant else ""
    return Panel("Knobs", charts, note)


def _throughput(run: RunFiles) -> Panel:
    """How fast the run is, in tokens and in arithmetic."""
    charts = []
    for metric in ("perf/tokens_per_second", "perf/mfu", "perf/tflops_per_second"):
        percent = metric == "perf/mfu"
        lines = _lines(run, [metric], "noisy", first=len(charts), percent=percent)
        lines = [dataclasses.replace(line, digest="median") for line in lines]
        charts.append(Chart(tuple(lines), _NAMES[metric], percent=percent))
    return Panel("Throughput", tuple(charts), "Numbers in the legend: median over the run.")


def _time_shares(run: RunFiles) -> Panel:
    """Where the time of a step goes; what is in no share is the student's own work."""
    title, kinds = "Where the time goes", {"data": "orange", "checkpoint": "teal"}
    kinds["teacher"] = "purple"
    recorded = {name: series(run.records, f"perf/{name}_share") for name in kinds}
    recorded = {name: points for name, points in recorded.items() if len(points[0])}
    if not recorded:
        return Panel(title, ())
    steps = np.unique(np.concatenate([at for at, _ in recorded.values()]))
    lines, rest = [], np.ones(len(steps))
    for name, (at, values) in recorded.items():
        # What the host waited for is measured, the teacher's share is not: it takes what is left.
        share = np.clip(np.interp(steps, at, np.nan_to_num(values)), 0, rest)
        rest = rest - share
        lines.append(Line(name, steps, share, kinds[name], percent=True, digest="mean"))
    other = Line("student and the rest", steps, rest, "blue", percent=True, digest="mean")
    lines = [other, *reversed(lines)]
    chart = Chart(tuple(lines), "share of the time of a step", stacked=True, percent=True)
    note = "Numbers in the legend: mean over the run."
    if "teacher" in recorded:
        note += " Teacher: estimated by its share of the arithmetic."
    return Panel(title, (chart,), note)


def colour(index: int) -> str:
    """The token of the colour that line, run or model `index` has in every picture."""
    return COLOURS[index % len(COLOURS)]


def _label(metric: str) -> str:
    group, _, name = metric.partition("/")
    if group in ("teacher", "student", "knobs"):
        return name if group == "knobs" else metric
    return name.replace("_", " ")
