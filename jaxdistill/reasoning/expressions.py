"""Arithmetic written by a model, computed exactly without running it as code; bounded."""

import re
from fractions import Fraction

LONGEST = 256  # characters of an expression
DEEPEST = 32  # nested parentheses and signs
DIGITS = 40  # of a number, and of every intermediate value
_TOKEN = re.compile(r"\s*(?:(\d[\d,]*(?:\.\d*)?|\.\d+)|(\*\*|[-+*/^()]))", re.ASCII)
_MOST = Fraction(10) ** DIGITS


def evaluate(text: str) -> Fraction | None:
    """The value of +, -, *, /, ** (or ^, exponents up to 64) and parentheses; None if it has none.

    Nothing else is understood: a name, a comma between numbers, an equation, a division by zero or
    a value beyond the bounds has no value. Exact: 0.1 + 0.2 is 3/10.

    >>> evaluate("( 84.0 / 2.0 )"), evaluate("7x = 14"), evaluate("9**9**9")
    (Fraction(42, 1), None, None)
    """
    if len(text) > LONGEST:
        return None
    try:
        parser = _Parser(_tokens(text))
        value = parser.sum(0)
        return value if parser.at_end() else None
    except (_NoValue, ZeroDivisionError):
        return None


def number(text: str) -> Fraction | None:
    """One number as written, with optional thousands separators, sign, exponent or fraction bar.

    >>> number("1,234.50"), number("-3/4"), number("1e3"), number("1,2")
    (Fraction(2469, 2), Fraction(-3, 4), Fraction(1000, 1), None)
    """
    text = text.strip()
    if len(text) > 2 * DIGITS or not _NUMBER.fullmatch(text):
        return None
    top, _, bottom = text.replace(",", "").replace(" ", "").partition("/")
    mantissa, _, exponent = top.lower().partition("e")
    if len(exponent.lstrip("+-")) > 2 or abs(int(exponent or 0)) > DIGITS:
        return None
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
    if bottom and not int(bottom):
        return None
    return value / int(bottom) if bottom else value


_NUMBER = re.compile(
    r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?"
    r"|[-+]?\.\d+(?:[eE][-+]?\d+)?",
    re.ASCII,
)


class _NoValue(Exception):
    """The text is no expression, or its value is out of bounds."""


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    text = text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise _NoValue
        tokens.append(match.group(1) or match.group(2))
        place = match.end()
    return tokens


class _Parser:
    """Recursive descent: sum of products of signed powers of atoms."""

    def __init__(self, tokens: list[str]):
        self._tokens, self._next = tokens, 0

    def at_end(self) -> bool:
        return self._next == len(self._tokens)

    def _take(self, *choices: str) -> str | None:
        if not self.at_end() and self._tokens[self._next] in choices:
            self._next += 1
            return self._tokens[self._next - 1]
        return None

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while sign := self._take("+", "-"):
            other = self._product(depth)
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._signed(depth)
        while sign := self._take("*", "/"):
            other = self._signed(depth)
            value = _bounded(value * other if sign == "*" else value / other)
        return value

    def _signed(self, depth: int) -> Fraction:
        if depth > DEEPEST:
            raise _NoValue
        if sign := self._take("+", "-"):
            value = self._signed(depth + 1)
            return -value if sign == "-" else value
        base = self._atom(depth)
        if not self._take("**", "^"):
            return base
        exponent = self._signed(depth + 1)
        if exponent.denominator != 1 or abs(exponent) > 64:
            raise _NoValue
        return _bounded(base ** int(exponent))

    def _atom(self, depth: int) -> Fraction:
        if self._take("("):
            value = self.sum(depth + 1)
            if not self._take(")"):
                raise _NoValue
            return value
        if self.at_end():
            raise _NoValue
        value = number(self._tokens[self._next])
        if value is None:
            raise _NoValue
        self._next += 1
        return _bounded(value)


def _bounded(value: Fraction) -> Fraction:
    """The value, unless writing it down would take too many digits."""
    if abs(value.numerator) > _MOST or value.denominator > _MOST:
        raise _NoValue
    return value
