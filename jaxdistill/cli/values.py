"""Numbers on the command line: what the value of an option may be."""

import argparse
from collections.abc import Callable
from typing import Any


def positive(text: str) -> int:
    """A whole number from 1."""
    return _number(int, text, "a whole number of at least 1", lambda number: number >= 1)


def natural(text: str) -> int:
    """A whole number from 0 that 31 bits hold, such as a seed."""
    return _number(int, text, "a whole number from 0 to 2147483647", lambda n: 0 <= n < 2**31)


def temperature(text: str) -> float:
    """What logits may be divided by; 0 is greedy."""
    return _number(float, text, "a number from 0 to 1000", lambda number: 0 <= number <= 1000)


def fraction(text: str) -> float:
    """A share of the whole, not 0."""
    return _number(float, text, "a number above 0 and at most 1", lambda number: 0 < number <= 1)


def _number(kind: Callable, text: str, rule: str, holds: Callable[[Any], bool]) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not holds(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")
    return number
