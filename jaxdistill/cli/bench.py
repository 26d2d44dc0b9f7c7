"""The command that measures: bench."""

import argparse
import csv
import json
import pathlib
import sys
from typing import Any

from jaxdistill.cli import output
from jaxdistill.cli.values import positive


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxdistill bench`."""
    parser.add_argument(
        "what", choices=("kernels", "loss"), help="kernels: logits in; loss: hidden states in"
    )
    parser.add_argument(
        "--shapes", default="auto", help="auto, quick, full, or N=8192,V=128256,S=2048,T=4096"
    )
    parser.add_argument("--rounds", metavar="N", type=positive, default=9)
    parser.add_argument("--csv", metavar="FILE", help="also write the table here")
    parser.add_argument("--save", metavar="FILE", help="also write the result here, as JSON")
    parser.add_argument("--plot", metavar="FILE", help="also draw it: .svg, .png or .pdf")
    parser.add_argument(
        "--tune", metavar="FILE", help="first write the fastest tilings of the kernel here"
    )


def run(options: argparse.Namespace) -> None:
    """Measures and prints one table; notices go to standard error."""
    import jax

    from jaxdistill.bench import picture, shapes, tune
    from jaxdistill.bench import run as runner

    notice = lambda line: print(line, file=sys.stderr, flush=True)
    found = shapes.parse(options.shapes, jax.default_backend())
    with output.stdout_is_json(options.json):
        if options.tune:
            tune.tune(options.tune, found, options.rounds, notice)
        result = runner.run(options.what, found, options.rounds, notice)
        if options.csv:
            _write_csv(options.csv, result["rows"], runner.COLUMNS)
        if options.save:
            pathlib.Path(options.save).write_text(json.dumps(result, indent=1) + "\n")
        if options.plot:
            picture.draw(result, options.plot)
    if options.json:
        output.print_json(result)
    else:
        _print_table(result)


def _write_csv(path: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _print_table(result: dict[str, Any]) -> None:
    print(f"{result['device']}, jax {result['jax']}, median of {result['rounds']}")
    header = ("ms", "ratio", "GB/s", "% peak", "TFLOP/s", "temp MiB", "error")
    keys = ("ms", "ratio", "gb_per_second", "percent_of_peak", "tflop_per_second",
            "temporary_mib", "error")  # fmt: skip
    shape = None
    for row in result["rows"]:
        if row["shape"] != shape:
            shape = row["shape"]
            print(f"\n{shape:28}" + "".join(f"{name:>10}" for name in header))
        cells = ("-" if row[key] is None else f"{row[key]:.3g}" for key in keys)
        print(f"{row['function']:28}" + "".join(f"{cell:>10}" for cell in cells))
