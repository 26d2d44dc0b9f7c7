"""Verdicts: decided once for the same answers, on the disk before they are used, torn or whole."""

import json

import numpy as np
import pytest

from jaxdistill.data.prompts import Prompt
from jaxdistill.reasoning.judging import TIMED_OUT, Verdict
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.verdicts import FILE, Verdicts


def answer(*tokens, ended=True, gold="5"):
    prompt = Prompt(np.array([1, 2], np.int32), {"answer": gold})
    ids = np.array(tokens, np.int32)
    none = np.zeros(len(ids), np.float32)
    return Answer(prompt, 0, 0, 0, ids, ended, none, none)


class Judges:
    """Gives the number of its questions so far, and once no reward at all."""

    def __init__(self):
        self.asked = []

    def __call__(self, questions):
        self.asked += questions
        number = len(self.asked)
        late = Verdict(None, (None,), TIMED_OUT)
        return [late if one.answer == "9" else Verdict(0.1 * number, (0.1,)) for one in questions]


def opened(folder):
    judges = Judges()
    decode = lambda ids: " ".join(map(str, ids))
    return judges, Verdicts(lambda: judges, decode, folder)


def test_the_same_answers_are_judged_once_whoever_asks(tmp_path):
    judges, verdicts = opened(tmp_path)
    first = [answer(3, 4), answer(9, 0), answer(3, 4, ended=False)]
    found = verdicts(first)
    assert [one.answer for one in judges.asked] == ["3", "9", "3 4"]  # without the end
    assert {one.prompt for one in judges.asked} == {"1 2"}
    assert [one.reason for one in found] == [None, TIMED_OUT, None]
    assert verdicts(first) == found and len(judges.asked) == 3
    later, again = opened(tmp_path)
    assert again(first) == found and not later.asked
    again([*first[:2], answer(3, 4, ended=False, gold="6")])  # another record
    assert len(later.asked) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "{}\n[]\nnull\n" + text.replace("0.3", '"x"'),
        lambda text: text.replace(TIMED_OUT, "poem"),
    ],
)
def test_what_is_no_verdict_is_judged_again(damage, tmp_path):
    _, verdicts = opened(tmp_path)
    first = [answer(3, 4), answer(9, 0), answer(5, 0)]
    found = verdicts(first)
    path = tmp_path / FILE
    path.write_text(damage(path.read_text()))
    judges, again = opened(tmp_path)
    assert again(first) == found and len(judges.asked) == 3
    last = path.read_text().splitlines()[-1]
    assert len(json.loads(last)["verdicts"]) == 3  # a whole line behind what was torn
    judges, third = opened(tmp_path)
    assert third(first) == found and not judges.asked
