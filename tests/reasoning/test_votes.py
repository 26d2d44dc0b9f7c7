"""Majorities, pass@k and intervals against counting."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.reasoning import votes


def test_majority_ties_go_to_the_first_seen():
    assert votes.majority(["b", "a", "a", "b"]) == "b"
    assert votes.majority([None, None, "a"]) == "a"
    assert votes.majority([]) is None


def test_maj_at_k_votes_in_groups():
    rows = [["1", "2", "2", "1", "1", "3"], [None] * 6]
    np.testing.assert_allclose(votes.maj_at_k(rows, ["1", "1"], 3), [0.5, 0.0])
    np.testing.assert_allclose(votes.maj_at_k(rows, ["1", None], 1), [0.5, 0.0])
    np.testing.assert_allclose(votes.maj_at_k(rows[:1], ["2"], 4), [0.0])  # 1 2 2 1: first seen
    with pytest.raises(ValueError, match="k = 7 needs"):
        votes.maj_at_k(rows, ["1", "1"], 7)


@given(st.integers(1, 7), st.integers(0, 7), st.integers(1, 7))
def test_pass_at_k_counts_subsets(samples, correct, k):
    if correct > samples or k > samples:
        with pytest.raises(ValueError, match="do not go together"):
            votes.pass_at_k(samples, correct, k)
        return
    subsets = list(itertools.combinations(range(samples), k))
    share = sum(any(index < correct for index in subset) for subset in subsets) / len(subsets)
    assert votes.pass_at_k(samples, correct, k) == pytest.approx(share)


def test_intervals_hold_their_level():
    rng = np.random.default_rng(0)
    inside = 0
    for hits in rng.binomial(40, 0.3, 2000):
        low, high = votes.wilson(int(hits), 40)
        inside += low <= 0.3 <= high
    assert 0.93 < inside / 2000 < 0.975
    assert votes.wilson(0, 0) == (0.0, 1.0)
    low, high = votes.bootstrap(rng.random(400))
    assert low < 0.5 < high and 0.04 < high - low < 0.08
    assert votes.bootstrap([1.0] * 5) == (1.0, 1.0)
