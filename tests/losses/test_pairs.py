"""DistiLLM and DistiLLM-2: means over tokens, responses and pairs, and what is a constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import linear_divergence
from jaxdistill.losses import whole_rows

B, L, V = 3, 5, 11


def _response(seed, lengths, length=L):
    rng = np.random.default_rng(seed)
    student, teacher = (
        jnp.asarray(2 * rng.normal(size=(B, length, V)), jnp.float32) for _ in range(2)
    )
    return losses.Response(student, teacher, np.arange(length) < np.array(lengths)[:, None])


def _softmax(x):
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _kl(a, b):
    return (a * np.log(a / b)).sum(-1)


def _by_hand(chosen, rejected, a, b, balance):
    """The loss as loops over pairs, in float64."""
    total = 0.0
    for i in range(B):
        for response, weight in ((chosen, 2 - balance), (rejected, balance)):
            q, p = (_softmax(x[i])[response.mask[i]] for x in response[:2])
            if response is chosen:
                values = _kl(p, a * p + (1 - a) * q)
            else:
                values = _kl(q, (1 - b) * p + b * q)
            total += weight * values.mean()
    return total / B


def test_pairs_are_means_of_responses():
    chosen, rejected = _response(0, [5, 2, 1]), _response(1, [1, 7, 3], length=7)
    means = losses.distillm2(chosen, rejected, skew_chosen=0.1, skew_rejected=0.2, balance=1.2)
    wanted = _by_hand(chosen, rejected, 0.1, 0.2, 1.2)
    np.testing.assert_allclose(means["loss"].value, wanted, rtol=2e-6)
    assert [float(m.count) for m in means.values()] == [3, 3, 3]
    parts = 0.8 * means["loss/chosen"].value + 1.2 * means["loss/rejected"].value
    np.testing.assert_allclose(parts, means["loss"].value, rtol=1e-6)


def test_a_skew_per_response_is_that_responses():
    chosen, rejected = _response(0, [5, 2, 4]), _response(1, [1, 4, 3])
    skews = jnp.array([0.05, 0.1, 0.3])
    together = losses.distillm2(chosen, rejected, skew_chosen=skews, skew_rejected=skews)["loss"]
    one = lambda r, i: losses.Response(*(x[i : i + 1] for x in r))
    apart = [
        losses.distillm2(one(chosen, i), one(rejected, i), skew_chosen=a, skew_rejected=a)["loss"]
        for i, a in enumerate([0.05, 0.1, 0.3])
    ]
    np.testing.assert_allclose(together.value, np.mean([m.value for m in apart]), rtol=1e-6)


def test_micro_batches_add_up_and_an_empty_response_counts_nothing():
    chosen, rejected = _response(0, [5, 0, 0]), _response(1, [1, 4, 0])
    spoiled = losses.Response(chosen[0].at[1:].set(jnp.nan), *chosen[1:])
    means = losses.distillm2(spoiled, rejected)
    assert [float(m.count) for m in means.values()] == [2, 1, 2]
    parts = [
        losses.distillm2(
            losses.Response(*(x[rows] for x in chosen)),
            losses.Response(*(x[rows] for x in rejected)),
        )["loss"]
        for rows in (slice(0, 1), slice(1, 3))
    ]
    np.testing.assert_allclose((parts[0] + parts[1]).value, means["loss"].value, rtol=1e-6)

    empty = _response(0, [0, 0, 0])

    def loss(student):
        response = losses.Response(student, *empty[1:])
        return losses.distillm2(response, response)["loss"].value

    value, slope = jax.value_and_grad(loss)(empty.student_logits)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def test_the_student_within_the_second_mixture_is_a_constant():
    """The gradient is q (h - <q, h>), h = log q - log m; through both places it is another."""
    rng = np.random.default_rng(0)
    student, teacher, b, step = rng.normal(size=7), rng.normal(size=7), 0.3, 1e-6
    q = _softmax(student)
    mixture = (1 - b) * _softmax(teacher) + b * q  # stays where it is as the student moves

    with jax.enable_x64(True):
        loss = lambda s: losses.detached_skew_reverse_kl(s, jnp.asarray(teacher), skew=b)
        ours = jax.grad(loss)(jnp.asarray(student))
        through_both = jax.grad(losses.skew_reverse_kl)(
            jnp.asarray(student), jnp.asarray(teacher), skew=b
        )
    at = lambda shift: _kl(_softmax(student + shift), mixture)
    numeric = [(at(step * row) - at(-step * row)) / (2 * step) for row in np.eye(7)]
    np.testing.assert_allclose(ours, numeric, rtol=1e-6, atol=1e-9)
    h = np.log(q) - np.log(mixture)
    np.testing.assert_allclose(ours, q * (h - (q * h).sum()), rtol=1e-10)
    assert np.abs(ours - through_both).max() > 1e-3


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_distillm_is_a_mean_over_all_tokens(direction):
    response = _response(0, [5, 2, 1])
    q, p = (_softmax(x)[response.mask] for x in response[:2])
    wanted = _kl(p, 0.1 * p + 0.9 * q) if direction == "forward" else _kl(q, 0.9 * p + 0.1 * q)
    mean = losses.distillm(*response, direction=direction)
    np.testing.assert_allclose(mean.value, wanted.mean(), rtol=2e-6)
    assert mean.count == 8


def test_the_fused_head_takes_the_same_weights():
    """One side of the pair from hidden states: [B L, V] never exists."""
    rng = np.random.default_rng(0)
    hs, ht, ws, wt = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, L, 4), (B, L, 6), (V, 4), (V, 6))
    )
    mask = np.arange(L) < np.array([5, 2, 1])[:, None]
    response = losses.Response(hs @ ws.T, ht @ wt.T, mask)
    wanted = losses.distillm2(response, response)["loss/rejected"].value
    fused, _ = linear_divergence(
        hs, ws, ht, wt, mask=losses.sequence_weights(mask), chunk=4,
        kind=whole_rows.bound("detached_skew_reverse_kl", skew=0.1),
    )  # fmt: skip
    np.testing.assert_allclose(fused, wanted, rtol=2e-6)


def test_the_curriculum_of_the_skew_shrinks_as_the_student_comes_near():
    teacher = jnp.log(jnp.array([0.5, 0.5, 0.5, 0.5]))
    student = jnp.log(jnp.array([0.3, 0.31, 0.499, 0.6]))
    skew = losses.distillm2_skew(teacher, student, 0.2)
    # At the first gap the skew itself; a student ahead of its teacher has it too.
    wanted = [0.1, 1 - 0.9 * 0.2 / 0.19001, 0.01, 0.1]
    np.testing.assert_allclose(skew, np.clip(wanted, 0.01, 0.1), rtol=1e-4)
    assert np.isfinite(losses.distillm2_skew(teacher, teacher - 1e-5, 0.0)).all()
    slope = jax.grad(lambda s: losses.distillm2_skew(teacher, s, 0.2).sum())(student)
    np.testing.assert_array_equal(slope, 0)


def test_the_rejected_side_gains_weight_until_the_middle_of_the_run():
    balance = losses.distillm2_balance(np.array([0.0, 0.25, 0.5, 1.0, 3.0]))
    np.testing.assert_allclose(balance, [1.0, 1.25, 1.5, 1.5, 1.5])


def test_pairs_run_in_jit_vmap_and_grad():
    chosen, rejected = _response(0, [5, 2, 1]), _response(1, [1, 4, 3])
    loss = lambda chosen, rejected: losses.distillm2(chosen, rejected)["loss"].value
    plain = loss(chosen, rejected)
    np.testing.assert_allclose(jax.jit(loss)(chosen, rejected), plain, rtol=1e-6)
    stack = lambda r: losses.Response(*(jnp.stack([x, x]) for x in r))
    np.testing.assert_allclose(jax.vmap(loss)(stack(chosen), stack(rejected)), [plain] * 2, 1e-6)
    slope = jax.grad(lambda s: loss(losses.Response(s, *chosen[1:]), rejected))(chosen[0])
    np.testing.assert_array_equal(slope[~chosen.mask], 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda r: losses.distillm(*r, direction="both"), "must be one of forward, reverse"),
        (lambda r: losses.distillm(*r, skew=1.5), "skew = 1.5"),
        (lambda r: losses.distillm2(r, r, skew_rejected=-0.1), "skew = -0.1"),
        (
            lambda r: losses.distillm2(r, losses.Response(*(x[:2] for x in r))),
            "3 chosen and 2 rejected",
        ),
        (lambda r: losses.distillm(*r[:2], r.mask[:, 1:]), "must have one shape"),
        (lambda r: losses.distillm2_skew(jnp.ones(2), jnp.ones(3), 0.1), "must have one shape"),
        (lambda r: losses.distillm2_skew(0.0, 0.0, 0.1, skew=0.0), "smallest = 0.01, skew = 0.0"),
    ],
)
def test_arguments_that_cannot_be_meant_raise(call, message):
    with pytest.raises(ConfigError, match=message):
        call(_response(0, [5, 2, 1]))


def test_several_responses_share_a_row():
    mask = np.array([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1]], bool)
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 3, 3]])
    wanted = [[0.5, 0.5, 0, 1, 0, 0], [0, 0.5, 0.5, 1, 0.5, 0.5]]
    np.testing.assert_allclose(losses.sequence_weights(mask, segments), wanted)
    with pytest.raises(ValueError, match="one shape"):
        losses.sequence_weights(mask, segments[:, :-1])
