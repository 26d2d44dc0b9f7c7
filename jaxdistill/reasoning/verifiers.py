"""Judges whether an answer is right: exact, numeric, choice, regular expression, mathematics.

A verifier is a function (completion, gold) -> Verdict. The same functions score rationales and
evaluations, and serve as rewards.
"""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

from jaxdistill.errors import ConfigError
from jaxdistill.reasoning import extract
from jaxdistill.reasoning.expressions import evaluate, number
from jaxdistill.safe.guarded import Guarded, TimedOut

UNITS = ("ignore", "match")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a verifier says.

    Attributes:
      answer: what was parsed, as `extract.canonical` spells it; None: nothing could be parsed.
      correct: whether it is right; never where there is no answer.
    """

    answer: str | None
    correct: bool


VerifierFunction = Callable[[str, str], Finding]


def exact(kind: str = "text", *, choices: str = "ABCDE") -> VerifierFunction:
    """Right where the extracted answer equals the gold answer in canonical spelling.

    Args:
      kind: of `extract.KINDS`.
      choices: letters of the options, for `choice`.

    Raises:
      ConfigError: for an unknown kind.
    """
    if kind not in extract.KINDS:
        raise ConfigError(f"answer kind {kind!r}: is not one of {', '.join(extract.KINDS)}")

    def verify(completion: str, gold: str) -> Finding:
        answer = extract.canonical(extract.answer(completion, kind, choices=choices), kind)
        wanted = extract.canonical(gold, kind)
        return Finding(answer, answer is not None and answer == wanted)

    return verify


def choice(choices: str = "ABCDE") -> VerifierFunction:
    """Right where the chosen option is the gold option, "(B)" or "B"."""
    return exact("choice", choices=choices)


def numeric(*, rel: float = 1e-6, abs_: float = 1e-6, units: str = "ignore") -> VerifierFunction:
    """Right where the number is within max(rel * |gold|, abs_) of the gold number.

    Args:
      rel: relative tolerance.
      abs_: absolute tolerance.
      units: `ignore` them, or `match`: where the gold answer has a unit, the answer must have the
        same one (case and plural apart).

    Raises:
      ConfigError: for a negative tolerance or another word for `units`.
    """
    if rel < 0 or abs_ < 0 or units not in UNITS:
        raise ConfigError(
            f"numeric: rel {rel}, abs_ {abs_}, units {units!r}: tolerances must be 0 or more and "
            f"units one of {', '.join(UNITS)}"
        )

    def verify(completion: str, gold: str) -> Finding:
        wanted, wanted_unit = quantity(gold)
        if wanted is None:
            raise ConfigError(f"gold answer {gold[:60]!r}: is not a number")
        answer, unit = quantity(_numeric_text(completion))
        if answer is None:
            return Finding(None, False)
        near = abs(answer - wanted) <= max(rel * abs(wanted), abs_)
        same = units == "ignore" or not wanted_unit or unit == wanted_unit
        return Finding(str(answer), bool(near and same))

    return verify


def _numeric_text(completion: str) -> str:
    """The part of a completion that states the number: the answer with the word behind it."""
    answer = extract.answer(completion, "number")
    if answer is None:
        return ""
    text = extract.without_thinking(completion)[-extract.LONGEST :]
    text = extract.last_boxed(text) or text.rsplit("####", 1)[-1]
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    place = text.rfind(answer)
    behind = (
        re.match(r"\.?[ \t]*([A-Za-z%°]*)", text[place + len(answer) :]) if place >= 0 else None
    )
    return answer + (" " + behind.group(1) if behind else "")


def quantity(text: str) -> tuple[Any, str]:
    """(value as a Fraction or None, unit) of a text such as "$1,200.50", "12 apples" or "3/4".

    >>> quantity("$1,200.50"), quantity("12 Apples"), quantity("(2 + 3)"), quantity("none")
    ((Fraction(2401, 2), '$'), (Fraction(12, 1), 'apple'), (Fraction(5, 1), ''), (None, ''))
    """
    text = text.strip()[:200].rstrip(".")
    match = re.fullmatch(r"([$€£]?)\s*(.*?)\s*([A-Za-z%°][A-Za-z ]*)?", text, re.DOTALL)
    if match is None:
        return None, ""
    sign, digits, word = match.groups()
    value = number(digits)
    if value is None:
        value = evaluate(digits)
    unit = sign or (word or "").lower().strip()
    unit = unit[:-1] if len(unit) > 2 and unit.endswith("s") else unit
    return value, unit if value is not None else ""


def regex(pattern: str, *, seconds: float = 1.0) -> VerifierFunction:
    """Right where the first group of the pattern's last match (or the match) equals the gold text.

    The search runs in a killable process: a pattern that backtracks without end costs `seconds`.

    Raises:
      ConfigError: if the pattern is not a regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"regex {pattern!r}: {error}") from error
    find = Guarded("jaxdistill.reasoning.verifiers:search", seconds=seconds)

    def verify(completion: str, gold: str) -> Finding:
        try:
            answer = find(pattern, completion[-extract.LONGEST :])
        except TimedOut:
            answer = None
        answer = extract.canonical(answer, "text")
        return Finding(answer, answer is not None and answer == extract.canonical(gold, "text"))

    return verify


def search(pattern: str, text: str) -> str | None:
    """The last match of a pattern: its first group where it has one."""
    last = None
    for match in re.finditer(pattern, text):
        last = match.group(1) if match.re.groups else match.group(0)
    return last


def math(*, seconds: float = 5.0) -> VerifierFunction:
    """Right where math-verify finds the answer mathematically equal to the gold one.

    Needs the extra `math`; it parses LaTeX with SymPy, which is why it runs in a killable process.

    Raises:
      ConfigError: if math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "verifier math: needs math-verify, which is not installed: pip install "
            "'jaxdistill[math]'"
        )
    judge = Guarded("jaxdistill.reasoning.math_judge:judge", seconds=seconds)

    def verify(completion: str, gold: str) -> Finding:
        text = extract.without_thinking(completion)[-extract.LONGEST :]
        try:
            answer, correct = judge(text, gold)
        except (TimedOut, RuntimeError):
            return Finding(None, False)
        return Finding(answer, bool(correct))

    return verify


VERIFIERS: dict[str, Callable[..., VerifierFunction]] = {
    "exact": exact,
    "numeric": numeric,
    "choice": choice,
    "regex": regex,
    "math": math,
    **{kind: functools.partial(exact, kind) for kind in ("number", "yes_no", "expression")},
}
