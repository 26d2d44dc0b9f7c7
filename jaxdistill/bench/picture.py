"""One picture of a benchmark: a bar for every function, a panel for every shape."""

import os
from typing import Any

from jaxdistill.errors import ConfigError


def draw(result: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes the picture; the name's ending says the format (svg, png, pdf).

    Raises:
      ConfigError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'jaxdistill[report]'") from error
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    if not shapes:
        raise ConfigError("--plot: nothing was measured")
    figure = Figure(figsize=(9, 0.6 + 2.0 * len(shapes)), layout="constrained")
    axes = figure.subplots(len(shapes), squeeze=False)[:, 0]
    for axis, shape in zip(axes, shapes, strict=True):
        rows = [row for row in result["rows"] if row["shape"] == shape][::-1]
        colours = ["#1f6f8b" if "jaxdistill" in row["function"] else "#c9c9c9" for row in rows]
        bars = axis.barh([row["function"] for row in rows], [row["ms"] for row in rows])
        for bar, colour, row in zip(bars, colours, rows, strict=True):
            bar.set_color(colour)
            memory = row["temporary_mib"]
            axis.annotate(
                f" {row['ms']:.3g} ms" + ("" if memory is None else f", {memory:.0f} MiB"),
                (bar.get_width(), bar.get_y() + bar.get_height() / 2),
                va="center",
                fontsize=8,
            )
        axis.set_xlim(0, 1.25 * max(row["ms"] for row in rows))
        axis.set_title(shape, loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1].set_xlabel("ms for value and gradient; temporary memory behind", fontsize=8)
    figure.suptitle(f"{result['kind']} on {result['device']}, jax {result['jax']}", fontsize=10)
    figure.savefig(path)
