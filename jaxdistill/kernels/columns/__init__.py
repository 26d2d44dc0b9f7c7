"""Heads whose rows agree only on listed columns: what they share, and their rows in a chunk."""

from jaxdistill.kernels.columns.definition import OTHERS, Columns, shared_columns

__all__ = ["OTHERS", "Columns", "shared_columns"]
