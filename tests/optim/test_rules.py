"""Rules beside AdamW against their formulas in float64 NumPy; types of moments; where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import optim
from jaxdistill.errors import ConfigError
from jaxdistill.train import state as states

RATE, DECAY = 0.01, 0.1


def _params():
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    layers = {"up": {"kernel": make(2, 6, 4), "bias": make(2, 4)}}
    return {"student": {"embedding": make(5, 6), "layers": layers}, "objective": {"t": make()}}


def _gradients(like, count):
    rng, (leaves, tree) = np.random.default_rng(1), jax.tree.flatten(like)
    draw = lambda: [jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return [tree.unflatten(draw()) for _ in range(count)]


def _moved(name, params, gradients, **options):
    """(parameters after the updates, state)."""
    tx = optim.optimizer(RATE, name=name, clip_norm=None, weight_decay=DECAY, **options)
    state = tx.init(params)
    update = jax.jit(lambda g, state, params: tx.update(g, state, params, value=jnp.float32(1)))
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _decay(p):
    """Of each leaf by name: kernel and embedding alone."""
    decayed = lambda path, leaf: DECAY * leaf * (path[-1].key in ("kernel", "embedding"))
    return jax.tree_util.tree_map_with_path(decayed, p)


def _check(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), got, want)


def _wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_lion_moves_by_the_sign():
    params = _params()
    gradients = _gradients(params, 4)
    p, (b1, b2) = _wide(params), (0.9, 0.99)
    m = jax.tree.map(np.zeros_like, p)
    for g in map(_wide, gradients):
        u = jax.tree.map(lambda m, g: np.sign(b1 * m + (1 - b1) * g), m, g)
        p = jax.tree.map(lambda p, u, d: p - RATE * (u + d), p, u, _decay(p))
        m = jax.tree.map(lambda m, g: b2 * m + (1 - b2) * g, m, g)
    _check(_moved("lion", params, gradients, betas=(b1, b2))[0], p)


def test_adafactor_divides_by_the_root_mean_square():
    params = _params()
    gradients = _gradients(params, 4)
    p = _wide(params)
    v = jax.tree.map(np.zeros_like, p)
    for n, g in enumerate(map(_wide, gradients), 1):
        b = 1 - n**-0.8
        v = jax.tree.map(lambda v, g, b=b: b * v + (1 - b) * (g**2 + 1e-30), v, g)
        u = jax.tree.map(lambda g, v: g / np.sqrt(v), g, v)
        u = jax.tree.map(lambda u: u / max(1, np.sqrt((u**2).mean())), u)
        p = jax.tree.map(lambda p, u, d: p - RATE * (u + d), p, u, _decay(p))
    _check(_moved("adafactor", params, gradients)[0], p)


def test_adafactor_keeps_a_row_and_a_column_of_a_large_matrix():
    a, b = (1 + np.random.default_rng(0).random(n) for n in (130, 140))
    params = {"student": {"kernel": jnp.zeros((130, 140))}}
    gradient = {"student": {"kernel": jnp.asarray(-np.outer(a, b), jnp.float32)}}
    moved, state = _moved("adafactor", params, [gradient])
    # Of such a gradient a row and a column hold all: every entry has moved by the rate.
    np.testing.assert_allclose(moved["student"]["kernel"], RATE, rtol=1e-5)
    assert max(leaf.size for leaf in jax.tree.leaves(state)) == 140


def test_muon_turns_kernels_and_leaves_the_rest_to_adam():
    params = _params()
    (gradient,) = _gradients(params, 1)
    g = np.asarray(gradient["student"]["layers"]["up"]["kernel"], np.float64)
    want = []
    for x in g:  # Newton-Schulz of the wide form, five times
        x = x.T / np.linalg.norm(x)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
        want.append(x.T * 0.2 * np.sqrt(6))
    before = _wide(params)
    moved = _wide(_moved("muon", params, [gradient])[0])
    kernel = before["student"]["layers"]["up"]["kernel"]
    expected = kernel - RATE * (np.stack(want) + DECAY * kernel)
    got = moved["student"]["layers"]["up"]["kernel"]
    np.testing.assert_allclose(got, expected, atol=2e-6)
    nesterov = 1 + 0.9 / 1.9  # of a first update, whose size is otherwise 1
    adam = jax.tree.map(
        lambda p, g, d: p - RATE * (nesterov * np.sign(g) + d),
        before,
        _wide(gradient),
        _decay(before),
    )
    del moved["student"]["layers"]["up"]["kernel"], adam["student"]["layers"]["up"]["kernel"]
    _check(moved, adam)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_the_first_moment_may_be_bfloat16(name):
    params = _params()
    gradients = _gradients(params, 3)
    plain = _moved(name, params, gradients)[0]
    moved, state = _moved(name, params, gradients, moments="bfloat16")
    types = {str(x.dtype) for x in jax.tree.leaves(state) if x.ndim}
    assert types == ({"bfloat16"} if name == "lion" else {"bfloat16", "float32"})
    if name != "lion":  # whose sign may turn where a moment is nearly 0
        near = lambda a, b: np.testing.assert_allclose(a, b, atol=0.05 * RATE)
        jax.tree.map(near, moved, plain)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_moments_lie_like_their_parameters(name, mesh8):
    place = lambda *axes: jax.NamedSharding(mesh8, jax.P(*axes))
    shape = lambda sharding, *dims: jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)
    kernel = shape(place(None, "fsdp", "tensor"), 2, 128, 256)
    params = {"student": {"layers": {"up": {"kernel": kernel}}}, "objective": {}}
    tx = optim.optimizer(RATE, name=name)
    places = states._opt_shardings(tx, params, mesh8, offload=False)
    whole = jax.eval_shape(tx.init, params)
    found = 0
    for leaf, where in zip(jax.tree.leaves(whole), jax.tree.leaves(places), strict=True):
        like = leaf.shape == kernel.shape
        assert where.is_equivalent_to(kernel.sharding if like else place(), leaf.ndim)
        found += like
    assert found == {"adamw": 2, "lion": 1, "adafactor": 0, "muon": 1}[name]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("adafactor", {"betas": (0.8, 0.9)}),
        ("adafactor", {"eps": 1e-6}),
        ("adafactor", {"moments": "bfloat16"}),
        ("lion", {"eps": 1e-6}),
    ],
)
def test_an_option_that_a_rule_does_not_read_is_named(name, option):
    (key,) = option
    with pytest.raises(ConfigError, match=f"{key} = .*no effect with name = '{name}'"):
        optim.optimizer(RATE, name=name, **option)
    optim.optimizer(RATE, name="adamw", **option)


def test_an_unknown_rule_is_named():
    with pytest.raises(ConfigError, match="adamw, lion, adafactor, muon"):
        optim.optimizer(RATE, name="sgd")
