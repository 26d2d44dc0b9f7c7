"""Exact arithmetic on what models write: agrees with Python where both have a value, else None."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.reasoning.expressions import evaluate, number


def _written():
    """Expressions as text, with their value by Python's own rules; None where that is undefined."""
    leaf = st.integers(0, 99).map(lambda n: (str(n), Fraction(n)))

    def grow(inner):
        def join(parts):
            (left, a), sign, (right, b) = parts
            if a is None or b is None or (sign == "/" and b == 0):
                return f"({left} {sign} {right})", None
            value = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}
            return f"({left} {sign} {right})", value[sign]()

        return st.tuples(inner, st.sampled_from("+-*/"), inner).map(join)

    return st.recursive(leaf, grow, max_leaves=8)


@given(_written())
def test_values_are_exact(pair):
    text, value = pair
    if len(text) <= 200:
        assert evaluate(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 * 4", 14),
        ("2 - 3 - 4", -5),
        ("24 / 4 / 2", 3),
        ("-2 ** 2", -4),
        ("2 ^ 3 ^ 2", 512),
        ("-(3 - 5)", 2),
        ("1,200 * 2", 2400),
        (".5 + 7.", Fraction(15, 2)),
    ],
)
def test_precedence_is_arithmetic(text, value):
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "()",
        "2 +",
        "7x = 14",
        "(175, 5)",
        "1 / 0",
        "((415 - 309)",
        "2 3",
        "__import__('os').system('true')",
        "9**9**9",
        "9" * 41,
        "9" * 10_000_000,
        "(" * 200 + "1",
        "-" * 250 + "1",
        "10**40 * 10",
        "1/3**64/3**64",
        "2 ** 0.5",
        "١ + ١",
        "1e400",
    ],
    ids=lambda text: text[:12],
)
def test_what_has_no_value_or_no_bound_has_none(text):
    assert evaluate(text) is None


@given(st.text(alphabet="0123456789.,+-*/^() \nxe", max_size=300))
def test_any_text_is_survived(text):
    value = evaluate(text)
    assert value is None or isinstance(value, Fraction)
    assert number(text) is None or isinstance(number(text), Fraction)


def test_numbers_as_people_write_them():
    assert number("12,34") is None and number("1e99") is None and number("3/0") is None
    assert number("+1,234,567.25") == Fraction(4938269, 4) and number(" -.5e1 ") == -5
