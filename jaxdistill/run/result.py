"""What a finished run hands back: its folder, its last numbers, and its rows of the comparison."""

import dataclasses
import html
import importlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.report import comparison_table, html_table


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
      run_dir: its folder.
      metrics: of the last evaluation.
      rows: of the comparison, as in table.json.
    """

    run_dir: pathlib.Path
    metrics: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]

    @property
    def table(self) -> Any:
        """`rows` as a frame with the names as its index where pandas is there, else as they are."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            return self.rows
        return pandas.DataFrame(list(self.rows)).set_index("name")

    def __str__(self) -> str:
        return f"{comparison_table(self.rows)}\nrun folder: {self.run_dir}"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return html_table(self.rows) + f"<p>run folder: {html.escape(str(self.run_dir))}</p>"
