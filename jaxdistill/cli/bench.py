"""The command that measures: bench."""

import argparse
import csv
import json
import pathlib
import shutil
import sys
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxdistill.cli import output
from jaxdistill.errors import ConfigError
from jaxdistill.section import Count, Flag, Section

OutputPath = Annotated[str, Flag(metavar="FILE")]


class Bench(Section):
    """What is measured, and where the numbers go."""

    what: Annotated[Literal["kernels", "loss", "device"], Flag(positional=True)] = Field(
        description="kernels: from logits; loss: from hidden states; device: first whether all of "
        "it is right here, then how fast, written to --save as it goes."
    )
    minutes: Annotated[float, Field(gt=0, le=1440), Flag(metavar="M")] = Field(
        8, description="Of `bench device`: no part begins after them."
    )
    peers_python: Annotated[str, Flag(metavar="PYTHON")] | None = Field(
        None,
        description="Of `bench device` and `bench loss`: a Python that has torch and liger-kernel, "
        "or trl, for rows beside ours; without it, this one where it has them.",
    )
    shapes: Annotated[str, Flag(metavar="SHAPES")] = Field(
        "auto", description="auto, quick, full, or N=8192,V=128256,S=2048,T=4096."
    )
    rounds: Annotated[Count, Flag(metavar="N")] = Field(9, description="Timings of each form.")
    csv: OutputPath | None = Field(None, description="Also write the table here.")
    save: OutputPath | None = Field(None, description="Also write the result here, as JSON.")
    plot: OutputPath | None = Field(None, description="Also draw it: .svg, .png or .pdf.")
    tune: OutputPath | None = Field(
        None, description="First write the fastest tilings of the kernel here."
    )
    kinds: Annotated[str, Flag(metavar="KINDS")] = Field(
        "forward_kl",
        description="Divergences that --tune serves, such as forward_kl,generalized_jsd,taid; each "
        "adds a minute or more.",
    )


def run(options: argparse.Namespace) -> None:
    """Measures and prints one table; notices go to standard error."""
    peers = options.peers_python
    if peers is not None and shutil.which(peers) is None:
        raise ConfigError(f"--peers-python {peers}: there is no such program")
    if options.what == "device":
        _device(options)
        return
    import jax

    from jaxdistill.bench import picture, shapes, tune
    from jaxdistill.bench import run as runner

    notice = lambda line: print(line, file=sys.stderr, flush=True)
    given = shapes.parse(options.shapes, jax.default_backend())
    with output.stdout_is_json(options.json):
        if options.tune:
            kinds = tuple(options.kinds.split(","))
            tune.tune(options.tune, given, options.rounds, notice, kinds)
        result = runner.run(options.what, given, options.rounds, notice, options.peers_python)
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


def _device(options: argparse.Namespace) -> None:
    """Proves the device; a part that is wrong makes the command fail, at its end."""
    from jaxdistill.bench import device

    notice = lambda line: print(line, file=sys.stderr, flush=True)
    path = pathlib.Path(options.save) if options.save else None
    with output.stdout_is_json(options.json):
        result = device.run(options.minutes, path, notice, peers_python=options.peers_python)
    if options.json:
        output.print_json(result)
    wrong = [part["name"] for part in result["parts"] if not part["ok"]]
    if wrong:
        raise ConfigError(
            f"bench device: wrong on {result['machine']['device']}: {', '.join(wrong)}; "
            "--save FILE keeps what was found. Runs are refused where their own check fails; "
            "method.implementation: xla goes on without the kernel"
        )
    if not options.json:
        count, left = len(result["parts"]), len(result["left_out"])
        print(f"{result['machine']['device']}: {count} parts are right, {left} were left out")


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
