"""What an answer earns, as a number: whether it is right, whether it has a form, how long it is.

Everything here runs in a process that can be killed; `judging` keeps those processes.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxdistill.errors import ConfigError
from jaxdistill.reasoning import extract, verifiers

THINKING = r"\s*<think>.*?</think>\s*\S.*"


def rate(name: str, options: Mapping[str, Any], completion: str, gold: str | None) -> float:
    """The number that a scorer gives an answer; what goes in and comes out is JSON.

    Args:
      name: a key of SCORERS.
      options: of the scorer.
      completion: the answer.
      gold: the right answer; None for the scorers that need none.
    """
    return _made(name, tuple(sorted(options.items())))(completion, gold)


@functools.lru_cache(maxsize=256)
def _made(name: str, options: tuple[tuple[str, Any], ...]) -> Callable[[str, str | None], float]:
    return SCORERS[name](**dict(options))


def _right(make: Callable[..., verifiers.VerifierFunction]) -> Callable[..., Callable]:
    """1 for a right answer, 0 for a wrong one, by a verifier."""

    def scorer(**options: Any) -> Callable[[str, str], float]:
        verify = make(**options)
        return lambda completion, gold: float(verify(completion, gold).correct)

    return scorer


def regex(pattern: str) -> Callable[[str, str], float]:
    """1 where the last match, or its first group, equals the gold text."""
    compiled(pattern)

    def score(completion: str, gold: str) -> float:
        match = verifiers.search(pattern, completion[-extract.LONGEST :])
        answer = extract.canonical(match, "text")
        return float(answer is not None and answer == extract.canonical(gold, "text"))

    return score


def form(pattern: str = THINKING) -> Callable[[str, str | None], float]:
    """1 where the whole answer has a form; by default thinking in its tags, then an answer."""
    wanted = compiled(pattern)
    return lambda completion, gold: float(wanted.fullmatch(completion) is not None)


def length(limit: int, ramp: int) -> Callable[[str, str | None], float]:
    """0 up to limit - ramp characters, then falling evenly to -1 at limit, and -1 beyond.

    Raises:
      ConfigError: unless 0 < ramp <= limit.
    """
    if not 0 < ramp <= limit:
        raise ConfigError(f"length: limit = {limit}, ramp = {ramp}: ramp must be in 1 to limit")
    return lambda completion, gold: min(0.0, max(-1.0, (limit - ramp - len(completion)) / ramp))


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern whose dot matches line ends too.

    Raises:
      ConfigError: if it is no regular expression.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r}: {error}") from error


SCORERS: Mapping[str, Callable[..., Callable[[str, Any], float]]] = {
    **{
        kind: _right(functools.partial(verifiers.exact, kind))
        for kind in ("number", "yes_no", "expression")
    },
    "exact": _right(verifiers.exact),
    "choice": _right(verifiers.choice),
    "numeric": _right(verifiers.numeric),
    "regex": regex,
    "format": form,
    "length": length,
}
MATH = "math"  # by math-verify, in processes of its own
NEED_NO_ANSWER = ("format", "length")


def check(name: str, options: Mapping[str, Any]) -> str | None:
    """What is wrong with a scorer's options, or None; of a function there are none."""
    if name == MATH:
        return f"takes no {', '.join(options)}" if options else None
    if name not in SCORERS:
        return f"takes no {', '.join(options)}: a function gets the record" if options else None
    for key, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{key} = {value}: must be finite"
    try:
        SCORERS[name](**options)
    except ConfigError as error:
        return str(error)
    except TypeError as error:
        return f"its options are not these: {str(error).rpartition(') ')[2] or error}"
    return None
