r"""Prompts that make a model explain itself, as published: zero-shot, few-shot, symbolic.

stage one      Q: {question}\nA: Let's think step by step.
stage two      {stage one}{rationale} \nTherefore, the answer (arabic numerals) is
few-shot       Q: {x}\nA: {z} The answer is {y}.\n\n  ...  Q: {question}\nA:
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxdistill.errors import ConfigError
from jaxdistill.safe import json_file

# Zero-shot-CoT's triggers 1 to 14 in its own order; Kojima et al. 2022, arXiv 2205.11916.
TRIGGERS = (
    "Let's think step by step.",
    "We should think about this step by step.",
    "First,",
    "Before we dive into the answer,",
    "Proof followed by the answer.",
    "Let's think step by step in a realistic way.",
    "Let's think step by step using common sense and knowledge.",
    "Let's think like a detective step by step.",
    "Let's think about this logically.",
    "Let's think step by step. First,",
    "Let's think",
    "Let's solve this problem by splitting it into steps.",
    "The answer is after the proof.",
    "Let's be realistic and think step by step.",
)
STYLES = ("plain", "zero_shot", "few_shot", "preamble")
RATIONALE_TOKENS, ANSWER_TOKENS = 128, 32  # published limits of the two stages
FEW_SHOT_TRIGGER = "The answer is"
SYMBOLIC = "Write the answer as one arithmetic expression in parentheses, such as (7 * 30).\n\n"
_TWO_STAGE = {
    "number": "\nTherefore, the answer (arabic numerals) is",
    "yes_no": "\nTherefore, the answer (Yes or No) is",
    "letters": "\nTherefore, the answer is",
    "text": "\nTherefore, the answer is",
    "expression": "\nTherefore, the answer (an arithmetic expression in parentheses) is",
}


class Exemplar(NamedTuple):
    """One worked example: a question, why, and its answer."""

    question: str
    rationale: str
    answer: str


def plain(question: str) -> str:
    r"""The question alone: "Q: ...\nA:"."""
    return f"Q: {question}\nA:"


def zero_shot_cot(question: str, trigger: int | str = 1) -> str:
    r"""Stage one: the question, and a trigger by its published number or in words.

    >>> zero_shot_cot("How many?", 3)
    'Q: How many?\nA: First,'

    Raises:
      ConfigError: for a number that is no trigger's.
    """
    if isinstance(trigger, int):
        if not 1 <= trigger <= len(TRIGGERS):
            raise ConfigError(f"trigger {trigger}: must be a number from 1 to {len(TRIGGERS)}")
        trigger = TRIGGERS[trigger - 1]
    return f"{plain(question)} {trigger}"


def in_style(
    style: str,
    *,
    trigger: int = 1,
    exemplars: Sequence[Exemplar] = (),
    preamble: str = "",
    symbolic: bool = False,
) -> Callable[[str], str]:
    """question -> prompt, for a style of `STYLES`.

    Args:
      style: `plain`; `zero_shot`: with a published trigger; `few_shot`: behind worked examples;
        `preamble`: behind a text.
      trigger: number of the zero-shot trigger.
      exemplars: the worked examples.
      preamble: the text.
      symbolic: worked examples ask for an arithmetic expression as the answer.
    """
    assert style in STYLES, style
    if style == "zero_shot":
        return lambda question: zero_shot_cot(question, trigger)
    if style == "few_shot":
        return lambda question: few_shot_cot(question, exemplars, symbolic=symbolic)
    if style == "preamble":
        return lambda question: with_preamble(preamble, question)
    return plain


def answer_trigger(kind: str, choices: str = "ABCDE") -> str:
    r"""What asks for the answer in stage two.

    >>> answer_trigger("choice", "ABC")
    '\nTherefore, among A through C, the answer is'

    Raises:
      ConfigError: for an unknown kind of answer.
    """
    if kind == "choice":
        return f"\nTherefore, among {choices[0]} through {choices[-1]}, the answer is"
    if kind not in _TWO_STAGE:
        known = ", ".join([*_TWO_STAGE, "choice"])
        raise ConfigError(f"answer kind {kind!r}: has no trigger; use one of {known}")
    return _TWO_STAGE[kind]


def second_stage(first: str, rationale: str, kind: str, choices: str = "ABCDE") -> str:
    """Stage two: everything so far, and what asks for the answer."""
    return f"{first}{rationale} {answer_trigger(kind, choices)}"


def few_shot_cot(question: str, exemplars: Sequence[Exemplar], *, symbolic: bool = False) -> str:
    """Worked examples, then the question; `symbolic` asks for an expression as the answer.

    Reference: Wei et al. 2022, arXiv 2201.11903; expressions as in Hsieh et al. 2023.
    """
    examples = "".join(f"{worked(one)}\n\n" for one in exemplars)
    return (SYMBOLIC if symbolic else "") + examples + plain(question)


def worked(one: Exemplar) -> str:
    """A worked example as it stands in a prompt."""
    return f"{plain(one.question)} {one.rationale} {FEW_SHOT_TRIGGER} {one.answer}."


def load_exemplars(path: str | pathlib.Path) -> list[Exemplar]:
    r"""Worked examples from a file.

    Either JSON Lines of objects with question, rationale and answer, or Auto-CoT's JSON object with
    a list `demo` of objects with question ("Q: ...\nA:"), rationale and pred_ans.

    Raises:
      ConfigError: if the file cannot be read, or an example lacks a field; says which.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        whole = text.lstrip().startswith("{\n")
        demos = json_file.parse(text)["demo"] if whole else None
        rows = demos or [json_file.parse(line) for line in text.split("\n") if line.strip()]
        if not isinstance(rows, list):
            raise ValueError("`demo` is no list")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"exemplars {path}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"exemplars {path}: is neither JSON Lines nor an object with a list `demo`: {error}"
        ) from error
    if not rows:
        raise ConfigError(f"exemplars {path}: holds no example")
    return [_exemplar(row, number, path) for number, row in enumerate(rows, start=1)]


def _exemplar(row: Any, number: int, path: pathlib.Path) -> Exemplar:
    """Checks one worked example."""
    theirs = isinstance(row, dict) and "pred_ans" in row
    fields = ("question", "rationale", "pred_ans" if theirs else "answer")
    for field in fields:
        value = row.get(field) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(
                f"exemplars {path}: example {number}: field `{field}` must be a text that is not "
                "empty: add it or remove the example"
            )
    question, rationale, answer = (row[field].strip() for field in fields)
    question = question.removeprefix("Q:").removesuffix("A:").strip()
    return Exemplar(question, rationale, answer)


def load_preamble(path: str | pathlib.Path) -> str:
    """A whole prompt as text, such as BIG-Bench Hard's: what stands behind a line of dashes.

    Raises:
      ConfigError: if the file cannot be read or is empty.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt {path}: cannot be read: {error}") from error
    _, dashes, behind = text.partition("\n-----\n")
    text = (behind if dashes else text).strip()
    if not text:
        raise ConfigError(f"prompt {path}: is empty")
    return text


def with_preamble(preamble: str, question: str) -> str:
    """A preamble, the question and the first trigger, as BIG-Bench Hard asks.

    Reference: Suzgun et al. 2022, arXiv 2210.09261.
    """
    return f"{preamble}\n\n{zero_shot_cot(question)}\n"
