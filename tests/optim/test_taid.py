"""TAID's t against trajectories of the reference code, its floor, and what must not move it."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import optim
from jaxdistill.errors import ConfigError

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "taid.json").read_text())


def run(losses, **options):
    """(t, momentum) after each update."""
    tx = optax.chain(optim.taid(**options), optax.scale(-1.0))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    update = jax.jit(lambda state, value: tx.update(params, state, params, value=value))
    found = []
    for loss in losses:
        updates, state = update(state, jnp.float32(loss))
        np.testing.assert_array_equal(updates["w"], -params["w"])
        found.append((optim.knobs(state)["taid_t"], state[0].knobs["taid_t"].momentum))
    return np.array(found), state


def test_the_adaptive_trajectory_is_the_reference_codes():
    found, _ = run(GOLDEN["losses"], num_steps=GOLDEN["num_steps"])
    np.testing.assert_allclose(found, GOLDEN["t_and_momentum"], atol=1e-6)


def test_short_runs_follow_the_straight_line():
    """Up to 2 / alpha steps the paper's step size never passes its own floor."""
    steps = 500
    losses = 2 + 0.3 * np.random.default_rng(0).normal(size=steps)
    found, _ = run(losses, num_steps=steps)
    floor = 0.4 + 0.6 * np.arange(steps) / steps
    np.testing.assert_allclose(found[1:, 0], floor[1:], atol=1e-6)
    scaled, _ = run(losses, num_steps=steps, mode="scaled")
    assert (scaled[50:400, 0] > floor[50:400] + 0.01).all()
    assert (np.diff(scaled[:, 0]) >= 0).all()
    assert scaled.max() <= 1
    linear, _ = run(losses, num_steps=steps, mode="linear")
    np.testing.assert_allclose(linear[1:, 0], floor[1:], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_moves_nothing_but_the_step(bad):
    clean, clean_state = run([2.0, 1.9, 1.8], num_steps=50)
    spoiled, state = run([bad, 2.0, 1.9, bad, 1.8], num_steps=50)
    assert np.isfinite(spoiled).all()
    own, reference = state[0].knobs["taid_t"], clean_state[0].knobs["taid_t"]
    np.testing.assert_array_equal(own.momentum, reference.momentum)
    np.testing.assert_array_equal(own.previous, reference.previous)
    assert own.step == 5
    assert spoiled[0, 0] == spoiled[1, 0] == np.float32(0.4)


def test_a_first_loss_of_zero_does_not_poison_the_momentum():
    found, _ = run([0.0, 1.0, 0.9], num_steps=50)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"t_start": 0.9, "t_end": 0.5}, "t_start"),
        ({"t_end": 1.1}, "t_end"),
        ({"alpha": -1.0}, "alpha"),
        ({"beta": 1.0}, "beta"),
        ({"mode": "fast"}, "mode"),
        ({"num_steps": 0}, "num_steps"),
    ],
)
def test_wrong_numbers_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        optim.taid(**({"num_steps": 10} | change))


def test_it_must_be_given_the_loss():
    tx = optim.taid(10)
    with pytest.raises(ValueError, match="value=J"):
        tx.update({}, tx.init({}), {})


def test_linear_ends_at_t_end_and_the_error_names_the_value():
    tx = optim.taid(10, t_end=0.9, mode="linear")
    state = tx.init({})
    for _ in range(20):
        _, state = tx.update({}, state, {}, value=jnp.float32(2.0))
    assert state.knobs["taid_t"].value == jnp.float32(0.9)
    with pytest.raises(ConfigError, match="loss/divergence.*loss/target_entropy"):
        tx.update({}, state, {})
