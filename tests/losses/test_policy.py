"""Policy losses against a golden batch, enumeration and float64 NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.errors import ConfigError
from jaxdistill.losses import POLICIES, Policy

LENGTHS = (2, 3, 1, 3)
RATIOS = ((0.1, -0.3), (0.4, 0.0, -0.1), (-0.5,), (0.25, 0.3, -0.2))
TEACHER = ((-0.5, -1.2), (-2.0, -0.9, -1.1), (-1.0,), (-0.7, -1.3, -0.4))
REWARDS = jnp.array([[1.0, 0.0, 0.0, 1.0]])


def padded(rows, fill=jnp.nan):
    """Rows of the golden batch at length 4; what lies behind them must not matter."""
    return jnp.array([[*row, *[fill] * (4 - len(row))] for row in rows])


MASK = jnp.arange(4)[None] < jnp.array(LENGTHS)[:, None]
NEW = jnp.where(MASK, -1.0, jnp.nan)
OLD = NEW - padded(RATIOS)
GAINS = jnp.broadcast_to(losses.group_advantages(REWARDS).reshape(4, 1), (4, 4))


@pytest.mark.parametrize(
    ("policy", "options", "expected"),
    [
        (Policy(0.2, 0.28, per="sequence"), {}, -0.025331),
        (POLICIES["dapo"], {}, -0.098908),
        (Policy(0.2, 0.28, per="length"), {"max_length": 4}, -0.055636),
        (Policy(0.999, 100.0, ratio="sequence", per="sequence"), {}, -0.068595),
        (POLICIES["gspo"], {}, 0.043214),
        (POLICIES["gspo_token"], {}, 0.043214),
        (Policy(upper=1.28, detached=True), {}, 0.137900),
        (POLICIES["cispo"], {}, 0.124629),
    ],
)
def test_the_golden_batch(policy, options, expected):
    found = losses.policy_loss(NEW, OLD, GAINS, MASK, policy, **options)
    np.testing.assert_allclose(found["loss"].value, expected, atol=2e-6)


def test_the_batch_may_be_split_and_packed_as_it_likes():
    """Each form is a sum over a count: two halves add up, and two sequences may share a row."""
    packed = lambda rows: rows.reshape(2, 8)
    segments = jnp.repeat(jnp.arange(1, 3), 4)[None].repeat(2, 0)
    for name, policy in POLICIES.items():
        call = lambda *arrays, policy=policy, **more: losses.policy_loss(
            *arrays, policy, max_length=4, **more
        )["loss"]
        whole = call(NEW, OLD, GAINS, MASK)
        parts = [call(*(x[i : i + 2] for x in (NEW, OLD, GAINS, MASK))) for i in (0, 2)]
        np.testing.assert_allclose((parts[0] + parts[1]).value, whole.value, rtol=1e-6)
        one = call(*map(packed, (NEW, OLD, GAINS, MASK)), segment_ids=segments)
        np.testing.assert_allclose(one.value, whole.value, rtol=1e-6, err_msg=name)


def test_with_ratio_one_every_form_has_reinforces_gradient_and_nothing_under_the_mask():
    def reinforce(new, policy):
        return losses.per_mean(-GAINS * new, MASK, policy.per, max_length=4).value

    for name, policy in POLICIES.items():
        loss = functools.partial(losses.policy_loss, policy=policy, max_length=4)
        got = jax.grad(lambda new, loss=loss: loss(new, NEW, GAINS, MASK)["loss"].value)(NEW)
        expected = jax.grad(reinforce)(jnp.where(MASK, NEW, 0.0), policy)
        if policy.ratio == "sequence":  # one ratio for all tokens: the mean of their gradients
            expected = jnp.where(MASK, expected.sum(1, keepdims=True) / MASK.sum(1)[:, None], 0.0)
        np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=name)
        assert np.all(np.asarray(got)[~np.asarray(MASK)] == 0.0)


@pytest.mark.parametrize(
    ("ratio", "gain", "moves"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False)],
)
def test_the_clip_stops_only_what_went_far_enough_already(ratio, gain, moves):
    one = jnp.ones((1, 1))
    old = -1.0 - jnp.log(ratio) * one
    loss = lambda new: losses.policy_loss(new, old, gain * one, one > 0)["loss"].value
    assert bool(jax.grad(loss)(-one)[0, 0] != 0) == moves
    shares = losses.policy_loss(-one, old, gain * one, one > 0)
    assert bool(shares["policy/clip_low"].value + shares["policy/clip_high"].value) != moves


def test_the_bound_limits_what_a_negative_advantage_can_push():
    one = jnp.ones((1, 1))
    old = -1.0 - jnp.log(50.0) * one
    value = lambda policy: losses.policy_loss(-one, old, -one, one > 0, policy)["loss"].value
    assert value(Policy()) == pytest.approx(50.0, rel=1e-5)
    assert value(Policy(bound=4.0)) == pytest.approx(4.0, rel=1e-6)


def test_advantages():
    found = losses.group_advantages(REWARDS)
    np.testing.assert_allclose(found, [[0.865875, -0.865875, -0.865875, 0.865875]], atol=1e-6)
    found = losses.group_advantages(jnp.array([[1.0, 0, 0, 0]]))
    np.testing.assert_allclose(found, [[1.4997001, -0.4999, -0.4999, -0.4999]], atol=1e-6)
    found = losses.group_advantages(jnp.array([[1.0, 0, 0, 0]]), scale="none")
    np.testing.assert_allclose(found, [[0.75, -0.25, -0.25, -0.25]], atol=1e-7)
    rewards = np.array([[1.0, 0.0, np.nan, 1.0], [0.1, 0.1, 0.1, 0.1], [3.0, np.nan, np.nan, 2.0]])
    found = np.asarray(losses.group_advantages(jnp.array(rewards)))
    for row, values in zip(found, rewards, strict=True):
        mean, std = np.nanmean(values), np.nanstd(values, ddof=1)
        expected = np.nan_to_num((values - mean) / (std + 1e-4))
        np.testing.assert_allclose(row, expected, atol=1e-5)
    assert losses.spread(jnp.array(rewards)).tolist() == [True, False, True]
    found = np.asarray(losses.group_advantages(jnp.array(rewards), scale="batch"))
    std = np.nanstd(rewards, ddof=1)
    expected = (rewards - np.nanmean(rewards, 1, keepdims=True)) / (std + 1e-4)
    np.testing.assert_allclose(found, np.nan_to_num(expected), atol=1e-5)


def test_a_teachers_number_per_token_becomes_an_advantage():
    teacher = padded(TEACHER)
    gap = losses.teacher_advantages(NEW, teacher, MASK)
    expected = padded([(0.5, -0.2), (-1, 0.1, -0.1), (0,), (0.3, -0.3, 0.6)], 0.0)
    np.testing.assert_allclose(gap, expected, atol=1e-6)
    assert float(-gap.sum() / MASK.sum()) == pytest.approx(0.011111, abs=1e-6)  # KL(q || p)
    expected = padded([(0.4, -0.2), (-0.975, 0.05, -0.1), (0,), (0.3, 0, 0.6)], 0.0)
    found = losses.teacher_advantages(NEW, teacher, MASK, discount=0.5)
    np.testing.assert_allclose(found, expected, atol=1e-6)


Z, Z_T = jnp.array([1.0, 0.5, 0.0, -1.0]), jnp.array([0.2, 1.2, -0.5, 0.3])
REVERSE = jax.grad(lambda z: losses.reverse_kl(z, Z_T))(Z)
FORWARD = jax.grad(lambda z: losses.forward_kl(z, Z_T))(Z)


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k2", REVERSE), ("k3", FORWARD), ("ratio_k3", REVERSE)]
)
def test_the_gradient_of_each_estimator_by_enumeration(estimator, expected):
    """E[grad] over all tokens, weighted by the probability that they were sampled with."""
    q = jax.lax.stop_gradient(jax.nn.softmax(Z))

    def loss(z):
        logq = jax.nn.log_softmax(z)
        return (q * losses.kl_loss(logq, jax.nn.log_softmax(Z_T), estimator=estimator)).sum()

    np.testing.assert_allclose(jax.grad(loss)(Z), expected, atol=1e-6)


def test_the_sampled_teacher_has_the_exact_gradient_in_expectation():
    """A policy gradient with l at the sampled token is that of the exact reverse KL."""
    q, teacher = jax.nn.softmax(Z), jax.nn.log_softmax(Z_T)

    def loss(z):
        logq = jax.nn.log_softmax(z)[:, None]
        ones = jnp.ones((4, 1), bool)
        gains = losses.teacher_advantages(logq, teacher[:, None], ones)
        each = [
            losses.policy_loss(logq[i : i + 1], logq[i : i + 1], gains[i : i + 1], ones[:1])
            for i in range(4)
        ]
        return sum(q[i] * each[i]["loss"].value for i in range(4))

    np.testing.assert_allclose(jax.grad(loss)(Z), REVERSE, atol=1e-6)


MU = jax.nn.log_softmax(Z + jnp.array([0.4, -0.3, 0.2, -0.1]))
LOGQ, LOGP = jax.nn.log_softmax(Z), jax.nn.log_softmax(Z_T)
GAP = LOGP - LOGQ


@pytest.mark.parametrize(
    ("log_mu", "gains", "corrected", "expected"),
    [
        (LOGQ, GAP, False, REVERSE),
        # A reward of -k3 is another objective; a KL that no token decides is a baseline.
        (LOGQ, -(jnp.expm1(GAP) - GAP), False, (0.007026, -0.030031, -0.025534, 0.048539)),
        (LOGQ, jnp.full(4, -0.306657), False, (0.0, 0.0, 0.0, 0.0)),
        # Drawn from another distribution: the ratio, and the advantage of now.
        (MU, GAP, False, (0.311741, -0.246783, 0.024426, -0.089383)),
        (MU, GAP, True, REVERSE),
        (MU, LOGP - MU, True, (0.420168, -0.377633, 0.067385, -0.109920)),
    ],
    ids=["l", "k3 as a reward", "a constant", "no ratio", "ratio", "ratio, l of the sampler"],
)
def test_what_an_advantage_follows_by_enumeration(log_mu, gains, corrected, expected):
    """The specification's values: the expected gradient over all tokens that mu may draw."""
    ones = jnp.ones((4, 1), bool)

    def loss(z):
        new = jax.nn.log_softmax(z)[:, None]
        old = jax.lax.stop_gradient(new)
        weights = losses.sampler_weights(old, log_mu[:, None], ones, upper=1e6).weights
        given = (new, old, gains[:, None], ones)
        each = [
            losses.policy_loss(
                *(one[i : i + 1] for one in given),
                weights=weights[i : i + 1] if corrected else None,
            )["loss"].value
            for i in range(4)
        ]
        return jnp.exp(log_mu) @ jnp.stack(each)

    np.testing.assert_allclose(jax.grad(loss)(Z), expected, atol=2e-6)


def test_the_discount_decides_which_kl_is_followed():
    """Two steps of two tokens: discount 1 is the sequence's KL, discount 0 each position's own."""
    theta = jnp.array([0.3, -0.4, 0.8])  # the logit of token 1; after token 0; after token 1
    teacher = jnp.array([-0.5, 0.6, 0.1])
    say = lambda logits, token: jax.nn.log_sigmoid(jnp.where(token == 1, logits, -logits))
    pairs = jnp.array(list(itertools.product((0, 1), repeat=2)))
    spoken = lambda p: jnp.stack(
        [say(p[0], pairs[:, 0]), say(p[1 + pairs[:, 0]], pairs[:, 1])], axis=1
    )
    chance = jnp.exp(spoken(theta).sum(1))
    ones = jnp.ones((4, 2), bool)

    def loss(p, discount):
        new = spoken(p)
        gains = losses.teacher_advantages(new, spoken(teacher), ones, discount=discount)
        return (chance * (-gains * jnp.exp(new - jax.lax.stop_gradient(new))).sum(1)).sum()

    expected = {1.0: (0.179217, -0.102245, 0.086015), 0.0: (0.195567, -0.102245, 0.086015)}
    for discount, slope in expected.items():
        np.testing.assert_allclose(jax.grad(loss)(theta, discount), slope, atol=2e-6)


def test_corrections_for_another_sampler():
    rng = np.random.default_rng(0)
    old, mu = rng.normal(-1, 0.5, (2, 3, 5))
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], bool)
    gap = np.where(mask, old - mu, 0.0)
    ratio, total = np.exp(gap), np.exp(gap.sum(1))
    mean = np.exp(gap.sum(1) / mask.sum(1))
    bounds = dict(upper=1.3, lower=0.6)
    inside = (mean <= 1.3) & (mean >= 0.6)
    expected = {
        "truncate": np.minimum(ratio, 1.3),
        "mask": np.where((ratio > 1.3) | (ratio < 0.6), 0.0, ratio),
        "sequence_mask": np.where((total > 1.3)[:, None], 0.0, ratio),
        "geometric_mask": np.where(inside[:, None], np.minimum(ratio, 1.3), 0.0),
    }
    assert inside.any() and not inside.all()
    given = np.where(mask, old, np.nan)
    for rule, weights in expected.items():
        found = losses.sampler_weights(given, mu, mask, rule=rule, **bounds)
        np.testing.assert_allclose(found.weights, np.where(mask, weights, 0.0), rtol=1e-6)
        changed = mask & (np.abs(weights - ratio) > 1e-9)
        assert found.at_bound.value == pytest.approx(changed.sum() / mask.sum())
    d = gap[mask]
    assert found.mismatch.value == pytest.approx((np.expm1(d) - d).mean(), rel=1e-5)
    assert found.difference.value == pytest.approx(np.abs(d).mean(), rel=1e-6)
    assert np.all(losses.sampler_weights(old, old, mask).weights == mask)


def test_dpo_against_float64():
    rng = np.random.default_rng(1)
    ours, theirs, first, second = rng.normal(-20, 5, (4, 6))
    margin = 0.3 * ((ours - first) - (theirs - second))
    found = losses.dpo(ours, theirs, first, second, beta=0.3)
    assert found["loss"].value == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)
    assert found["reward/margin"].value == pytest.approx(margin.mean(), rel=1e-5)
    assert found["reward/accuracy"].value == pytest.approx((margin > 0).mean())
    assert found["reward/chosen"].value == pytest.approx(0.3 * (ours - first).mean(), rel=1e-5)
    assert found["reward/rejected"].value == pytest.approx(0.3 * (theirs - second).mean(), rel=1e-5)
    some = np.arange(6) % 2 == 0
    given = np.where(some, ours, np.nan)
    few = losses.dpo(given, theirs, first, second, beta=0.3, mask=some)["loss"]
    assert few.value == pytest.approx(np.log1p(np.exp(-margin))[some].mean(), rel=1e-5)
    slope = jax.grad(lambda c: losses.dpo(c, theirs, first, second, beta=0.3)["loss"].value)
    expected = -0.3 / (1 + np.exp(margin)) / 6
    np.testing.assert_allclose(slope(jnp.array(ours)), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.kl_loss(NEW, NEW, estimator="k1"), "its gradient is 0 in expectation"),
        (lambda: losses.kl_loss(NEW, NEW, estimator="k4"), "must be one of k2, k3, ratio_k3"),
        (lambda: losses.group_advantages(jnp.ones((3, 1))), "sample at least 2"),
        (lambda: losses.group_advantages(REWARDS, scale="row"), "group, batch, none"),
        (lambda: losses.policy_loss(NEW, OLD, GAINS[0], MASK), "must have one shape"),
        (lambda: losses.policy_loss(NEW, OLD, GAINS, MASK, POLICIES["dr_grpo"]), "max_length"),
        (lambda: Policy(bound=1.1), "the clip would never act"),
        (lambda: Policy(lower=1.0), "lower must be in"),
        (lambda: Policy(ratio="rows"), "token, sequence, sequence_token"),
        (lambda: losses.sampler_weights(NEW, OLD, MASK, upper=0.5), "at least 1"),
        (lambda: losses.teacher_advantages(NEW, OLD, MASK, discount=2.0), "must be in .0, 1."),
        (
            lambda: losses.overlong_penalty(jnp.ones(1, int), limit=4, ramp=5),
            "ramp must be in 1 to limit",
        ),
        (lambda: losses.dpo(*[jnp.ones(3)] * 3, jnp.ones(4)), "must be one, .pairs."),
        (lambda: losses.dpo(*[jnp.ones(3)] * 4, beta=0.0), "must be above 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
