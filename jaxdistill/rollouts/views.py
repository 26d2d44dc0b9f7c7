"""Answers in the tokens of two models: those that can be compared, and how many are set aside."""

import collections
import logging
from collections.abc import Sequence
from typing import NamedTuple

from jaxdistill.data import quarantine, rules
from jaxdistill.data.encode import Beside
from jaxdistill.rollouts.answers import Answer

_log = logging.getLogger(__name__)
_WHY = ("unaligned", "too_long")  # of `quarantine.why`


class Views(NamedTuple):
    """What a step learns from of answers.

    Attributes:
      answers: that are compared.
      beside: of each, behind its prompt, the tokens of the teacher.
      numbers: for the record: of all answers the shares that are set aside.
    """

    answers: list[Answer]
    beside: list[Beside]
    numbers: dict[str, float]


class Aligner:
    """Gives answers in the tokens of both models: a function of the answers' tokens alone.

    The first reason why an answer is set aside is told, once.

    Args:
      distilled: so many tokens of each answer count; None: all.
    """

    def __init__(self, distilled: int | None):
        self._distilled, self._told = distilled, False

    def __call__(self, answers: Sequence[Answer]) -> Views:
        """What is learned of the answers of a batch.

        Args:
          answers: of prompts with `Prompt.view`; at least one.
        """
        kept: list[Answer] = []
        beside: list[Beside] = []
        left: collections.Counter[str] = collections.Counter()
        for answer in answers:
            view, most = answer.prompt.view, self._distilled or len(answer.tokens)
            assert view is not None, "prompts are read for it"
            made = view.document(answer.tokens, answer.ended, most)
            if isinstance(made, str):
                left[quarantine.why(made)] += 1
                self._tell(made)
                continue
            assert made.beside is not None, "it was aligned"
            kept.append(answer)
            beside.append(made.beside)
        numbers = {f"rollout/{name}": left[name] / len(answers) for name in _WHY}
        return Views(kept, beside, numbers)

    def _tell(self, reason: str) -> None:
        if not self._told:
            _log.warning(
                "rollout: answers that cannot be compared with the teacher's tokens count nothing "
                "(rollout/unaligned, rollout/too_long); the first: %s",
                rules.printable(reason),
            )
        self._told = True
