"""Budgets in words: a share, or parameters, bytes or microseconds with a unit."""

import re
from collections.abc import Mapping

from jaxdistill.errors import ConfigError

UNITS: Mapping[str, Mapping[str, int]] = {
    "parameters": {"": 1, "K": 10**3, "M": 10**6, "B": 10**9},
    "memory": {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    "latency": {"us": 1, "ms": 10**3, "s": 10**6},
}
_EXAMPLES = {
    "parameters": "60%, 80M or 1.5B",
    "memory": "4GiB, 300MiB or 50%",
    "latency": "60%, 12ms or 800us",
}


def problem(text: str | int | float, of: str = "parameters") -> str | None:
    """What is wrong with a budget, and how it is written; None where nothing is."""
    return f"{text!r}: write {_EXAMPLES[of]}" if _split(text, of) is None else None


def amount(text: str | int | float, whole: int | float, of: str = "parameters") -> int:
    """A budget in words as a number: "60%" of `whole`, 80M or 1.5B; bytes; or microseconds.

    Raises:
      ConfigError: for anything else, or a share outside of 0% to 100%.

    >>> amount("60%", 1000), amount("80M", 0), amount("4GiB", 0, "memory")
    (600, 80000000, 4294967296)
    """
    split = _split(text, of)
    if split is None:
        raise ConfigError(f"prune.{of} = {problem(text, of)}")
    number, unit = split
    return int(whole * number / 100) if unit == "%" else int(number * UNITS[of][unit])


def _split(text: str | int | float, of: str) -> tuple[float, str] | None:
    """Number and unit, or None where this is no budget of its kind."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*", str(text))
    if match is None:
        return None
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return (number, unit) if 0 < number <= 100 else None
    units = UNITS[of]
    return (number, unit) if unit in units and number * units[unit] >= 1 else None
