"""pass@k and maj@k of held-out questions against counts by hand."""

import numpy as np
import pytest

from jaxdistill.data.prompts import Prompt, Prompts
from jaxdistill.reasoning.judging import Verdict
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.questions import FIRST_PLACE, Questions
from jaxdistill.rollouts.writing import Writer

SAID = {"7": ["7", "7", "8"], "5": ["4", "4", "5"], "3": ["x", "y", "z"]}


class Scribe(Writer):
    """Gives the answers of SAID, spelled as bytes, in the order of places and samples."""

    def __init__(self):
        pass

    def write(self, params, version, prompts):
        assert list(prompts) == [FIRST_PLACE, FIRST_PLACE + 1, FIRST_PLACE + 2]
        none = np.zeros(2, np.float32)
        return [
            Answer(
                prompt, place, n, version, np.asarray([ord(text), 0], np.int32), True, none, none
            )
            for place, prompt in prompts.items()
            for n, text in enumerate(SAID[prompt.notes["answer"]])
        ]


def judge(answers):
    said = [(chr(one.tokens[0]), one.prompt.notes["answer"]) for one in answers]
    return [
        Verdict(None, (None,), "failed")
        if text == "z"
        else Verdict(float(text == gold), (text == gold,))
        for text, gold in said
    ]


def test_shares_are_of_answers_of_questions_and_of_votes():
    asked = Prompts([Prompt(np.ones(1, np.int32), {"answer": gold}) for gold in SAID], "")
    decode = lambda ids: "".join(map(chr, ids))
    questions = Questions(asked, Scribe(), judge, decode, samples=3, kind="number")
    found = questions.measure(None, 5)
    assert questions.shown == [
        {"prompt": "\x01", "wanted": "7", "right": "7", "wrong": "8"},
        {"prompt": "\x01", "wanted": "5", "right": "5", "wrong": "4"},
        {"prompt": "\x01", "wanted": "3", "wrong": "x"},
    ]
    assert found["eval/pass_at_1"] == pytest.approx(3 / 9)
    assert found["eval/pass_at_3"] == pytest.approx(2 / 3)
    assert found["eval/maj_at_3"] == pytest.approx(1 / 3)
    assert found["eval/reward_mean"] == pytest.approx(3 / 8)  # of what could be judged
    assert found["eval/answer_length"] == 2
