"""Top-k teachers: reference values, the bounds of the ghost, finite differences, missing tokens."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "topk.json").read_text())
ROWS = {
    f"topk k={k} tail={short} forward KL": (k, tail)
    for short, tail in (("ghost", "ghost"), ("renorm", "renormalise"), ("drop", "drop"))
    for k in (1, 3, 6)
}


def inputs():
    b, t, v = np.meshgrid(np.arange(2), np.arange(5), np.arange(7), indexing="ij")
    student = 2.5 * np.sin(0.9 * v + 0.5 * t + 1.1 * b)
    teacher = 3 * np.cos(0.7 * v - 0.4 * t + 0.6 * b) + 0.5 * np.sin(2 * v)
    labels = np.array([[-100, -100, 3, 1, 6], [-100, 2, 5, 0, -100]])
    return jnp.float32(student), jnp.float32(teacher), labels != -100


# What these tests compute is one program each: one by one, its operations compile for seconds.
@functools.partial(jax.jit, static_argnums=1)
def kept(teacher, k):
    logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), k)
    return ids, logprobs


@pytest.mark.parametrize("row", GOLDEN["values"])
def test_reference_values(row):
    student, teacher, mask = inputs()
    k, tail = ROWS[row]
    ids, logprobs = kept(teacher, k)
    if tail == "renormalise" and k == 1:
        with pytest.raises(ValueError, match="0 for any student"):
            losses.topk_kl(student, ids, logprobs, tail=tail)
        return
    loss = lambda s: losses.masked_mean(losses.topk_kl(s, ids, logprobs, tail=tail), mask).value
    value, slope = jax.jit(jax.value_and_grad(loss))(student)
    wanted = GOLDEN["values"][row]
    np.testing.assert_allclose(value, wanted["loss"], rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(slope), wanted["grad_l2"], rtol=1e-5)
    np.testing.assert_array_equal(slope[~mask], 0.0)


def test_the_ghost_grows_to_the_whole_and_never_above():
    rng = np.random.default_rng(0)
    student, teacher = (jnp.float32(2 * rng.normal(size=(20, 12))) for _ in range(2))
    run = jax.jit(lambda s, t: [losses.topk_kl(s, *kept(t, k)) for k in range(1, 13)])
    values = np.asarray(run(student, teacher))
    whole = losses.forward_kl(student, teacher)
    for small, large in zip(values, values[1:], strict=False):
        assert (small <= large + 1e-5).all()
    np.testing.assert_allclose(values[-2], whole, rtol=2e-5)
    np.testing.assert_allclose(values[-1], whole, rtol=2e-5)


@pytest.mark.parametrize("tail", ["ghost", "drop", "renormalise"])
def test_slopes_are_finite_differences_in_float64(tail):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(rng.normal(size=(3, 9))) for _ in range(2))
        loss = jax.jit(lambda s: losses.topk_kl(s, *kept(teacher, 4), tail=tail).sum())
        slope = jax.jit(jax.grad(loss))(student)
        assert slope.dtype == jnp.float64
        direction, step = jnp.asarray(rng.normal(size=(3, 9))), 1e-6
        numeric = (loss(student + step * direction) - loss(student - step * direction)) / 2 / step
        np.testing.assert_allclose((slope * direction).sum(), numeric, rtol=1e-6)


@pytest.mark.parametrize("tail", ["ghost", "drop", "renormalise"])
def test_a_token_that_is_none_is_as_if_absent(tail):
    student, teacher, _ = inputs()
    ids, logprobs = kept(teacher, 3)
    padding = (jnp.full((2, 5, 2), -1), jnp.full((2, 5, 2), jnp.nan))
    more = [jnp.concatenate([a, b], -1) for a, b in zip((ids, logprobs), padding, strict=True)]
    loss = lambda s, *given: losses.topk_kl(s, *given, tail=tail).sum()
    run = jax.jit(jax.value_and_grad(loss))
    for a, b in zip(run(student, *more), run(student, ids, logprobs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("tail", ["ghost", "drop", "renormalise"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hard_logits_are_finite(tail, dtype):
    student, teacher, _ = inputs()
    student = (100 * student).astype(dtype).at[0, 0, 0].set(300).at[0, 1, 1].set(-jnp.inf)
    ids, logprobs = kept(100 * teacher, 2)
    ids, logprobs = ids.at[0, 1].set(jnp.array([2, 3])), logprobs
    value, slope = jax.value_and_grad(lambda s: losses.topk_kl(s, ids, logprobs, tail=tail).sum())(
        student
    )
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(slope, np.float32)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tail": "zero"}, "must be one of ghost"),
        ({"teacher_ids": jnp.zeros((2, 5, 3), jnp.int32)}, "K from 1 to V"),
        ({"teacher_ids": jnp.zeros((2, 5, 2), jnp.int32)}, "stands twice"),
        ({"teacher_logprobs": jnp.ones((2, 5, 2))}, "must be at most 0"),
        ({"teacher_logprobs": jnp.full((2, 5, 2), -0.1)}, "sum to 1.81"),
        ({"teacher_ids": jnp.zeros((2, 5, 2))}, "must be integers"),
        ({"student_logits": jnp.zeros((5, 7))}, r"\[5, 'K'\]"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    student, teacher, _ = inputs()
    ids, logprobs = kept(teacher, 2)
    given = {"student_logits": student, "teacher_ids": ids, "teacher_logprobs": logprobs}
    with pytest.raises(ValueError, match=words):
        losses.topk_kl(**(given | change))


# Of z = (1, .5, 0, -1) and z_T = (.2, 1.2, -.5, .3), from a float64 program of somebody else.
STUDENT, TEACHER = jnp.array([1, 0.5, 0, -1]), jnp.array([0.2, 1.2, -0.5, 0.3])


@pytest.mark.parametrize(
    ("ids", "reverse", "value", "slope"),
    [
        ([0, 1], True, 0.210508, (0.308968, -0.243836, -0.047615, -0.017517)),
        ([1, 3], True, 0.126341, (0.114095, -0.096130, 0.041973, -0.059938)),
        ([1, 3], False, 0.170900, (0.173979, -0.117938, 0.064003, -0.120044)),
    ],
)
def test_the_generalised_kl_has_the_oracles_values(ids, reverse, value, slope):
    ids = jnp.array(ids)
    logprobs = jax.nn.log_softmax(TEACHER)[ids]
    loss = lambda s: losses.topk_generalized_kl(s, ids, logprobs, reverse=reverse)
    got, by_logits = jax.jit(jax.value_and_grad(loss))(STUDENT)
    np.testing.assert_allclose(got, value, atol=1e-6)
    np.testing.assert_allclose(by_logits, slope, atol=1e-6)
    rest = 1 - jnp.exp(logprobs).sum()
    given = jax.jit(lambda s, rest: losses.topk_kl(s, ids, logprobs, teacher_rest=rest))
    plain = jax.jit(lambda s: losses.topk_kl(s, ids, logprobs))
    np.testing.assert_allclose(given(STUDENT, rest), plain(STUDENT), rtol=1e-6)


@pytest.mark.parametrize(("tail", "value"), [("drop", 0.537951), ("ghost", 0.303059)])
def test_the_forward_kl_has_the_oracles_values(tail, value):
    ids = jnp.array([1, 3])
    logprobs = jax.nn.log_softmax(TEACHER)[ids]
    np.testing.assert_allclose(losses.topk_kl(STUDENT, ids, logprobs, tail=tail), value, atol=1e-6)


def test_sub_measures_that_a_truncated_kl_would_put_below_zero():
    student = jnp.log(jnp.array([0.30, 0.25, 0.45]))
    ids, logprobs = jnp.array([0, 1]), jnp.log(jnp.array([0.02, 0.01]))
    truncated = losses.topk_kl(student, ids, logprobs, tail="drop")
    np.testing.assert_allclose(truncated, -0.0863, atol=1e-4)
    np.testing.assert_allclose(
        losses.topk_generalized_kl(student, ids, logprobs), 0.4337, atol=1e-4
    )


def test_drawn_tokens_have_the_whole_rows_mean():
    """By enumeration: each token drawn, weighed by its probability."""
    p, q = jax.nn.softmax(TEACHER), jax.nn.softmax(STUDENT)
    one = lambda s, y: losses.sampled_cross_entropy(s, jnp.array([y]), jnp.zeros(1))
    mean = lambda s: sum(p[y] * one(s, y) for y in range(4))
    whole = lambda s: -jnp.sum(p * jax.nn.log_softmax(s))
    slopes = (jax.jit(jax.grad(loss))(STUDENT) for loss in (mean, whole))
    np.testing.assert_allclose(*slopes, atol=1e-6)
    ids, log_p = jnp.array([1, 3]), jnp.log(p)
    tail = lambda s, y: losses.sampled_reverse_kl(s, ids, log_p[ids], jnp.array(y), log_p[y])
    mean = lambda s: sum(q[y] * tail(s, y) for y in range(4))
    value, slope = jax.jit(jax.value_and_grad(mean))(STUDENT)
    np.testing.assert_allclose(value, 0.306657, atol=1e-6)
    np.testing.assert_allclose(slope, (0.293048, -0.253492, 0.055495, -0.095050), atol=1e-6)
