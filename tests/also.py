"""Marks values of a test that repeat, on another mesh or with another option, what others check."""

from typing import Any

import pytest


def also(*rows: Any) -> list[Any]:
    """Rows of `pytest.mark.parametrize`, each a value or a tuple of them, for `LONG=1` alone."""
    mark = pytest.mark.variant
    return [pytest.param(*(r if isinstance(r, tuple) else (r,)), marks=mark) for r in rows]
