"""DistiLLM's replay: when phi rises, who writes, what is met again; the same after going back."""

import json

import numpy as np
import pytest

from jaxdistill.data.prompts import Prompt
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.replay import META, ReplayBuffer, ReplaySettings

PROMPT = Prompt(np.asarray([1], np.int32), {})


def answer(number):
    one = np.asarray([number], np.int32)
    return Answer(PROMPT, number, 0, 0, one, True, one - 1.0, one - 1.0)


def make(capacity=4, schedule="decreasing", start=0.0, updates=20, recalled=100):
    return ReplayBuffer(ReplaySettings(capacity, schedule, start, updates, 0.1, 0.1), 7, recalled)


def numbers(answers):
    return [int(one.tokens[0]) for one in answers]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("decreasing", (0.3, 0.15, 0.0)),
        ("increasing", (0.0, 0.15, 0.3)),
        ("constant", (0.15, 0.15, 0.15)),
    ],
)
def test_the_share_that_writes_anew_follows_its_schedule(schedule, expected):
    """The specification's numbers, phi = 0.3 at the start, the middle and the end."""
    settings = ReplaySettings(4, schedule, 0.3, 20, 0.1, 0.1)
    np.testing.assert_allclose([settings.fresh(0.3, u) for u in (0, 10, 20)], expected, atol=1e-9)


def test_phi_rises_where_the_loss_has_risen_by_the_tolerance_since_the_last_rise():
    replay = make(start=0.85)
    told = []
    for update, loss in enumerate((2.0, 2.05, 2.11, 2.15, 2.3, float("nan"), 2.2, 2.41), start=1):
        replay.evaluated(update, loss)
        told.append(replay.phi(update))
    # Held to 2.0, then to 2.11, 2.3, 2.41; the second rise is cut at 1.
    np.testing.assert_allclose(told, [0.85, 0.85, 0.95, 0.95, 1.0, 1.0, 1.0, 1.0])
    assert replay.kept(9) == {META: {"phi": 1.0, "previous": 2.41}}
    assert replay.kept(3)[META]["previous"] == 2.11


def test_who_writes_and_who_meets_old_answers():
    """By enumeration of r, before and after the buffer is full: rho = phi / 2."""
    replay = make(schedule="constant", start=0.4)
    turns = lambda: [
        "anew" if replay.writes(9, r) else "old" if replay.meets(9, r) else "given"
        for r in (0.0, 0.19, 0.21, 0.39, 0.4, 0.99)
    ]
    replay.push(1, [answer(n) for n in range(3)])
    assert turns() == ["anew"] * 4 + ["given"] * 2
    replay.push(2, [answer(3)])
    assert turns() == ["anew"] * 2 + ["old"] * 2 + ["given"] * 2


def test_old_answers_are_different_ones_each_as_likely_and_drawn_again_alike():
    replay = make(capacity=6)
    replay.push(0, [answer(n) for n in range(9)])  # the first three have gone
    drawn = [numbers(replay.drawn(update, 2)) for update in range(1, 3001)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    found, counts = np.unique(drawn, return_counts=True)
    assert found.tolist() == [3, 4, 5, 6, 7, 8]
    assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(1000 * 2 / 3))  # five deviations
    assert drawn == [numbers(replay.drawn(update, 2)) for update in range(1, 3001)]


def test_who_goes_back_meets_phi_and_buffer_as_they_were():
    replay = make(start=0.5)
    for update in range(6):
        replay.forget(update)
        replay.push(update, [answer(2 * update), answer(2 * update + 1)])
        replay.evaluated(update + 1, 2.0 + 0.2 * update)
    before = numbers(replay.drawn(3, 4)), replay.phi(3)
    assert sorted(before[0]) == [2, 3, 4, 5] and before[1] == pytest.approx(0.7)
    replay.forget(3)
    assert (numbers(replay.drawn(3, 4)), replay.phi(3)) == before
    replay.push(3, [answer(60), answer(61)])
    replay.evaluated(4, 9.0)
    replay.evaluated(4, 9.0)  # measured again: the same mark, not another one
    assert replay.phi(4) == pytest.approx(0.8)
    assert sorted(numbers(replay.drawn(4, 4))) == [4, 5, 60, 61]


def test_a_checkpoint_holds_all_of_it():
    replay = make(start=0.5)
    assert replay.packed(0) is None
    for update in range(4):
        replay.push(update, [answer(2 * update), answer(2 * update + 1)])
        replay.evaluated(update + 1, 2.0 + 0.2 * update)
    stored = json.loads(json.dumps([replay.kept(4), replay.packed(4)]))
    other = make(start=0.1)
    other.begin(*stored, lambda place: PROMPT)
    for update in (4, 5):
        assert numbers(other.drawn(update, 3)) == numbers(replay.drawn(update, 3))
        assert other.phi(update) == replay.phi(update)
        assert other.packed(update) == replay.packed(update)
    for one in (replay, other):
        one.evaluated(5, 2.65)
    assert other.kept(5) == replay.kept(5)
