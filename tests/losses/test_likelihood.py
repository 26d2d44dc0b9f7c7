"""Cross-entropy, token log-probability and the masked mean against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import losses
from jaxdistill.errors import ConfigError


def _case(*shape, seed=0):
    generator = np.random.default_rng(seed)
    logits = 3 * generator.normal(size=shape)
    return logits, generator.integers(0, shape[-1], size=shape[:-1])


def _log_softmax(logits):
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_the_float64_definition(smoothing):
    logits, labels = _case(3, 4, 11)
    log_q = _log_softmax(logits)
    targets = (1 - smoothing) * np.eye(11)[labels] + smoothing / 11
    values = losses.cross_entropy(logits.astype(np.float32), labels, label_smoothing=smoothing)
    assert values.shape == (3, 4) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, -(targets * log_q).sum(-1), rtol=1e-5)


def test_cross_entropy_gradient_is_the_one_of_optax():
    logits, labels = _case(5, 9)
    logits = jnp.asarray(logits, jnp.float32)

    def optax_loss(logits):
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 9), 0.2)
        return optax.softmax_cross_entropy(logits, targets).sum()

    ours = jax.grad(lambda x: losses.cross_entropy(x, labels, label_smoothing=0.2).sum())(logits)
    np.testing.assert_allclose(ours, jax.grad(optax_loss)(logits), rtol=1e-4, atol=1e-6)


def test_token_log_probability_is_log_softmax_at_the_token():
    logits, labels = _case(2, 3, 7)
    wanted = np.take_along_axis(_log_softmax(logits), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.token_log_probability(logits, labels), wanted, rtol=1e-5)


def test_smoothing_spreads_over_possible_entries_only():
    logits, labels = _case(4, 6)
    padded = np.concatenate([logits, np.full((4, 2), -np.inf)], axis=-1)

    def loss(logits):
        return losses.cross_entropy(logits, labels, label_smoothing=0.3).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(padded, jnp.float32))
    value_short, gradient_short = jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(value, value_short, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :-2], gradient_short, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[:, -2:], 0.0)


def test_a_negative_label_costs_nothing_and_one_beyond_the_vocabulary_is_nan():
    logits = jnp.asarray(_case(3, 5)[0], jnp.float32)
    labels = jnp.array([-100, 2, 5])
    values = losses.cross_entropy(logits, labels)
    assert values[0] == 0.0 and values[1] > 0.0 and jnp.isnan(values[2])
    gradient = jax.grad(lambda x: losses.cross_entropy(x, labels)[:2].sum())(logits)
    np.testing.assert_array_equal(gradient[0], 0.0)


def test_bfloat16_logits_are_raised_to_float32_first():
    logits, labels = _case(4, 33)
    low = jnp.asarray(logits, jnp.bfloat16)
    np.testing.assert_array_equal(
        losses.cross_entropy(low, labels), losses.cross_entropy(low.astype(jnp.float32), labels)
    )


def test_masked_mean_adds_parts_of_unequal_size_exactly():
    values = jnp.arange(12.0).reshape(3, 4)
    mask = jnp.array([[1, 1, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0]], bool)
    whole = losses.masked_mean(values, mask)
    parts = [losses.masked_mean(values[i], mask[i]) for i in range(3)]
    summed = parts[0] + parts[1] + parts[2]
    assert whole.total.dtype == jnp.float32 and whole.count == 7
    np.testing.assert_array_equal(summed.value, whole.value)
    np.testing.assert_allclose(whole.value, np.asarray(values)[np.asarray(mask)].mean())
    # The mean of the parts' means is another number: that is the mistake this type prevents.
    assert abs(np.mean([part.value for part in parts]) - whole.value) > 0.1


def test_masked_mean_weighs_and_ignores_what_lies_under_a_zero():
    values, weights = jnp.array([1.0, jnp.nan, 4.0]), jnp.array([0.5, 0.0, 3.5])
    mean = losses.masked_mean(values, weights)
    np.testing.assert_allclose(mean.value, (0.5 * 1 + 3.5 * 4) / 4.0)
    gradient = jax.grad(lambda v: losses.masked_mean(v, weights).value)(values)
    np.testing.assert_allclose(gradient, [0.125, 0.0, 0.875])


def test_masked_mean_of_nothing_is_zero_with_no_gradient():
    mask = jnp.zeros(3, bool)
    value, gradient = jax.value_and_grad(lambda v: losses.masked_mean(v, mask).value)(jnp.ones(3))
    assert value == 0.0 and not gradient.any() and jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: losses.cross_entropy(np.zeros((2, 3)), np.zeros(3, int)), r"\[2, 3\].*\[3\]"),
        (lambda: losses.cross_entropy(np.zeros((2, 3)), np.zeros(2)), "must be integers"),
        (
            lambda: losses.cross_entropy(np.zeros((2, 3)), np.zeros(2, int), label_smoothing=1.1),
            "label_smoothing = 1.1",
        ),
        (lambda: losses.masked_mean(np.zeros((2, 3)), np.ones(3)), r"values \[2, 3\].*mask \[3\]"),
    ],
)
def test_arguments_that_cannot_be_meant_raise(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
