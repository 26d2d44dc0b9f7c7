"""The load-balancing loss against closed forms, a loop in float64 and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.errors import ConfigError

DRAW = np.random.default_rng(0)
SCORES = DRAW.normal(size=(3, 2, 7, 5)).astype(np.float32) * 2
MASK = np.arange(7)[None, :] < np.array([[7], [4]])


def loop(scores, chosen, mask):
    """(5) and (6) of the paper, token by token over all layers."""
    experts = scores.shape[-1]
    picked, shares, tokens = np.zeros(experts), np.zeros(experts), 0
    for layer, row, place in np.ndindex(scores.shape[:3]):
        if mask[row, place]:
            one = np.exp(scores[layer, row, place].astype(np.float64))
            tokens += 1
            shares += one / one.sum()
            picked[np.argsort(-one)[:chosen]] += 1
    return experts * (picked / tokens * shares / tokens).sum()


@pytest.mark.parametrize("chosen", [1, 2, 5])
def test_it_equals_a_loop_over_counted_tokens(chosen):
    expected = loop(SCORES, chosen, MASK)
    assert float(losses.load_balancing(SCORES, chosen, MASK)) == pytest.approx(expected, rel=1e-5)
    moved = np.where(MASK[None, ..., None], SCORES, 1e3 * SCORES[::-1])
    assert float(losses.load_balancing(moved, chosen, MASK)) == pytest.approx(expected, rel=1e-5)


def test_what_is_known_of_it():
    even = np.zeros((2, 1, 6, 4), np.float32)  # every expert as probable as any other
    assert float(losses.load_balancing(even, 3, np.ones((1, 6)))) == pytest.approx(3.0)
    one = even + [50.0, 0, 0, 0]  # all tokens to one of four
    assert float(losses.load_balancing(one, 1, np.ones((1, 6)))) == pytest.approx(4.0)
    assert float(losses.load_balancing(one, 1, np.zeros((1, 6)))) == 0.0  # nothing but padding


def test_its_gradient_is_that_of_the_probabilities():
    loss = lambda scores: losses.load_balancing(scores, 2, MASK)
    found = jax.grad(loss)(jnp.asarray(SCORES))
    for place in ((0, 0, 0, 0), (1, 1, 2, 3), (2, 0, 6, 4)):
        moved = [loop(_with(SCORES, place, step), 2, MASK) for step in (1e-3, -1e-3)]
        assert float(found[place]) == pytest.approx((moved[0] - moved[1]) / 2e-3, rel=1e-3)
    assert not np.asarray(found)[:, ~MASK].any()


@pytest.mark.parametrize(
    ("scores", "chosen", "message"),
    [(SCORES, 6, "chosen = 6: must be from 1 to 5"), (SCORES, 0, "chosen = 0"),
     (SCORES[0], 2, r"scores \[2, 7, 5\] and mask \[2, 7\]"),
     (SCORES[:, :1], 2, "must be .layers")],
)  # fmt: skip
def test_what_does_not_fit_is_named(scores, chosen, message):
    with pytest.raises(ConfigError, match=message):
        losses.load_balancing(scores, chosen, MASK)


def _with(scores, place, step):
    moved = scores.astype(np.float64)
    moved[place] += step
    return moved
