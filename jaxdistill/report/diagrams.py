"""Pictures of finished models: reliability, cost against quality, what layers are worth."""

import typing
from collections.abc import Mapping, Sequence

import numpy as np

from jaxdistill.report import wording
from jaxdistill.report.curves import colour
from jaxdistill.report.pictures import PALETTE, dress, render

StepRow = Mapping[str, typing.Any]


def reliability(rows: Sequence[StepRow], name: str) -> str | None:
    """How often models are right against how sure they are; on the diagonal they know it.

    Args:
      rows: of comparison.json; those with `reliability` are drawn.
      name: unique on the page.

    Returns:
      The SVG element, or None where no row has such numbers.

    Reference: Guo et al. 2017, arXiv 1706.04599.
    """
    if not any(row.get("reliability") for row in rows):
        return None

    def paint(figure: typing.Any) -> None:
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=PALETTE["rule"][0], linewidth=1.2)
        for index, row in enumerate(rows):
            bars = row.get("reliability") or []
            sure = [bar["confidence"] for bar in bars]
            right = [bar["accuracy"] for bar in bars]
            shade = PALETTE[colour(index)][0]
            axis.plot(sure, right, color=shade, linewidth=1.2, alpha=0.8)
            axis.scatter(
                sure, right, s=[6 + 120 * bar["share"] for bar in bars], color=shade, linewidths=0
            )
        dress(axis, "both", "how often it is right", "probability of the most likely token")
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)

    return render(paint, name, (5.4, 3.2))


COSTS = (
    ("disk_bytes", "size on disk, MiB", 2.0**-20),
    ("bytes", "size, MiB", 2.0**-20),
    ("decode_ms_p50", "milliseconds per decoded token", 1.0),
)
QUALITIES = (("kl_t1", "KL to the teacher"), ("perplexity", "perplexity"))


def pareto(rows: Sequence[StepRow], name: str) -> str | None:
    """Quality against size and against speed; what no other model beats in both lies on a line.

    Args:
      rows: of comparison.json.
      name: unique on the page.

    Returns:
      The SVG element, or None where fewer than two rows can be placed.
    """
    quality = next((q for q in QUALITIES if _count(rows, q[0]) > 1), None)
    sizes = [cost for cost in COSTS[:2] if _count(rows, cost[0]) == len(rows)][:1]
    times = [cost for cost in COSTS[2:] if _count(rows, cost[0]) > 1]
    if quality is None or not (sizes or times):
        return None
    costs = [*sizes, *times]

    def paint(figure: typing.Any) -> None:
        axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for axis, (field, label, unit) in zip(axes, costs, strict=True):
            points = [
                (index, row[field] * unit, row[quality[0]])
                for index, row in enumerate(rows)
                if wording.is_number(row.get(field)) and wording.is_number(row.get(quality[0]))
            ]
            front = frontier([(x, y) for _, x, y in points])
            axis.plot(*zip(*front, strict=True), color=PALETTE["rule"][0], linewidth=1.5, zorder=1)
            for index, x, y in points:
                axis.scatter(
                    [x], [y], s=34, color=PALETTE[colour(index)][0], linewidths=0, zorder=2
                )
            title = f"{quality[1]}: lower is better" if axis is axes[0] else ""
            dress(axis, "both", title, label)
            axis.margins(0.12)

    return render(paint, name, (5.4, 2.9))


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is at least as good as in both, by rising first number.

    >>> frontier([(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0)])
    [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    """
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def layers(
    influence: np.ndarray, stay: Sequence[int], name: str, loss: np.ndarray | None = None
) -> str:
    """What every layer is worth, and which stay.

    Args:
      influence: block influence [layers].
      stay: the layers of the student, or all.
      name: unique on the page.
      loss: rise of the loss without each layer [layers], where it was measured.
    """
    charts = [("block influence: 1 - cos(before, after)", influence)]
    if loss is not None:
        charts.append(("rise of the loss without the layer, nats", loss))

    def paint(figure: typing.Any) -> None:
        axes = figure.subplots(len(charts), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (title, values) in zip(axes, charts, strict=True):
            shades = ["blue" if layer in set(stay) else "orange" for layer in range(len(values))]
            axis.bar(range(len(values)), values, color=[PALETTE[shade][0] for shade in shades])
            dress(axis, "y", title, "layer" if axis is axes[-1] else "")

    return render(paint, name, (5.4, 1.4 + 1.2 * len(charts)))


def _count(rows: Sequence[StepRow], field: str) -> int:
    return sum(wording.is_number(row.get(field)) for row in rows)
