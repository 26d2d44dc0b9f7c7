"""Verifiers accept what is right in any spelling, nothing else, and survive hostile text."""

import importlib.util
import time

import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.reasoning import verifiers


@pytest.mark.parametrize(
    ("completion", "gold", "correct"),
    [
        ("So the answer is $1,200.", "1200", True),
        ("The answer is 1200.0000001", "1200", True),
        ("The answer is 1201", "1200", False),
        ("It is 3 4 5", "5", True),
        ("no idea", "5", False),
        ("The answer is " + "9" * 100_000, "5", False),
    ],
)
def test_numbers_within_tolerance(completion, gold, correct):
    assert verifiers.numeric()(completion, gold).correct is correct


def test_units_can_count():
    match = verifiers.numeric(units="match")
    assert match("The answer is 12 apples.", "12 apples").correct
    assert match("The answer is 12 Apple", "12 apples").correct
    assert not match("The answer is 12 pears.", "12 apples").correct
    assert match("The answer is 12.", "12").correct
    assert verifiers.numeric()("The answer is 12 pears.", "12 apples").correct
    assert not verifiers.numeric(rel=0.0, abs_=0.0)("The answer is 12.01", "12").correct
    assert verifiers.numeric(rel=0.01)("The answer is 100.9", "100").correct
    with pytest.raises(ConfigError, match="gold answer 'twelve': is not a number"):
        match("12", "twelve")
    with pytest.raises(ConfigError, match="units 'often'"):
        verifiers.numeric(units="often")


def test_exact_and_choice():
    assert verifiers.choice()("I think the answer is (B).", "B").correct
    assert not verifiers.choice()("I think the answer is (B).", "A").correct
    verdict = verifiers.exact("expression")("The answer is (7 * 30).", "( 7.0 * 30.0 )")
    assert verdict.correct and verdict.answer == "210"
    nothing = verifiers.exact("number")("none", "5")
    assert nothing.answer is None and not nothing.correct
    assert not verifiers.exact("expression")("The answer is (x).", "(y)").correct
    with pytest.raises(ConfigError, match="is not one of"):
        verifiers.exact("poem")


def test_a_pattern_without_end_costs_its_time_and_no_more():
    verify = verifiers.regex(r"answer: (\w+)")
    assert verify("answer: no, answer: yes", "YES").correct
    endless = verifiers.regex(r"(a+)+$", seconds=0.5)
    assert endless("aaa", "aaa").answer == "aaa"  # the process runs
    start = time.perf_counter()
    assert endless("a" * 40 + "b", "b").answer is None
    assert time.perf_counter() - start < 20
    with pytest.raises(ConfigError, match="regex"):
        verifiers.regex("(")


def test_math_is_an_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # as where it is not installed
    with pytest.raises(ConfigError, match="pip install 'jaxdistill\\[math\\]'"):
        verifiers.math()


def test_math_sees_through_spelling():
    pytest.importorskip("math_verify", reason="needs the extra math")
    verify = verifiers.math(seconds=60.0)
    for completion, gold, correct in (
        (r"so \boxed{\frac{1}{2}}", "0.5", True),
        (r"so \boxed{\frac{1}{3}}", "0.5", False),
        (r"\boxed{2x + 3}", "3 + 2x", True),
        (r"<think>\boxed{4}</think> \boxed{5}", "5", True),
        ("it is $x = 5$", "5", True),
        ("no idea", "5", False),
    ):
        assert verify(completion, gold).correct is correct, completion


def test_math_survives_hostile_answers():
    pytest.importorskip("math_verify", reason="needs the extra math")
    verify = verifiers.math(seconds=0.5)
    hostile = {
        "a power tower": r"\boxed{9^{9^{9^{9}}}}",
        "a large factorial": r"\boxed{1000000000!}",
        "a million digits": "\\boxed{" + "9" * 1_000_000 + "}",
        "deep parentheses": "\\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}",
        "deep fractions": "\\boxed{" + "\\frac{1}{" * 900 + "1" + "}" * 900 + "}",
        "open braces": "\\boxed{" * 2000,
        "code": "\\boxed{__import__('os')._exit(3)}",
        "no text": "\x00\ud800",
    }
    for name, completion in hostile.items():
        assert not verify(completion, "5").correct, name
    patient = verifiers.math(seconds=60.0)
    assert patient(r"\boxed{5}", "5").correct
