"""Answers behind the teacher's prompts in both views, and right answers of a group as contexts."""

import dataclasses

import numpy as np
import pytest

from jaxdistill.data.prompts import Prompt
from jaxdistill.reasoning.judging import Verdict
from jaxdistill.rollouts import siblings
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.rows import buckets, rows_of

SHAPE = {"seq_len": 16, "pad": 0, "packing_by": "best_fit", "distilled": None, "second": (24, 9)}


def answer(tokens, prompt=(5, 6), context=(7, 7, 5, 6), sample=0):
    values = np.asarray(tokens, np.float32)
    asked = Prompt(np.asarray(prompt, np.int32), {}, context and np.asarray(context, np.int32))
    tokens = np.asarray(tokens, np.int32)
    return Answer(asked, 0, sample, 0, tokens, True, -values, -values - 0.5)


def rows(answers, **options):
    made, logprobs = rows_of(answers, sizes=buckets(8, 1), **{**SHAPE, **options})
    return made, logprobs


@pytest.mark.parametrize("skip", [0, 2])
def test_every_answer_stands_token_by_token_behind_both_prompts(skip):
    rng = np.random.default_rng(0)
    answers = [
        answer(rng.integers(10, 99, size), (5,) * own, (7,) * more)
        for size, own, more in ((3, 2, 4), (5, 1, 9), (2, 4, 1), (4, 3, 12), (1, 2, 2))
    ]
    made, logprobs = rows(answers, skip=skip)
    met = []
    for row, q in zip(made, logprobs, strict=True):
        view = row["second"]
        assert (row["groups"] > 0).sum() == (view["groups"] > 0).sum()
        for group in range(1, row["groups"].max() + 1):
            (place,), (other,) = (
                np.flatnonzero(g == group) for g in (row["groups"], view["groups"])
            )
            assert row["tokens"][place] == view["tokens"][other] == row["targets"][place - 1]
            assert row["segment_ids"][place] == view["segment_ids"][other]
        for number in range(1, row["segment_ids"].max() + 1):
            mine, theirs = row["segment_ids"] == number, view["segment_ids"] == number
            tokens, others = row["tokens"][mine], view["tokens"][theirs]
            one = next(a for a in answers if np.array_equal(tokens[-len(a.tokens) :], a.tokens))
            np.testing.assert_array_equal(tokens, np.r_[one.prompt.tokens, one.tokens])
            np.testing.assert_array_equal(others, np.r_[one.prompt.context, one.tokens])
            np.testing.assert_array_equal(view["positions"][theirs], np.arange(len(others)))
            counted = np.flatnonzero(row["mask"] & mine)
            assert len(counted) == max(len(one.tokens) - skip, 0)
            np.testing.assert_array_equal(row["targets"][counted], one.tokens[skip:])
            np.testing.assert_array_equal(q[counted], one.logprobs[skip:])
            met.append(one)
        assert (view["tokens"][view["segment_ids"] == 0] == 9).all()
        assert (q[~row["mask"]] == 0).all()
    assert len(met) == len(answers)


def test_a_row_has_no_more_than_the_teachers_row_holds():
    answers = [answer((1, 2), (5,), (7,) * 18) for _ in range(3)]
    made, _ = rows(answers)
    assert [row["segment_ids"].max() for row in made] == [1, 1, 1]
    made, _ = rows(answers, second=(60, 9))
    assert len(made) == 1 and made[0]["segment_ids"].max() == 3


def group(*right):
    """Answers of a group, some of them right: n + 1 tokens of the number n + 1 each."""
    told = lambda text: np.asarray([ord(text[0]), len(text)], np.int32)
    answers = [answer((n + 1,) * (n + 1), context=None, sample=n) for n in range(len(right))]
    answers = [
        dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, with_sibling=told))
        for one in answers
    ]
    return answers, [Verdict(float(yes), (float(yes),), None) for yes in right]


def contexts(right, samples):
    answers, verdicts = group(*right)
    decode = lambda tokens: "abcdefgh"[tokens[0] - 1] * len(tokens)
    found = siblings.told(answers, verdicts, samples, decode)
    share = siblings.share(found)
    return [None if a.prompt.context is None else chr(a.prompt.context[0]) for a in found], share


def test_the_next_right_answer_of_the_group_is_told_and_never_ones_own():
    found, share = contexts((0, 1, 0, 1, 1, 0, 0, 0), 4)
    assert found == ["b", "d", "d", "b", None, "e", "e", "e"] and share == 7 / 8
    assert contexts((0, 0, 0, 0), 2) == ([None] * 4, 0.0)


def test_an_answer_whose_teacher_is_told_nothing_is_in_no_group():
    answers, verdicts = group(1, 0)
    full = lambda text: "too long: told so"
    untold = [
        dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, with_sibling=full))
        for one in answers
    ]
    decode = lambda tokens: "x"
    assert siblings.share(siblings.told(untold, verdicts, 2, decode)) == 0
    made, _ = rows(siblings.told(answers, verdicts, 2, decode), packing_by="none")
    for row in made:
        told = 2 if 2 in row["tokens"] else 0
        assert (row["groups"] > 0).sum() == (row["second"]["groups"] > 0).sum() == told
        assert row["mask"].sum() == (2 if told else 1)
