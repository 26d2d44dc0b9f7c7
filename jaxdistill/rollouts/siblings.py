"""A right answer of the same group as what the teacher is told: SDPO's privileged context."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxdistill.reasoning.judging import Verdict
from jaxdistill.rollouts.answers import Answer


def told(
    answers: Sequence[Answer],
    verdicts: Sequence[Verdict],
    samples: int,
    decode: Callable[[np.ndarray], str],
) -> list[Answer]:
    """The answers, each behind a prompt whose teacher is told another right one of its group.

    Right is what the first verifier gave 1. The next right one is taken, in the order of the group
    and round its end, never the answer itself. Where there is none, or no room for it, the teacher
    is told nothing.

    Args:
      answers: group by group, of prompts with `Prompt.with_sibling`.
      verdicts: of each.
      samples: answers in a group.
      decode: tokens -> text, without special tokens.
    """
    right = [one.values[0] is not None and one.values[0] >= 1 for one in verdicts]
    return [
        _behind(answer, _next(answers, right, place, samples), decode)
        for place, answer in enumerate(answers)
    ]


def _next(
    answers: Sequence[Answer], right: Sequence[bool], place: int, samples: int
) -> Answer | None:
    """The right answer that follows in the group of the answer at a place."""
    first = place - place % samples
    others = (first + (place - first + step) % samples for step in range(1, samples))
    return next((answers[one] for one in others if right[one]), None)


def _behind(answer: Answer, sibling: Answer | None, decode: Callable[[np.ndarray], str]) -> Answer:
    make = answer.prompt.with_sibling
    assert make is not None, "prompts are read for it"
    context = None if sibling is None else make(decode(sibling.tokens).strip())
    context = None if isinstance(context, str) else context
    return dataclasses.replace(answer, prompt=dataclasses.replace(answer.prompt, context=context))


def share(answers: Sequence[Answer]) -> float:
    """The share of answers whose teacher is told something."""
    return sum(one.prompt.context is not None for one in answers) / len(answers)
