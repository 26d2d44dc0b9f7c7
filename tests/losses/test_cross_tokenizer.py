"""Losses across tokenizers against hand values, float64 NumPy and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.errors import ConfigError


def definition(s, t, tau):
    """f in float64, without the guard at probability 1."""
    a, b = np.asarray(t) / tau, np.asarray(s) / tau
    return -(np.exp(a) * b - np.expm1(a) * np.log(-np.expm1(b)))


def test_alm_of_the_hand_case():
    s, t = jnp.array([-1.5, -0.2, -2.0]), jnp.array([-1.1, -0.1, -1.5])
    each = [losses.alm(s[i : i + 1], t[i : i + 1], jnp.ones(1))["loss"].value for i in range(3)]
    np.testing.assert_allclose(each, [0.060866, 0.008217, 0.078097], atol=2e-6)
    assert losses.alm(s, t, jnp.ones(3))["loss"].value == pytest.approx(0.049060, abs=2e-6)
    one = losses.alm(jnp.array([-3.0]), jnp.array([-2.0]), jnp.ones(1))
    assert one["loss"].value == pytest.approx(0.099140, abs=2e-6)
    assert one["loss/divergence"].value == pytest.approx(0.001872, abs=2e-6)


@pytest.mark.parametrize(("s", "t", "slope"), [(-3.0, -2.0, -0.3300), (-2.0, -3.0, 0.4925)])
def test_the_slope_of_alm(s, t, slope):
    loss = lambda s, t: losses.alm(s[None], t[None], jnp.ones(1))["loss"].value
    at = jnp.float32(s), jnp.float32(t)
    assert 100 * jax.grad(loss)(*at) == pytest.approx(slope, abs=2e-4)
    assert jax.grad(loss, argnums=1)(*at) == 0.0
    step = 1e-4
    finite = (definition(s + step, t, 100.0) - definition(s - step, t, 100.0)) / (2 * step)
    assert jax.grad(loss)(*at) == pytest.approx(finite, rel=2e-3)


def test_alm_holds_from_certain_to_hopeless_chunks_and_leaves_out_what_weighs_nothing():
    s = np.array([-1e-3, -0.5, -69.0, -70.0, -5000.0])
    t = s[::-1].copy()
    value = losses.alm(jnp.array(s), jnp.array(t), jnp.ones(5), temperature=10.0)["loss"].value
    assert value == pytest.approx(definition(s, t, 10.0).mean(), rel=1e-3)
    given = jnp.array([-1.0, jnp.nan, 0.5])
    loss = lambda s: losses.alm(s, given, jnp.array([2.0, 0.0, 1.0]))["loss"].value
    slope = jax.grad(loss)(given)
    assert np.isfinite(slope).all() and slope[1] == 0.0


def test_sums_over_chunks():
    values = jnp.array([[1.0, 2.0, jnp.nan, 4.0], [8.0, 16.0, 32.0, 64.0]])
    groups = jnp.array([[1, 1, 0, 2], [1, 2, 2, 0]])
    found = losses.chunk_sums(values, groups, 3)
    np.testing.assert_array_equal(found, [[3, 4, 0], [8, 48, 0]])


def test_uld_against_numpy_and_under_any_order_of_the_vocabulary():
    rng = np.random.default_rng(0)
    z, w = rng.normal(size=(3, 5)), rng.normal(size=(3, 7))
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (z, w))
    q, p = -np.sort(-q), -np.sort(-p)
    expected = np.abs(np.pad(q, [(0, 0), (0, 2)]) - p).sum(-1)
    np.testing.assert_allclose(losses.uld(jnp.array(z), jnp.array(w)), expected, rtol=1e-5)
    other = losses.uld(jnp.array(z[:, ::-1].copy()), jnp.array(w[:, [3, 1, 0, 2, 6, 5, 4]]))
    np.testing.assert_allclose(other, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.alm(jnp.ones(2), jnp.ones(3), jnp.ones(3)), "must have one shape"),
        (lambda: losses.alm(*[jnp.ones(2)] * 3, temperature=0.0), "must be above 0"),
        (lambda: losses.uld(jnp.ones((2, 3)), jnp.ones((3, 3))), "the same positions"),
        (lambda: losses.chunk_sums(jnp.ones(3), jnp.ones(4, int), 2), "must have one shape"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
