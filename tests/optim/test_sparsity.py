"""Masks against float64 NumPy: groups of four, counts and ramp, scores, and what stays zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import optim, teachers
from jaxdistill.errors import ConfigError
from jaxdistill.optim.lowest import lowest, order
from jaxdistill.optim.sparsity import due_at, one_shot, ramp
from jaxdistill.sharding import make_mesh, replicated
from jaxdistill.train import state as states
from jaxdistill.train import step as steps
from jaxdistill.types import Batch, Mean
from tests.also import also

AXES = {"output": (-2,), "layer": (-2, -1)}


def tree(seed, dtype="float32"):
    """Kernels of a stack and of experts, and what is never sparse."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        "embedding": draw(8, 8),
        "layers": {
            "norm": {"scale": draw(3, 8)},
            "up": {"kernel": draw(3, 8, 6), "bias": draw(3, 6)},
            "experts": {"kernel": draw(2, 3, 12, 4)},
            "router": {"kernel": draw(3, 8, 4)},
        },
    }


def kernels(params):
    layers = params["layers"]
    return [np.asarray(layers[name]["kernel"], np.float64) for name in ("experts", "up")]


def lowest_of(scores, count):
    """Which are the lowest of one dim; of equal ones the first: a stable sort says it."""
    gone = np.zeros(len(scores), bool)
    gone[np.argsort(scores, kind="stable")[:count]] = True
    return gone


def two_of_four(scores):
    """[..., in, out]: the two lowest of each group of four inputs."""
    gone = np.zeros(scores.shape, bool)
    for at in np.ndindex(*scores.shape[:-2], scores.shape[-2] // 4, scores.shape[-1]):
        *outer, group, out = at
        where = (*outer, slice(4 * group, 4 * group + 4), out)
        gone[where] = lowest_of(scores[where], 2)
    return gone


def by_scope(scores, share, scope):
    """Which numbers of several arrays go."""
    if scope == "global":
        whole = np.concatenate([one.ravel() for one in scores])
        gone = lowest_of(whole, round(share * len(whole)))
        parts = np.split(gone, np.cumsum([one.size for one in scores])[:-1])
        return [part.reshape(one.shape) for part, one in zip(parts, scores, strict=True)]
    found = []
    for one in scores:
        flat = one.swapaxes(-1, -2) if scope == "output" else one
        rows = flat.reshape(-1, one.shape[-2] if scope == "output" else one[..., :, :].shape[-1])
        if scope == "layer":
            rows = one.reshape(-1, one.shape[-2] * one.shape[-1])
        gone = np.stack([lowest_of(row, round(share * len(row))) for row in rows])
        gone = gone.reshape(flat.shape)
        found.append(gone.swapaxes(-1, -2) if scope == "output" else gone)
    return found


def test_two_of_every_four_inputs_go_and_nothing_else_is_touched():
    params = tree(0)
    made = one_shot(params, pattern="2:4")
    for before, after in zip(kernels(params), kernels(made), strict=True):
        gone = two_of_four(np.abs(before))
        np.testing.assert_array_equal(after, np.where(gone, 0, before))
    for name in ("norm", "router"):
        jax.tree.map(np.testing.assert_array_equal, made["layers"][name], params["layers"][name])
    np.testing.assert_array_equal(made["embedding"], params["embedding"])
    np.testing.assert_array_equal(made["layers"]["up"]["bias"], params["layers"]["up"]["bias"])


@pytest.mark.parametrize("scope", ["output", "layer", "global"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exactly_the_lowest_go_of_each_scope_ties_too(scope, dtype):
    """Two digits make many equal weights, of which the first go."""
    params = jax.tree.map(lambda leaf: jnp.round(leaf, 1).astype(dtype), tree(1))
    made = one_shot(params, pattern="unstructured", share=0.37, scope=scope)
    expected = by_scope([np.abs(one) for one in kernels(params)], 0.37, scope)
    for before, after, gone in zip(kernels(params), kernels(made), expected, strict=True):
        np.testing.assert_array_equal(after, np.where(gone, 0, before))


@pytest.mark.parametrize("count", [0, 1, 17, 24])
def test_so_many_are_found_where_all_are_equal_or_negative(count):
    for numbers in (np.zeros((4, 6)), -np.arange(24.0).reshape(4, 6), np.full((4, 6), -np.inf)):
        keys = [order(jnp.asarray(numbers, jnp.float32))]
        for axes in (None, (-2, -1)):
            (found,) = lowest(keys, jnp.uint32(count), axes)
            np.testing.assert_array_equal(found.ravel(), lowest_of(numbers.ravel(), count))


def test_wanda_weighs_each_input_by_its_norm():
    params, rng = tree(2), np.random.default_rng(3)
    norms = {
        "layers/experts/kernel": rng.uniform(0.1, 9, (2, 3, 12)).astype(np.float32),
        "layers/up/kernel": rng.uniform(0.1, 9, (3, 8)).astype(np.float32),
    }
    made = one_shot(params, pattern="unstructured", share=0.5, scope="output", norms=norms)
    scores = [
        np.abs(one) * norms[name].astype(np.float64)[..., None]
        for one, name in zip(kernels(params), norms, strict=True)
    ]
    gone = by_scope(scores, 0.5, "output")
    for before, after, of in zip(kernels(params), kernels(made), gone, strict=True):
        np.testing.assert_array_equal(after, np.where(of, 0, before))
    assert any((a != b).any() for a, b in zip(gone, by_scope(
        [np.abs(one) for one in kernels(params)], 0.5, "output"), strict=True))  # fmt: skip


def trained(options, count, params=None, rate=0.05, seed=4, **chain):
    """(parameters, gradients, state) after each of so many updates of AdamW."""
    params = tree(5) if params is None else params
    last = optim.sparsity(**options)
    tx = optim.optimizer(rate, clip_norm=None, last=last, **chain)
    rng, state = np.random.default_rng(seed), tx.init(params)
    update = jax.jit(
        lambda g, state, params: tx.update(
            g, state, params, value=jnp.float32(1), metrics={}, gradients=g
        )
    )
    for _ in range(count):
        g = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        yield params, g, state


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_share_is_the_cubic_ramp_and_what_is_masked_stays_zero_to_the_bit(pattern, dtype):
    options = {"pattern": pattern, "begin": 3, "end": 13, "every": 4}
    options |= {"share": 0.7} if pattern == "unstructured" else {}
    final = options.get("share", 0.5)
    before = [np.zeros(one.shape, bool) for one in kernels(tree(5))]
    for t, (params, _, state) in enumerate(trained(options, 17, tree(5, dtype))):
        at = min(max(t - 3, 0) // 4 * 4, 10) if t < 13 else 10
        share = final + (0 - final) * (1 - at / 10) ** 3
        zero = [one == 0 for one in kernels(params)]
        for gone, old in zip(zero, before, strict=True):
            size = gone[0].size if gone.ndim == 3 else gone[0, 0].size
            np.testing.assert_array_equal(gone.sum((-2, -1)), round(share * size))
            assert gone[old].all()  # what is gone stays gone
            if pattern == "2:4":
                groups = gone.reshape(*gone.shape[:-2], -1, 4, gone.shape[-1])
                assert groups.sum(-2).max() <= 2
        before = zero
        told = sum(gone.sum() for gone in zero) / sum(gone.size for gone in zero)
        np.testing.assert_allclose(optim.knobs(state)["sparsity"], told, rtol=1e-6)
    if pattern == "2:4":
        assert all((g.reshape(*g.shape[:-2], -1, 4, g.shape[-1]).sum(-2) == 2).all() for g in zero)


def test_the_ramp_is_its_formula():
    begin, every, n = 100, 7, 30
    for t in due_at(begin, begin + every * n, every):
        expected = 0.8 + (0 - 0.8) * (1 - (t - begin) / (n * every)) ** 3
        assert ramp(t, share=0.8, begin=begin, end=begin + every * n) == pytest.approx(expected)
    assert due_at(0, 10, 4) == [0, 4, 8, 10]
    assert due_at(5, 5, 3) == [5]


def test_movement_is_the_sum_of_weight_times_slope_in_float64():
    options = {"pattern": "unstructured", "share": 0.5, "by": "movement", "end": 6, "begin": 6}
    start = tree(5)
    scores = [np.zeros_like(one) for one in kernels(start)]
    old = kernels(start)
    state = None
    for params, gradients, state in trained(options, 7, start):  # noqa: B007
        scores = [s - w * g for s, w, g in zip(scores, old, kernels(gradients), strict=True)]
        old = kernels(params)
    found = state[-1].inner_state.movement
    for s, f in zip(scores, kernels(found), strict=True):
        np.testing.assert_allclose(f, s, atol=1e-6)
    for s, after in zip(scores, old, strict=True):
        np.testing.assert_array_equal(after == 0, by_scope([s], 0.5, "layer")[0])
    by_weight = list(trained(options | {"by": "weight"}, 7, start))[-1][0]
    assert any((a == 0).sum() != ((a == 0) & (b == 0)).sum()
               for a, b in zip(old, kernels(by_weight), strict=True))  # fmt: skip


@pytest.mark.usefixtures("contracted")
@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "unstructured", "share": 0.6, "scope": "global", "by": "movement", "end": 3},
        *also({"pattern": "2:4", "end": 3}),
    ],
)
def test_masks_lie_like_their_weights_and_are_the_same_on_eight_devices(options):
    mesh = make_mesh(1, 4, 2)
    over = {3: PartitionSpec(None, "fsdp", "tensor"), 4: PartitionSpec(None, None, "fsdp")}
    tx = optim.optimizer(0.05, last=optim.sparsity(**options), knobs={})

    def made(place):
        """(parameters, state) after four updates, everything placed by its shape."""
        put = lambda tree: jax.device_put(tree, jax.tree.map(place, tree))
        params, rng = put({"student": tree(6), "objective": {}}), np.random.default_rng(8)
        places = states._opt_shardings(tx, params, mesh, False)
        state = jax.jit(tx.init, out_shardings=places)(params)
        update = jax.jit(
            lambda g, state, params: tx.update(
                g, state, params, value=jnp.float32(1), metrics={}, gradients=g
            )
        )
        for _ in range(4):
            g = put(jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f"), params))
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params["student"], state

    one, _ = made(lambda leaf: NamedSharding(mesh, PartitionSpec()))
    eight, state = made(lambda leaf: NamedSharding(mesh, over.get(leaf.ndim, PartitionSpec())))
    masks = state[-1].inner_state.masks["student"]["layers"]
    for kind in ("up", "experts"):
        kernel, mask = eight["layers"][kind]["kernel"], masks[kind]["kernel"]
        assert len({shard.index for shard in kernel.addressable_shards}) > 1
        assert mask.dtype == bool and mask.shape == kernel.shape
        assert mask.sharding.is_equivalent_to(kernel.sharding, kernel.ndim)
    for a, b in zip(kernels(one), kernels(eight), strict=True):
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert (a == 0).any()


def test_a_step_that_is_not_finite_changes_neither_masks_nor_movement():
    tx = optim.optimizer(0.1, last=optim.sparsity(by="movement", end=3), knobs={})
    mesh = make_mesh(devices=jax.devices()[:1])

    def loss(params, signal, batch, knobs):
        bad = jnp.where(batch.tokens[0, 0] == 0, jnp.nan, 1.0)
        kernel = params["student"]["up"]["kernel"]
        return {"loss": Mean(jnp.sum(jnp.sin(kernel)) * bad, jnp.float32(1))}

    student = {
        "up": {"kernel": jax.device_put(tree(9)["layers"]["up"]["kernel"], replicated(mesh))}
    }
    state = states.create(student, {}, tx, 0, mesh)
    step = jax.jit(steps.make(loss, teachers.none, tx))
    ones = np.ones((1, 4), np.int32)
    good = Batch(ones, ones, ones > 0, ones, ones)
    for _ in range(3):
        state, _ = step(state, None, good)
    share = float(optim.knobs(state.opt_state)["sparsity"])
    assert 0 < share < 0.5
    after, means = step(state, None, dataclasses.replace(good, tokens=0 * ones))
    assert means["guard/skipped"].value == 1
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    later, _ = step(after, None, good)
    assert optim.knobs(later.opt_state)["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "4:8"}, "sparsity.pattern = '4:8': must be one of 2:4, unstructured"),
        ({"scope": "row"}, "sparsity.scope"),
        ({"by": "magnitude"}, "sparsity.by"),
        ({"share": 0.4}, "sparsity.share = 0.4: must be 0.5 for 2:4"),
        ({"share": 1.0, "pattern": "unstructured"}, "in \\(0, 1\\)"),
        ({"begin": 5, "end": 4}, "begin = 5, end = 4"),
        ({"every": 0}, "every = 0: must be at least 1"),
        ({"end": 10**6}, "every = 1: must be at least 101"),
        ({"by": "wanda"}, "norms of inputs belong to wanda"),
        ({"norms": {}}, "norms of inputs belong to wanda"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        optim.sparsity(**options)


def test_what_parameters_do_not_have_is_refused():
    with pytest.raises(ConfigError, match="a/kernel has 6 inputs, which 4 does not divide"):
        one_shot({"a": {"kernel": jnp.ones((6, 4))}})
    with pytest.raises(ConfigError, match="no kernel"):
        one_shot({"embedding": jnp.ones((4, 4))})
    with pytest.raises(ConfigError, match="no norms of b/kernel"):
        one_shot({"b": {"kernel": jnp.ones((4, 4))}}, norms={"a/kernel": np.ones(4)})
    params = {"kernel": jnp.ones((4, 4))}
    tx = optim.sparsity(by="movement")
    with pytest.raises(ConfigError, match="reads gradients"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ConfigError, match="reads weights"):
        tx.update(params, tx.init(params))
