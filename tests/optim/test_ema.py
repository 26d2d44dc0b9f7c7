"""The average of past parameters: its table, what it keeps apart from, and where it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import optim
from jaxdistill.errors import ConfigError
from jaxdistill.sharding import make_mesh, replicated
from jaxdistill.train import state as states


def averages(tx, params, count):
    """The average behind each of some moves of all parameters by 1."""
    state, seen = tx.init(params), []
    for _ in range(count):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(optim.average(state))
    return seen


def test_the_average_follows_the_table():
    """theta = k behind update k, theta_T(0) = 0, rate 0.05."""
    seen = averages(optim.ema(0.95), {"w": jnp.zeros(2)}, 3)
    found = [float(one["w"][0]) for one in seen]
    np.testing.assert_allclose(found, [0.05, 0.1475, 0.290125], rtol=1e-6)


def test_it_begins_with_the_parameters_and_moves_behind_every_nth_update_alone():
    params = {"w": jnp.full(3, 0.1)}
    np.testing.assert_array_equal(optim.average(optim.ema(0.5, 3).init(params))["w"], params["w"])
    seen = [one["w"] for one in averages(optim.ema(0.5, 3), params, 7)]
    for still in seen[:2]:
        np.testing.assert_array_equal(still, params["w"])
    np.testing.assert_allclose(seen[2], 0.1 + 0.5 * 3.0, rtol=1e-6)
    for still in seen[3:5]:
        np.testing.assert_array_equal(still, seen[2])
    np.testing.assert_allclose(seen[5], (seen[2] + 6.1) / 2, rtol=1e-6)


def test_updates_pass_through_a_chain_of_ones_own():
    plain, kept = optax.adam(0.1), optax.chain(optax.adam(0.1), optim.ema(0.9))
    params, gradients = {"w": jnp.arange(4.0)}, {"w": jnp.ones(4)}
    wanted, _ = plain.update(gradients, plain.init(params), params)
    found, state = kept.update(gradients, kept.init(params), params)
    np.testing.assert_array_equal(found["w"], wanted["w"])
    np.testing.assert_allclose(
        optim.average(state)["w"], params["w"] + 0.1 * wanted["w"], rtol=1e-6
    )
    assert optim.average(plain.init(params)) is None
    with pytest.raises(ValueError, match="params = None"):
        kept.update(gradients, kept.init(params))


def test_what_is_averaged_are_the_parameters_as_they_are_rounded():
    tx = optim.optimizer(1e-3, average=(0.0, 1))
    params = {"student": {"kernel": jnp.linspace(-1, 1, 64, dtype=jnp.bfloat16).reshape(8, 8)}}
    gradients, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    for _ in range(3):
        updates, state = tx.update(gradients, state, params, value=jnp.float32(0))
        params = optax.apply_updates(params, updates)
        kept = optim.average(state)["student"]["kernel"]
        assert kept.dtype == jnp.float32
        np.testing.assert_array_equal(kept, params["student"]["kernel"].astype(jnp.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_lies_on_the_mesh_like_its_parameters(dtype):
    mesh = make_mesh(1, 8, 1, 1)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    student = {"kernel": jax.device_put(jnp.ones((16, 4), dtype), place)}
    tx = optim.optimizer(1e-3, average=(0.9, 1))
    state = states.create(student, {"t": jnp.ones(())}, tx, 0, mesh)
    first = state.opt_state[0].inner if dtype == "bfloat16" else state.opt_state[0]
    for moment in (leaf for leaf in jax.tree.leaves(first) if leaf.shape == (16, 4)):
        assert moment.sharding == place
    kept = optim.average(state.opt_state)
    assert kept["student"]["kernel"].sharding == place
    assert kept["objective"]["t"].sharding == replicated(mesh)


@pytest.mark.parametrize(("numbers", "named"), [((1.5, 1), "decay"), ((0.9, 0), "every")])
def test_numbers_out_of_range_are_refused(numbers, named):
    with pytest.raises(ConfigError, match=named):
        optim.ema(*numbers)
