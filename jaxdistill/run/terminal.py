"""What a run prints for people: its table, its page, and lines that nobody has to read."""

import contextlib
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill import report
from jaxdistill.errors import UserError


def write_page(folder: pathlib.Path) -> None:
    """The page, where the packages for it are there."""
    try:
        page = report.build([folder], folder / "report.html")
    except UserError as error:
        say(f"no report.html: {error}", sys.stderr)
    else:
        say(f"report: {page}", sys.stdout)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table and what it says, for people."""
    say(report.comparison_table(rows), sys.stdout)
    for name, own in report.by_teacher(rows).items():
        say(f"\nheld-out text for teacher {name}", sys.stdout)
        say(report.comparison_table(own), sys.stdout)
    say(report.recovered(rows), sys.stdout)


def say(text: str, stream: Any) -> None:
    """Prints; that nobody can read it (`| head`, a full disk, a lost terminal) fails no run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream, flush=True)
