"""The chain against AdamW written out in float64 numpy; decay, dtypes and learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import optim
from jaxdistill.errors import ConfigError
from jaxdistill.optim.rules import decays


def _params(dtype=jnp.float32):
    generator = np.random.default_rng(0)

    def make(*shape):
        return jnp.asarray(generator.normal(size=shape), dtype)

    layers = {"mlp": {"kernel": make(2, 3, 4), "bias": make(2, 4)}, "norm": {"scale": make(2, 3)}}
    return {
        "student": {"embedding": make(5, 3), "layers": layers},
        "objective": {"temperature": make()},
    }


def _gradients(step, like, scale=1.0):
    leaves, tree = jax.tree.flatten(like)
    generator = np.random.default_rng(100 + step)
    return tree.unflatten(
        [jnp.asarray(scale * generator.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    )


def _oracle(params, gradients, rate, clip, b1, b2, eps, decay, ratio=1.0):
    """AdamW, leaf by leaf, with the global norm of the student's gradient clipped first."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    names = [str(path[-1].key) for path in paths]
    own = [path[0].key == "objective" for path in paths]
    p = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for n, gradient in enumerate(gradients):
        g = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient)]
        norm = np.sqrt(sum((x**2).sum() for x, o in zip(g, own, strict=True) if not o))
        g = [x if o else x * min(1.0, clip / norm) for x, o in zip(g, own, strict=True)]
        for i, name in enumerate(names):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            step = m[i] / (1 - b1 ** (n + 1)) / (np.sqrt(v[i] / (1 - b2 ** (n + 1))) + eps)
            if name in ("kernel", "embedding") and not own[i]:
                step = step + decay * p[i]
            if own[i]:
                step = ratio * step
            p[i] = p[i] - rate(n) * step
    return p


def test_the_chain_is_adamw_with_clipping_and_decay_on_matrices_alone():
    params = _params()
    gradients = [_gradients(n, params, scale=10.0 if n % 2 else 0.01) for n in range(6)]

    def rate(n):
        return 0.01 * (n + 1)

    tx = optim.optimizer(
        rate, knobs={"alpha": 0.5}, clip_norm=1.0, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3
    )
    state, ours = tx.init(params), params

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        ours, state = step(ours, state, gradient)
    wanted = _oracle(params, gradients, rate, 1.0, 0.8, 0.9, 1e-6, 0.3)
    for one, other in zip(jax.tree.leaves(ours), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)
    assert optim.knobs(state)["alpha"] == 0.5


def test_the_objectives_own_parameters_have_their_rate_and_no_decay():
    params = {"student": {"kernel": jnp.ones((2, 3))}, "objective": {"kernel": jnp.ones((4, 2))}}
    gradients = [_gradients(n, params) for n in range(4)]
    tx = optim.optimizer(0.01, weight_decay=0.3, objective_lr_ratio=20.0, betas=(0.8, 0.9))
    state, ours = tx.init(params), params
    for gradient in gradients:
        updates, state = tx.update(gradient, state, ours, value=jnp.float32(1.0))
        ours = optax.apply_updates(ours, updates)
    wanted = _oracle(params, gradients, lambda n: 0.01, 1.0, 0.8, 0.9, 1e-8, 0.3, ratio=20.0)
    for one, other in zip(jax.tree.leaves(ours), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_what_is_not_trained_yet_or_any_more_stands_still():
    """Neither decay nor the momentum of earlier gradients moves it."""
    params = {"student": {"kernel": jnp.ones((2, 3))}, "objective": {"kernel": jnp.ones((4, 2))}}
    tx = optim.optimizer(0.1, trained={"student": (2, None), "objective/kernel": (0, 3)})
    state, moved = tx.init(params), []
    for n in range(5):
        gradient = jax.tree.map(lambda leaf, n=n: jnp.full_like(leaf, 1.0 + n), params)
        updates, state = tx.update(gradient, state, params)
        moved.append([bool((leaf != 0).all()) for leaf in jax.tree.leaves(updates)])
    assert moved == [[True, False]] * 2 + [[True, True]] + [[False, True]] * 2
    with pytest.raises(ConfigError, match="no parameter 'objective/filters'"):
        optim.optimizer(0.1, trained={"objective/filters": (0, 3)}).init(params)


def test_decay_leaves_biases_scales_and_single_numbers_alone():
    params = _params()
    wanted = {
        "student": {
            "embedding": True,
            "layers": {"mlp": {"kernel": True, "bias": False}, "norm": {"scale": False}},
        },
        "objective": {"temperature": False},
    }
    assert decays(params) == wanted
    tx = optim.optimizer(0.1, weight_decay=0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = jax.tree.map(lambda update: bool((update != 0).any()), updates)
    assert moved == wanted


def test_without_a_norm_nothing_is_clipped():
    params = {"kernel": jnp.ones((1, 1))}
    tx = optim.optimizer(1.0, clip_norm=None, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    updates, _ = tx.update({"kernel": jnp.full((1, 1), 9.0)}, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -9.0 / (9.0 + 1.0), rtol=1e-6)


def test_moments_of_bfloat16_parameters_are_float32_and_do_not_stand_still():
    params = _params(jnp.bfloat16)
    tx = optim.optimizer(1e-3, clip_norm=None, betas=(0.9, 0.999))
    state = tx.init(params)
    moments = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype(jnp.float32)}

    one = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1.0), params)
    update = jax.jit(tx.update)
    for _ in range(20):
        updates, state = update(one, state, params)
    # 1 - 0.999^20: in bfloat16 the sum stops when 0.001 falls below half a unit of its last place.
    for leaf in jax.tree.leaves(optax.tree.get(state, "nu")):
        np.testing.assert_allclose(leaf, 1 - 0.999**20, rtol=1e-5)
    applied = optax.apply_updates(params, updates)
    assert {leaf.dtype for leaf in jax.tree.leaves(applied)} == {jnp.dtype(jnp.bfloat16)}


def test_decay_of_bfloat16_parameters_is_reckoned_in_float32():
    """Each parameter becomes a neighbour of 0.97 of itself, and on an average just that."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(200, 300)), jnp.bfloat16)}
    tx = optim.optimizer(0.1, weight_decay=0.3)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)["kernel"]
    wide = lambda x: np.asarray(x, np.float64)
    share = wide(moved) / wide(params["kernel"])
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_allclose(share, 0.97, atol=2**-7)
    np.testing.assert_allclose(share.mean(), 0.97, atol=1e-4)


def test_moments_can_be_told_from_counters():
    # Training lays every moment out like its parameter, which needs this.
    params = _params()
    tx = optim.optimizer(1e-3, knobs={"alpha": 0.5})
    marked = optax.tree_utils.tree_map_params(
        tx, lambda _: "moment", tx.init(params), transform_non_params=lambda _: "number"
    )
    assert sorted(jax.tree.leaves(marked)) == ["moment"] * 10 + ["number"] * 3


def test_learning_rates_are_their_closed_forms():
    peak, steps, warmup, end = 3e-4, 50, 8, 0.1
    n = np.arange(steps)
    x = (n - warmup) / (steps - 1 - warmup)
    falls = {
        "constant": np.full(steps, peak),
        "linear": peak * (1 - (1 - end) * x),
        "cosine": peak * (end + (1 - end) * (1 + np.cos(np.pi * x)) / 2),
    }
    for shape, fall in falls.items():
        rate = optim.learning_rate(shape, peak, steps, warmup=warmup, end_ratio=end)
        wanted = np.where(n < warmup, peak * (n + 1) / warmup, fall)
        np.testing.assert_allclose([float(rate(i)) for i in n], wanted, rtol=1e-5, err_msg=shape)


@pytest.mark.parametrize("warmup", [0, 1, 2, 9])
@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_a_rate_starts_above_zero_reaches_the_peak_and_ends_as_asked(shape, warmup):
    rate = optim.learning_rate(shape, 2.0, 10, warmup=warmup, end_ratio=0.25)
    values = [float(rate(n)) for n in range(10)]
    assert values[0] == pytest.approx(2.0 / max(warmup, 1))
    assert max(values) == pytest.approx(2.0)
    if shape != "constant" and warmup < 9:
        assert values[-1] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cosine", 1.0, 10, 10), r"optimizer.warmup = 10: must be in \[0, train.steps = 10\)"),
        (("cosine", 1.0, 10, -1), "optimizer.warmup = -1"),
        (("step", 1.0, 10, 0), "optimizer.schedule = 'step': must be one of constant, linear"),
    ],
)
def test_rates_that_cannot_be_meant_raise(arguments, message):
    shape, peak, steps, warmup = arguments
    with pytest.raises(ConfigError, match=message):
        optim.learning_rate(shape, peak, steps, warmup=warmup)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_few_bits_move_as_float32_would(dtype):
    """100 updates of 3e-5 on weights of 0.02, each below the half of what bfloat16 tells apart."""
    draw = lambda seed: jnp.asarray(np.random.default_rng(seed).normal(size=(64, 64)), jnp.float32)
    gradients = [{"student": {"w": draw(n) + 0.3}} for n in range(4)]
    tx = optim.optimizer(3e-5, weight_decay=0.0, clip_norm=None)

    @jax.jit
    def one(gradient, state, params):
        updates, state = tx.update(gradient, state, params, value=jnp.float32(1), metrics={})
        return optax.apply_updates(params, updates), state

    def moved(dtype):
        first = params = {"student": {"w": (draw(9) * 0.02).astype(dtype)}}
        state = tx.init(params)
        for n in range(100):
            params, state = one(gradients[n % 4], state, params)
        assert params["student"]["w"].dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
            jnp.dtype("int32"),
            jnp.dtype("float32"),
        }
        wide = [np.float64(tree["student"]["w"].astype(jnp.float32)) for tree in (first, params)]
        return wide[1] - wide[0]

    want, got = moved("float32"), moved(dtype)
    assert (got == 0).mean() < 0.05
    np.testing.assert_allclose(np.abs(got).mean(), np.abs(want).mean(), rtol=0.02)
    np.testing.assert_allclose(got.mean(), want.mean(), rtol=0.02)


def test_what_is_frozen_or_not_finite_is_not_rounded():
    params = {"w": jnp.full((64,), 0.3, jnp.bfloat16)}
    tx = optim.optimizer(0.0, clip_norm=None, weight_decay=0.0)
    updates, state = tx.update({"w": jnp.ones(64)}, tx.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["w"], params["w"])
    updates, _ = tx.update({"w": jnp.full(64, jnp.nan)}, state, params)
    assert np.isnan(np.float32(optax.apply_updates(params, updates)["w"])).all()


def test_a_scaled_update_keeps_the_curriculum_that_adam_divides_out():
    """CTKD's w of slope 1 is the sum of lr |lambda| after 25 of 100 steps, not lr times 25."""
    ramp = optim.schedule("cosine", 0.0, -1.0, 100)
    scaled = {"objective/temperature": lambda step: -ramp(step)}
    params = {"student": {"w": jnp.zeros(())}, "objective": {"temperature": {"w": jnp.zeros(())}}}

    def run(tx, reversed_by):
        tree, state = params, tx.init(params)
        for n in range(25):
            slope = {
                "student": {"w": jnp.float32(-1)},
                "objective": {"temperature": {"w": jnp.float32(reversed_by(n))}},
            }
            updates, state = tx.update(slope, state, tree)
            tree = optax.apply_updates(tree, updates)
        return float(tree["objective"]["temperature"]["w"]), float(tree["student"]["w"])

    plain = optim.optimizer(0.01, clip_norm=None)
    tx = optim.optimizer(0.01, clip_norm=None, scaled=scaled)
    want = 0.01 * sum(-float(ramp(n)) for n in range(25))
    for factor in (ramp, lambda n: -1.0):
        w, student = run(tx, factor)
        assert w == pytest.approx(want, rel=0.35 if factor is ramp else 1e-3)
        assert student == pytest.approx(0.25, rel=1e-3)
    assert run(plain, ramp)[0] > 4 * want
    with pytest.raises(ConfigError, match="scaled"):
        optim.optimizer(0.01, scaled={"objective/other": ramp}).init(params)
