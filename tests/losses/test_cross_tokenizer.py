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


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 0.4337), (0.5, None), (1.0, None)])
def test_a_divergence_of_parts_is_never_negative(beta, expected):
    """The plain KL of these two parts is -0.0863."""
    q, p = np.array([0.30, 0.25]), np.array([0.02, 0.01])
    m = beta * p + (1 - beta) * q
    apart = lambda a, b: (a * np.log(a / b) - a + b).sum()
    ends = {0.0: apart(p, q), 1.0: apart(q, p)}
    by_definition = ends.get(beta, beta * apart(p, m) + (1 - beta) * apart(q, m))
    of = lambda q, p: losses.generalized_jsd_of_parts(jnp.log(q), jnp.log(p), beta=beta)
    assert float(of(q, p)) == pytest.approx(by_definition, rel=1e-5)
    assert expected is None or float(of(q, p)) == pytest.approx(expected, abs=1e-4)
    assert of(q, p) > 0 and abs(of(p, p)) < 1e-7
    slope = jax.grad(lambda log_q: losses.generalized_jsd_of_parts(log_q, jnp.log(p), beta=beta))
    np.testing.assert_allclose(slope(jnp.log(p)), 0.0, atol=1e-6)
    with pytest.raises(ConfigError, match=r"beta = 1.5: must be in \[0, 1\]"):
        losses.generalized_jsd_of_parts(jnp.zeros(2), jnp.zeros(2), beta=1.5)
    with pytest.raises(ConfigError, match="must have one shape"):
        losses.generalized_jsd_of_parts(jnp.zeros(2), jnp.zeros(3))


def test_sorted_distance_of_parts_pads_the_shorter():
    found = losses.sorted_distance(jnp.array([0.1, 0.6]), jnp.array([0.2, 0.1, 0.3]))
    assert float(found) == pytest.approx(0.3 + 0.1 + 0.1, rel=1e-6)
