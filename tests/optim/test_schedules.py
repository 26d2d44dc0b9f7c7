"""Knobs in the optimizer's state, and the shapes of their schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import optim
from jaxdistill.errors import ConfigError


def test_a_knob_is_read_before_the_step_and_moves_with_the_updates():
    tx = optim.knob("alpha", optim.schedule("linear", 0.9, 0.1, 5))
    state = tx.init({"w": jnp.ones(3)})
    updates = {"w": jnp.array([1.0, -2.0, 3.0])}
    seen = []
    for _ in range(7):
        seen.append(float(optim.knobs(state)["alpha"]))
        out, state = tx.update(updates, state)
        np.testing.assert_array_equal(out["w"], updates["w"])
    np.testing.assert_allclose(seen, [0.9, 0.7, 0.5, 0.3, 0.1, 0.1, 0.1], rtol=1e-6)


def test_a_number_stays_what_it_is():
    tx = optim.knob("temperature", 2.0)
    state = tx.init({})
    for _ in range(3):
        value = optim.knobs(state)["temperature"]
        assert value == 2.0 and value.dtype == jnp.float32
        _, state = tx.update({}, state)
    assert state.knobs["temperature"].step == 3


def test_knobs_are_found_at_any_depth_and_only_they():
    params = {"student": jnp.ones(2), "objective": jnp.ones(1)}
    inner = optax.chain(optim.knob("temperature", 3.0), optax.adam(1e-3))
    tx = optax.chain(
        optax.clip(1.0),
        optim.knob("alpha", 0.5),
        optax.partition({"a": inner, "b": optax.sgd(1.0)}, {"student": "a", "objective": "b"}),
    )
    found = optim.knobs(tx.init(params))
    assert {name: float(value) for name, value in found.items()} == {
        "alpha": 0.5,
        "temperature": 3.0,
    }
    assert optim.knobs(optax.adam(1e-3).init(params)) == {}


def test_a_knob_in_a_compiled_step_compiles_once():
    tx = optim.knob("alpha", optim.schedule("cosine", 0.0, 1.0, 11))
    traced = []

    @jax.jit
    def step(state):
        traced.append(1)
        return tx.update(jnp.zeros(2), state)[1]

    state = jax.jit(tx.init)(jnp.zeros(2))
    for _ in range(5):
        state = step(state)
    np.testing.assert_allclose(optim.knobs(state)["alpha"], 0.5, rtol=1e-6)
    assert len(traced) == 1


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("start, end, steps", [(0.2, 1.0, 10), (8.0, 1.0, 3), (0.5, 0.7, 1)])
def test_schedules_are_their_closed_forms(shape, start, end, steps):
    ours = [float(optim.schedule(shape, start, end, steps)(n)) for n in range(steps + 2)]
    x = np.minimum(np.arange(steps + 2) / max(steps - 1, 1), 1.0)
    if shape == "cosine":
        x = (1 - np.cos(np.pi * x)) / 2
    np.testing.assert_allclose(ours, start + (end - start) * x, rtol=1e-6)
    assert ours[0] == pytest.approx(start)
    if steps > 1:
        assert ours[steps - 1] == pytest.approx(end)


def test_another_shape_is_an_error():
    with pytest.raises(ConfigError, match="schedule = 'step': must be linear or cosine"):
        optim.schedule("step", 0.0, 1.0, 5)
