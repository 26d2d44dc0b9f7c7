"""Finds the answer in what a model wrote, by the rules that the papers' own code published.

Kinds of answer: `number`, `choice`, `yes_no`, `letters`, `expression`, `text`. Nothing is evaluated
as code, and only the last `LONGEST` characters are looked at.
"""

import re
from typing import NamedTuple

from jaxdistill.errors import ConfigError
from jaxdistill.reasoning.expressions import evaluate

KINDS = ("number", "choice", "yes_no", "letters", "expression", "text")
LONGEST = 20_000
TRIGGER = "The answer is"
_NUMBER = re.compile(r"-?\d+\.?\d*", re.ASCII)


def cleanse(text: str, kind: str, *, few_shot: bool = False, choices: str = "ABCDE") -> str | None:
    """The answer in a text as Zero-shot-CoT's code cleans it, or None where there is none.

    Zero-shot: the first match in what followed the answer's trigger. Few-shot: the text behind the
    last "The answer is"; its first match, or the last of the whole text where it says no such
    thing. A final full stop is dropped.

    Args:
      text: what the model wrote.
      kind: of KINDS, without `expression`.
      few_shot: which of the two rules.
      choices: letters of the options.

    Raises:
      ConfigError: for an unknown kind.

    Reference: Kojima et al. 2022, arXiv 2205.11916, and its code's answer_cleansing.
    """
    text, flagged = text[-LONGEST:], False
    if few_shot:
        pieces = text.split(TRIGGER)
        text, flagged = pieces[-1], len(pieces) > 1
    if kind == "number":
        matches = _NUMBER.findall(text.replace(",", ""))
    elif kind == "choice":
        matches = re.findall("|".join(choices), text)
    elif kind == "yes_no":
        words = re.sub(r"[\"'\n.\s:,]", " ", text.lower()).split(" ")
        matches = [word for word in words if word in ("yes", "no")]
    elif kind == "letters":
        matches = [re.sub(r"[\"'\n.\s]", "", text)]
    elif kind == "text":
        matches = [text.strip()]
    else:
        raise ConfigError(f"answer kind {kind!r}: is not one of {', '.join(KINDS)}")
    if not matches:
        return None
    answer = matches[0] if flagged or not few_shot else matches[-1]
    answer = answer[:-1] if answer.endswith(".") else answer
    return answer or None


class Parsed(NamedTuple):
    """A rationale and the answer it ends in; either may be empty or None where it is not there."""

    rationale: str
    answer: str | None


def step_by_step(text: str, kind: str) -> Parsed:
    """Splits a raw few-shot continuation into rationale and answer, as Distilling Step-by-Step did.

    The text ends where the model begins another question ("Q:"). `expression` takes what stands
    between the first and the last parenthesis behind "The answer is", which must occur exactly
    once; `choice` the first (x) behind "So the answer is"; other kinds `cleanse` what follows.

    Reference: Hsieh et al. 2023, arXiv 2305.02301, and its code's data_utils.
    """
    text = text[:LONGEST].split("Q:")[0].rstrip()
    trigger = "So the answer is" if kind == "choice" else TRIGGER
    pieces = text.split(trigger)
    if len(pieces) != 2:
        return Parsed(text if len(pieces) == 1 else "", None)
    rationale, label = pieces[0].rstrip(), pieces[1]
    if kind == "expression":
        return Parsed(rationale, _parenthesised(label))
    if kind == "choice":
        match = re.search(r"\(.\)", label)
        return Parsed(rationale, match.group(0) if match else None)
    return Parsed(rationale, cleanse(label, kind))


def _parenthesised(text: str) -> str | None:
    r"""What `\(.*\)` finds first, in time that grows with the text and not with its square."""
    for line in text.split("\n"):
        start, end = line.find("("), line.rfind(")")
        if 0 <= start < end:
            return line[start : end + 1]
    return None


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces matched; None where there is none.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}."), last_boxed(r"\boxed{1")
    ('\\frac{1}{2}', None)
    """
    text = text[-LONGEST:]
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin + 1 : place]
    return None


def without_thinking(text: str) -> str:
    """The text behind the last </think>; a thought that is not closed has nothing behind it."""
    return text.rpartition("</think>")[2].split("<think>")[0].strip()


def answer(text: str, kind: str, *, choices: str = "ABCDE") -> str | None:
    r"""The final answer of a free-form solution, or None.

    Looked for in this order: the last \boxed{...}, what follows "####" (GSM8K), the few-shot rule
    of `cleanse` on the text behind any thinking. Choices are letters, alone or in parentheses;
    an expression without parentheses is a number.
    """
    text = without_thinking(text)[-LONGEST:]
    boxed = last_boxed(text)
    if boxed is not None:
        text = boxed
    elif "####" in text:
        text = text.rsplit("####", 1)[1]
    else:
        # A model that continues with a question of its own has answered before it.
        text = re.split(r"\n(?:Q|Question):", text)[0]
    if kind == "expression":
        text = re.split("(?i)the answer is", text)[-1]
        return _parenthesised(text) or cleanse(text, "number")
    if kind == "choice":
        return _choice(text, choices)
    if kind == "text":
        text = re.split(r"(?i)the answer is:?", text)[-1].strip()
        return text.split("\n")[0].strip().removesuffix(".").strip() or None
    return cleanse(re.sub("(?i)the answer is", TRIGGER, text), kind, few_shot=True)


def _choice(text: str, choices: str) -> str | None:
    """The option behind the trigger, else the last one in parentheses, else the last alone."""
    behind = re.split(r"(?i)answer is:?", text)
    pattern = rf"\(([{choices}])\)|\b([{choices}])\b(?!')"
    matches = [one or other for one, other in re.findall(pattern, behind[-1])]
    if not matches:
        return None
    return matches[0] if len(behind) > 1 else matches[-1]


def canonical(answer: str | None, kind: str) -> str | None:
    """One spelling for equal answers, so that votes add up; None stays None.

    >>> canonical("18.0", "number"), canonical("(2 * 9)", "expression"), canonical("Yes", "text")
    ('18', '18', 'yes')
    """
    if answer is None:
        return None
    if kind in ("number", "expression"):
        value = evaluate(answer.replace(",", "").replace("$", "")[:LONGEST])
        return None if value is None else str(value)
    if kind == "choice":
        return answer.strip("() ").upper()
    return " ".join(answer.lower().split()).removesuffix(".")


def is_answer(gold: str, kind: str, *, choices: str = "ABCDE") -> bool:
    """Whether a right answer is one of its kind, so that an answer can equal it.

    >>> is_answer("1,800", "number"), is_answer("yes", "number"), is_answer("(B)", "choice")
    (True, False, True)
    """
    spelled = canonical(gold, kind)
    if kind == "choice":
        return spelled in tuple(choices)
    return spelled in ("yes", "no") if kind == "yes_no" else bool(spelled)
