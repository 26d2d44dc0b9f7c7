"""Verdicts: decided once for the same answers, on the disk before they are used, torn or whole."""

import json
import os

import numpy as np
import pytest

from jaxdistill.data.prompts import Prompt
from jaxdistill.errors import StorageError
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
    return judges, Verdicts(lambda: judges, decode, folder, 1)


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
        lambda text: text.replace("[0.3", f"[{10**400}"),
        lambda text: text.replace("[0.3", "[1e30"),
        lambda text: text.replace("[0.3", "[NaN"),
        lambda text: text.replace("[0.3", "[null"),
        lambda text: text.replace("[0.3", "[true"),
        lambda text: text.replace("[[0.3", "[[[0.3]]"),
        lambda text: text.replace("[null, [null]", "[null, [null, null]"),
        lambda text: text.replace(TIMED_OUT, "\\ud800"),
        lambda text: text.replace('"verdicts"', '"answers": "a", "verdicts"'),
        lambda text: text.replace('"verdicts": [', '"verdicts": [[0.1, [0.1], null], '),
        lambda text: text.replace('"verdicts"', '"verdict"'),
        lambda text: "[" * 100_000 + text,
        lambda text: text.encode("utf-16"),
    ],
)
def test_what_is_no_verdict_is_judged_again(damage, tmp_path):
    _, verdicts = opened(tmp_path)
    first = [answer(3, 4), answer(9, 0), answer(5, 0)]
    found = verdicts(first)
    path = tmp_path / FILE
    damaged = damage(path.read_text())
    assert damaged != path.read_text()
    path.write_bytes(damaged.encode() if isinstance(damaged, str) else damaged)
    judges, again = opened(tmp_path)
    assert again(first) == found and len(judges.asked) == 3
    last = path.read_bytes().splitlines()[-1]
    assert len(json.loads(last)["verdicts"]) == 3  # a whole line behind what was torn
    judges, third = opened(tmp_path)
    assert third(first) == found and not judges.asked


def test_damaged_lines_are_reported_and_a_torn_one_is_not(tmp_path, caplog):
    _, verdicts = opened(tmp_path)
    first = [answer(3, 4)]
    verdicts(first)
    path = tmp_path / FILE
    whole = path.read_text()
    path.write_text(whole + whole[:-9])
    opened(tmp_path)[1](first)
    assert not caplog.records
    path.write_text(whole.replace("0.1", "0.x") + whole)
    opened(tmp_path)[1](first)
    (record,) = caplog.records
    assert "1 lines are damaged, the first at byte 0" in record.getMessage()


def test_what_was_damaged_since_it_was_read_is_judged_again(tmp_path):
    judges, verdicts = opened(tmp_path)
    first = [answer(3, 4)]
    found = verdicts(first)
    path = tmp_path / FILE
    path.write_text(path.read_text().replace("0.1", "0.x"))
    assert len(verdicts(first)) == len(found) and len(judges.asked) == 2
    assert verdicts(first) and len(judges.asked) == 2


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(StorageError, match=f"{FILE}: cannot be read: it is no regular file"):
        opened(tmp_path)[1]([answer(3, 4)])
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).symlink_to("missing/file")
    with pytest.raises(StorageError, match=f"{FILE}: cannot be written"):
        opened(tmp_path)[1]([answer(3, 4)])


def test_a_long_run_keeps_places_and_no_verdicts(tmp_path):
    _, verdicts = opened(tmp_path)
    many = [[answer(*range(3, 3 + size))] * 50 for size in range(1, 60)]
    found = [verdicts(one) for one in many]
    held = [len(words) for words in map(repr, vars(verdicts).values())]
    assert sum(held) < (tmp_path / FILE).stat().st_size / 10
    assert [verdicts(one) for one in many] == found
    assert [opened(tmp_path)[1](one) for one in many[::20]] == found[::20]
