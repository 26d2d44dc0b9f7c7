"""Projectors and TED's two stages: shapes, whose gradient is none, padding, finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.errors import ConfigError

K, B, L, D, V = 2, 2, 5, 6, 13
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool)
LABELS = np.where(MASK, np.arange(10).reshape(2, 5), -100)


def _array(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _filters(width=D, out=4, seed=0):
    filters = losses.init_filters(jax.random.key(seed), K, width, out)
    return filters | {"bias": _array(K, out, seed=seed + 7)}


def test_each_layer_goes_through_its_own_kernel():
    filters, taps = _filters(), _array(K, B, L, D)
    kernels, biases = np.asarray(filters["kernel"]), np.asarray(filters["bias"])
    layers = zip(np.asarray(taps), kernels, biases, strict=True)
    wanted = np.stack([states @ kernel + bias for states, kernel, bias in layers])
    np.testing.assert_allclose(losses.project(filters, taps), wanted, rtol=1e-5, atol=1e-5)
    shared = losses.init_projectors(jax.random.key(0), D, 9)
    np.testing.assert_allclose(
        losses.project(shared, taps), np.asarray(taps) @ shared["kernel"], rtol=1e-5, atol=1e-5
    )
    one = losses.project(shared | {"bias": jnp.arange(9.0)}, taps)
    moved = np.asarray(one - losses.project(shared, taps))
    np.testing.assert_allclose(moved, np.broadcast_to(np.arange(9.0), moved.shape), atol=1e-5)
    assert losses.project(shared, taps.astype(jnp.bfloat16)).dtype == jnp.float32
    for nothing in (None, {}):
        np.testing.assert_array_equal(losses.project(nothing, taps), taps)
    wide = losses.init_projectors(jax.random.key(0), 400, 300, pairs=K)["kernel"]
    assert wide.shape == (K, 400, 300)
    np.testing.assert_allclose(wide.std(), 400**-0.5, rtol=0.02)


def test_filters_of_one_width_start_as_the_identity():
    taps = _array(K, B, L, D)
    filters = losses.init_filters(jax.random.key(0), K, D)
    np.testing.assert_array_equal(losses.project(filters, taps), taps)
    np.testing.assert_array_equal(losses.ted_stage2(filters, filters, taps, taps, MASK).value, 0)


def test_stage_one_is_the_mean_of_the_layers_cross_entropies():
    filters, taps, head = _filters(), _array(K, B, L, D), _array(V, 4, seed=3)
    bias, norm = _array(V, seed=4), lambda x: x / (1 + jnp.abs(x))
    mean = losses.ted_stage1(filters, taps, head, LABELS, MASK, norm=norm, head_bias=bias, chunk=3)
    logits = norm(losses.project(filters, taps)) @ head.T + bias[None, None, None]
    each = [losses.masked_mean(losses.cross_entropy(x, LABELS), MASK).value for x in logits]
    np.testing.assert_allclose(mean.value, np.mean(each), rtol=2e-6)
    assert mean.count == MASK.sum()


def test_only_the_filters_learn_in_stage_one():
    filters, taps, head = _filters(), _array(K, B, L, D), _array(V, 4, seed=3)
    loss = lambda f, taps, head: losses.ted_stage1(f, taps, head, LABELS, MASK).value
    slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(filters, taps, head)
    assert all((np.abs(leaf) > 1e-4).any() for leaf in jax.tree.leaves(slopes[0]))
    for constant in slopes[1:]:
        np.testing.assert_array_equal(constant, 0)
    before, w = loss(filters, taps, head), filters
    for _ in range(20):
        step = jax.grad(loss)(w, taps, head)
        w = jax.tree.map(lambda a, b: a - 0.3 * b, w, step)
    assert loss(w, taps, head) < before - 0.3


def test_only_the_students_side_learns_in_stage_two():
    arguments = (_filters(), _filters(8, 4, 1), _array(K, B, L, D), _array(K, B, L, 8, seed=1))
    loss = lambda *arguments: losses.ted_stage2(*arguments, MASK).value
    slopes = jax.grad(loss, argnums=(0, 1, 2, 3))(*arguments)
    moves = [any((leaf != 0).any() for leaf in jax.tree.leaves(slope)) for slope in slopes]
    assert moves == [True, False, True, False]


def test_stage_two_is_the_mean_squared_distance():
    ours, theirs = _filters(), _filters(8, 4, 1)
    student, teacher = _array(K, B, L, D), _array(K, B, L, 8, seed=1)
    gap = np.asarray(losses.project(ours, student) - losses.project(theirs, teacher))
    mean = losses.ted_stage2(ours, theirs, student, teacher, MASK)
    np.testing.assert_allclose(mean.value, np.square(gap).mean((0, -1))[MASK].mean(), rtol=1e-5)
    halves = [
        losses.ted_stage2(
            ours, theirs, student[:, i : i + 1], teacher[:, i : i + 1], MASK[i : i + 1]
        )
        for i in range(B)
    ]
    np.testing.assert_allclose((halves[0] + halves[1]).value, mean.value, rtol=1e-6)
    scaled = lambda c: losses.ted_stage2(
        losses.init_filters(jax.random.key(0), K, D), None, c * student, student, MASK,
        normalise=True,
    )  # fmt: skip
    np.testing.assert_allclose(scaled(1000.0).value, 0, atol=1e-5)


@pytest.mark.parametrize("junk", [1e6, np.inf, np.nan])
def test_padding_counts_nothing_whatever_it_holds(junk):
    ours, theirs, head = _filters(), _filters(8, 4, 1), _array(V, 4, seed=3)
    student, teacher = _array(K, B, L, D), _array(K, B, L, 8, seed=1)
    spoil = lambda x: jnp.where(MASK[None, ..., None], x, junk)

    def both(student, teacher):
        first = lambda f: losses.ted_stage1(f, student, head, LABELS, MASK).value
        second = lambda f, s: losses.ted_stage2(f, theirs, s, teacher, MASK).value
        return (
            jax.value_and_grad(first)(ours),
            jax.value_and_grad(second, argnums=(0, 1))(ours, student),
        )

    clean, spoiled = both(student, teacher), both(spoil(student), spoil(teacher))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(spoiled), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_token_at_all_is_zero_with_zero_gradient():
    filters, taps, nobody = _filters(), _array(K, B, L, D), np.zeros((B, L), bool)
    head = _array(V, 4, seed=3)
    for loss in (
        lambda f: losses.ted_stage1(f, taps, head, LABELS, nobody).value,
        lambda f: losses.ted_stage2(f, _filters(seed=1), taps, taps, nobody).value,
    ):
        value, slope = jax.value_and_grad(loss)(filters)
        assert value == 0
        for leaf in jax.tree.leaves(slope):
            np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize(
    "name", ["mse", "mse_plain", "cosine", "relations", "kernel", "projected_cosine"]
)
def test_gradients_are_finite_differences_in_float64(name):
    rng = np.random.default_rng(0)
    segments = np.where(MASK, 1, 0)
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(rng.normal(size=(K, B, L, D))) for _ in range(2))
        kernel = jnp.asarray(rng.normal(size=(K, D, D)))
        distances = {
            "mse": lambda x: losses.hidden_mse(x, teacher).sum(),
            "mse_plain": lambda x: losses.hidden_mse(x, teacher, normalise=False).sum(),
            "cosine": lambda x: losses.hidden_cosine(x, teacher).sum(),
            "relations": lambda x: losses.relation_kl(x[0], teacher[0], segments, heads=2).sum(),
            "kernel": lambda x: losses.hidden_mse(
                losses.project({"kernel": x[:, 0]}, student[..., :L]),
                teacher,
            ).sum(),
            "projected_cosine": lambda x: losses.hidden_cosine(
                losses.project({"kernel": kernel}, x), teacher
            ).sum(),
        }
        loss = jax.jit(distances[name])
        slope = jax.grad(loss)(student)
        assert slope.dtype == jnp.float64
        direction, step = jnp.asarray(rng.normal(size=student.shape)), 1e-6
        numeric = (loss(student + step * direction) - loss(student - step * direction)) / (2 * step)
        np.testing.assert_allclose((slope * direction).sum(), numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: losses.project(_filters(), _array(K, B, L, 7)), r"must be \[2, ..., 6\]"),
        (lambda: losses.project(_filters(), _array(3, B, L, D)), r"states \[3, 2, 5, 6\]"),
        (
            lambda: losses.project(losses.init_projectors(jax.random.key(0), D, 9), _array(B, 7)),
            r"must be \[..., 6\]",
        ),
        (
            lambda: losses.ted_stage2(
                _filters(), _filters(out=5), _array(K, B, L, D), _array(K, B, L, D), MASK
            ),
            "must have one shape",
        ),
        (
            lambda: losses.ted_stage1(_filters(), _array(K, B, 4, D), _array(V, 4), LABELS, MASK),
            r"taps \[2, 2, 4, 6\] and mask \[2, 5\]",
        ),
    ],
)
def test_shapes_that_do_not_fit_raise(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
