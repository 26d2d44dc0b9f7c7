"""CTKD's temperature: its range, its curriculum, and whose gradient is reversed."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.errors import ConfigError

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "ctkd.json").read_text())


def test_temperature_and_curriculum_are_the_reference_codes():
    np.testing.assert_allclose(losses.ctkd_temperature(1.0), GOLDEN["temperature"], rtol=1e-7)
    table = losses.cosine_lambda(np.arange(11) / 10)
    np.testing.assert_allclose(table, GOLDEN["lambda"], atol=1e-6)
    np.testing.assert_array_equal(losses.cosine_lambda(np.array([-1.0, 7.0])), [0.0, -1.0])


def test_the_temperature_stays_within_its_range():
    w = jnp.array([-1e30, -100.0, 0.0, 100.0, 1e30])
    run = jax.value_and_grad(lambda w: losses.ctkd_temperature(w, t_start=2.0, t_range=3.0).sum())
    np.testing.assert_allclose(
        losses.ctkd_temperature(w, t_start=2.0, t_range=3.0), [2, 2, 3.5, 5, 5], atol=1e-6
    )
    assert np.isfinite(run(w)[1]).all()
    assert losses.ctkd_temperature(w.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("factor", [-1.0, -0.3, 0.0, 1.0])
def test_the_slope_is_the_factor_times_that_of_the_loss(factor):
    """d w == lambda times the finite difference of T^2 KL, through both models' softmax."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(2 * rng.normal(size=(4, 9))) for _ in range(2))

        def loss(w, factor=1.0):
            w = losses.reverse_gradient(w, factor)
            temperature = losses.ctkd_temperature(w)
            return losses.forward_kl(student, teacher, temperature=temperature).mean()

        w, step = jnp.asarray(0.3), 1e-5
        numeric = np.asarray((loss(w + step) - loss(w - step)) / (2 * step))
        reverse = jax.jit(jax.grad(loss))(w, jnp.asarray(factor))
        forward = jax.jvp(lambda w: loss(w, factor), (w,), (jnp.ones(()),))[1]
    np.testing.assert_allclose(reverse, factor * numeric, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(forward, reverse, rtol=1e-10, atol=1e-15)


def test_descent_with_the_reversed_gradient_ascends_the_loss():
    rng = np.random.default_rng(1)
    student, teacher = (jnp.asarray(2 * rng.normal(size=(4, 9)), jnp.float32) for _ in range(2))

    def loss(w, factor):
        temperature = losses.ctkd_temperature(losses.reverse_gradient(w, factor))
        return losses.forward_kl(student, teacher, temperature=temperature).mean()

    descend = jax.jit(lambda w, factor: w - 0.5 * jax.grad(loss)(w, factor))
    for factor, moves in ((-1.0, True), (0.0, False)):
        w, values = jnp.float32(-3.0), []
        for _ in range(5):
            values.append(float(loss(w, factor)))
            w = descend(w, factor)
        assert (np.diff(values) > 0).all() == moves
        assert (w == -3.0) != moves


def test_reversal_changes_no_bit_of_the_value():
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        y = jax.jit(losses.reverse_gradient)(x.astype(dtype), -0.37)
        np.testing.assert_array_equal(y, x.astype(dtype))
        slope = jax.grad(lambda x: losses.reverse_gradient(x, -0.5).sum())(x.astype(dtype))
        assert slope.dtype == dtype


def test_each_token_has_its_own_temperature_and_the_student_no_way_through_it():
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.bfloat16)
    params = losses.init_temperature_head(5)
    w = losses.temperature_head(params, hidden)
    np.testing.assert_array_equal(w, np.ones((2, 3)))
    np.testing.assert_array_equal(losses.temperature_head(losses.init_temperature_head()), 1.0)
    total = lambda params, hidden: losses.temperature_head(params, hidden).sum()
    by_params, by_hidden = jax.grad(total, argnums=(0, 1))(params, hidden)
    np.testing.assert_array_equal(by_hidden, 0)
    np.testing.assert_allclose(
        by_params["kernel"], hidden.astype(jnp.float32).sum((0, 1)), rtol=1e-6
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: losses.ctkd_temperature(0.0, t_start=0.0), "t_start = 0.0: must be positive"),
        (lambda: losses.ctkd_temperature(0.0, t_range=-1.0), "t_range = -1.0"),
        (lambda: losses.cosine_lambda(0.5, lambda_min=1.0), "lambda_min = 1.0, lambda_max = 0.0"),
        (lambda: losses.temperature_head(losses.init_temperature_head(5)), "hidden = none"),
        (
            lambda: losses.temperature_head(losses.init_temperature_head(5), jnp.ones((2, 4))),
            r"hidden = \[2, 4\]: must be \[..., 5\]",
        ),
    ],
)
def test_arguments_that_cannot_be_meant_raise(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
