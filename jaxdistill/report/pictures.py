"""Panels drawn as SVG whose colours are CSS variables, for light and dark pages alike."""

import html
import io
import re
import typing
from collections.abc import Callable

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.report import wording
from jaxdistill.report.curves import Chart, Line, Panel

# token -> (light, dark). Matplotlib draws with the light one; the SVG then says var(--token).
PALETTE = {
    "ink": ("#22262c", "#e7e5e0"),
    "muted": ("#6b7280", "#9aa1ac"),
    "rule": ("#dcdfe4", "#33383f"),
    "blue": ("#2563c9", "#79a9f7"),
    "orange": ("#c2570c", "#f4a259"),
    "green": ("#12805c", "#56c79b"),
    "purple": ("#7745c1", "#b896f2"),
    "red": ("#bf2f45", "#ff8791"),
    "teal": ("#0b7a8c", "#5cc5d6"),
    "brown": ("#8a5a2b", "#cfa273"),
    "grey": ("#717784", "#a3a9b4"),
}
_MAX_POINTS = 500
_SMOOTH_FROM = 40
_STRIPS = 48  # places of a chart that say their values


def require() -> None:
    """Checks that the drawing library is there.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the HTML report draws its pictures with matplotlib, which is not installed: "
            "pip install 'jaxdistill[report]'"
        ) from error


def draw(panel: Panel, name: str) -> str:
    """One panel as an SVG element for an HTML page.

    Args:
      panel: what to draw.
      name: a word that is unique on the page; it salts the ids inside, which makes equal input
        give equal bytes and keeps the pictures of a page apart.

    Returns:
      The `<svg>` element: text as text, transparent background, colours `var(--token)`.

    Raises:
      UserError: matplotlib is not installed.
    """

    def paint(figure: typing.Any) -> None:
        axes = figure.subplots(len(panel.charts), 1, sharex=True, squeeze=False)[:, 0]
        for axis, chart in zip(axes, panel.charts, strict=True):
            _draw_chart(axis, chart)
        axes[-1].set_xlim(-0.015 * max(panel.end, 1), 1.015 * max(panel.end, 1))
        axes[-1].set_xlabel("step", color=PALETTE["muted"][0])

    return render(paint, name, told=lambda figure: _told(figure, panel))


def _told(figure: typing.Any, panel: Panel) -> str:
    """What is said where the pointer rests: a step of every chart with the values of its lines.

    Strips without colour lie over the charts, each with an SVG title: no script is needed.
    """
    scale = 72 / figure.dpi  # to the points of the SVG, whose y axis points down
    height = figure.bbox.height * scale
    strips = []
    for axis, chart in zip(figure.axes, panel.charts, strict=True):
        steps = np.unique(np.concatenate([line.steps for line in chart.lines if len(line.steps)]))
        if not len(steps):
            continue
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, _STRIPS).round().astype(int))]
        box = axis.get_window_extent()
        at = axis.transData.transform(np.stack([steps, np.zeros(len(steps))], 1))[:, 0] * scale
        between = (at[1:] + at[:-1]) / 2
        edges = np.clip([box.x0 * scale, *between, box.x1 * scale], box.x0 * scale, box.x1 * scale)
        for step, left, right in zip(steps, edges[:-1], edges[1:], strict=True):
            said = [f"{line.label} {text}" for line in chart.lines if (text := line.at(int(step)))]
            title = html.escape(wording.visible(f"step {step:,}: " + "; ".join(said)))
            strips.append(
                f'<rect x="{left:.1f}" y="{height - box.y1 * scale:.1f}" '
                f'width="{right - left:.1f}" height="{box.height * scale:.1f}" '
                f'fill="transparent"><title>{title}</title></rect>'
            )
    return "".join(strips)


def render(
    paint: Callable[[typing.Any], None],
    name: str,
    size: tuple[float, float] = (5.4, 2.55),
    told: Callable[[typing.Any], str] = lambda figure: "",
) -> str:
    """What `paint` draws on a Matplotlib figure, as an SVG element in the page's manner.

    Args:
      paint: draws with the light colours of `PALETTE`.
      name: see `draw`.
      size: width and height in inches, which fix only their ratio and the size of the letters.
      told: elements that lie above the drawn figure, such as those with titles.

    Raises:
      UserError: matplotlib is not installed.
    """
    require()
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": ["DejaVu Sans"],
        "font.size": 8.5,
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "path.simplify": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        canvas = FigureCanvasSVG(figure)
        paint(figure)
        out = io.StringIO()
        canvas.print_svg(
            out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
        above = told(figure)
    svg = _for_page(out.getvalue())
    return svg.removesuffix("</svg>") + above + "</svg>"


def _draw_chart(axis: typing.Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    muted = PALETTE["muted"][0]
    if chart.stacked:
        _draw_stack(axis, chart)
    else:
        for line in chart.lines:
            _draw_line(axis, line)
        _limit(axis, chart)
    if chart.marks:
        axis.plot(
            chart.marks,
            np.zeros(len(chart.marks)),
            "|",
            color=PALETTE["red"][0],
            markersize=9,
            markeredgewidth=1.4,
            transform=axis.get_xaxis_transform(),
            clip_on=False,
        )
    dress(axis)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if chart.percent:
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    else:
        axis.yaxis.set_major_formatter(lambda value, _: _tick(value))
    if chart.label:
        axis.set_title(chart.label, loc="left", fontsize=8.5, color=muted, pad=4)


def dress(axis: typing.Any, grid: str = "y", title: str = "", label: str = "") -> None:
    """Axes in the page's manner: no box, a light grid, no ticks, a transparent background.

    `title` stands above them at the left, `label` below.
    """
    muted, rule = PALETTE["muted"][0], PALETTE["rule"][0]
    axis.patch.set_visible(False)
    axis.figure.patch.set_visible(False)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(rule)
    axis.grid(axis=grid, color=rule, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelcolor=muted, color=rule)
    if title:
        axis.set_title(title, loc="left", fontsize=8.5, color=muted)
    if label:
        axis.set_xlabel(label, color=muted)


def _draw_line(axis: typing.Any, line: Line) -> None:
    colour = PALETTE[line.colour][0]
    if line.style == "level":
        axis.axhline(line.values[0], color=colour, linewidth=1.2, linestyle=(0, (5, 3)))
        return
    if line.style == "faint":
        axis.plot(line.steps, line.values, color=colour, linewidth=0.9, alpha=0.45)
        return
    if line.style == "dots":
        axis.plot(line.steps, line.values, "-o", color=colour, linewidth=1.2, markersize=3.8)
        return
    steps, values = thin(line.steps, line.values)
    if line.style == "noisy" and len(steps) >= _SMOOTH_FROM:
        axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        axis.plot(steps, smooth(values), color=colour, linewidth=1.7)
    else:
        single = {"marker": "o", "markersize": 3.8} if len(steps) == 1 else {}
        axis.plot(steps, values, color=colour, linewidth=1.6, **single)


def _draw_stack(axis: typing.Any, chart: Chart) -> None:
    """Shares on top of each other, the first at the bottom."""
    thinned = [thin(line.steps, line.values) for line in chart.lines]
    steps = thinned[0][0]
    if len(steps) == 1:
        steps = np.array([steps[0] - 0.5, steps[0] + 0.5])
        thinned = [(steps, np.repeat(values, 2)) for _, values in thinned]
    axis.stackplot(
        steps,
        [smooth(values) if len(values) >= _SMOOTH_FROM else values for _, values in thinned],
        colors=[PALETTE[line.colour][0] for line in chart.lines],
        alpha=0.8,
        linewidth=0,
    )
    axis.set_ylim(0, 1)


def _limit(axis: typing.Any, chart: Chart) -> None:
    """Keeps a few wild values from flattening everything else; says how many are outside."""
    values = np.concatenate([line.values for line in chart.lines])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = values.min(), values.max()
    usual = np.quantile(values, 0.98)
    if high - low > 4 * (usual - low) > 0:
        top = usual + 0.25 * (usual - low)
        outside = int((values > top).sum())
        axis.set_ylim(low - 0.05 * (top - low), top)
        axis.annotate(
            f"{outside} above, up to {float(f'{high:.4g}'):g}",
            (1, 1),
            xycoords="axes fraction",
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=PALETTE["muted"][0],
        )
    elif high == low:
        room = abs(high) * 0.1 or 1.0
        axis.set_ylim(low - room, high + room)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most some hundred points: means over equal groups of neighbours, without NaN."""
    if len(steps) <= _MAX_POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), _MAX_POINTS + 1).astype(int)
    known = np.isfinite(values)
    counts = np.add.reduceat(known, edges[:-1])
    sums = np.add.reduceat(np.where(known, values, 0.0), edges[:-1])
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return steps[edges[1:] - 1], means


def smooth(values: np.ndarray) -> np.ndarray:
    """A line through noise: the median over a centred window, then the mean of the medians.

    One spike does not move a median. The window is a thirtieth of the points; where there is no
    value there is no line.
    """
    half = max(1, len(values) // 60)
    known = np.isfinite(values)
    line = values
    for reduce in (np.nanmedian, np.nanmean):
        padded = np.pad(line, half, constant_values=np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
        line = np.full(len(values), np.nan)
        line[known] = reduce(windows[known], axis=1)
    return line


def _tick(value: float) -> str:
    """A tick: thousands and millions shortened, small numbers with an exponent."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for power, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= power:
            return f"{value / (1e3 if suffix == 'k' else power):g}{suffix}"
    return f"{value:.6g}"


def _for_page(svg: str) -> str:
    """The element alone, its colours as variables, without ids that nothing refers to."""
    svg = svg[svg.index("<svg") :]
    for token, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{token})")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m.group(0) if m.group(1) in used else "", svg)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    # Its style sheet would hold for the whole page; page.css says the same for pictures.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    svg = re.sub(r"^<svg[^>]*", lambda m: re.sub(r' (?:width|height)="[^"]*"', "", m[0]), svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1).strip()
