"""What becomes of ids of any type, of ids that are none, and of numbers that no check can see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.kernels import linear_divergence, linear_logprobs

N, V, D = 6, 300, 4
IDS = np.array([[3, 100, 7], [5, 0, 127], [90, 2, 1], [0, 1, 2], [9, 8, 7], [126, 11, 12]])


def draw(seed=0, vocab=V):
    rng = np.random.default_rng(seed)
    return jnp.float32(rng.normal(size=(N, D))), jnp.float32(rng.normal(size=(vocab, D)))


def given(vocab=V, ids=IDS, seed=1):
    """log p of the ids, of some teacher."""
    log_p = jax.nn.log_softmax(np.float32(np.random.default_rng(seed).normal(size=(N, vocab))))
    return np.take_along_axis(np.asarray(log_p), ids, 1)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_ids_and_columns_of_any_integer_type(dtype):
    """A narrow type has no number for V = 300: nothing may wrap, known or traced."""
    hidden, head = draw()
    log_p, columns = given(), np.array([0, 5, 9, 127])

    def all_of(ids, columns, labels):
        said = linear_logprobs(hidden, head, ids, sets=[columns])
        known, _ = linear_divergence(
            hidden, head, teacher_ids=ids, teacher_logprobs=log_p, sampled_ids=labels,
            sampled_logprobs=log_p[:, 0], kind="generalized_reverse_kl", alpha=0.5, labels=labels,
        )  # fmt: skip
        mapped, _ = linear_divergence(
            hidden, head, hidden, head[::-1], student_columns=columns, teacher_columns=columns
        )
        shared = losses.shared_columns(hidden @ head.T, columns, others="bucket")
        return said.logprobs, said.log_masses, known, mapped, shared

    want = jax.jit(lambda: all_of(IDS, columns, IDS[:, 1]))()
    arrays = [jnp.asarray(a, dtype) for a in (IDS, columns, IDS[:, 1])]
    for got in (jax.jit(all_of)(*arrays), jax.jit(lambda: all_of(*arrays))()):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), got, want)


@pytest.mark.parametrize("beyond", [2**32 + 1, 2**63 + 1])
def test_ids_beyond_int32_are_outside_the_vocabulary(beyond):
    """JAX would take their last 32 bits, which name a token."""
    hidden, head = draw()
    ids = np.where(IDS == 100, np.uint64(beyond), IDS.astype(np.uint64))
    with pytest.raises(ValueError, match="2147483647 is no token of a vocabulary of 300"):
        linear_logprobs(hidden, head, ids)
    with pytest.raises(ValueError, match="2147483647 is no token of a vocabulary of 300"):
        linear_divergence(hidden, head, teacher_ids=ids, teacher_logprobs=given())
    with pytest.raises(ValueError, match="2147483647 is no column"):
        losses.shared_columns(hidden @ head.T, np.array([0, beyond], np.uint64))
    with pytest.raises(ValueError, match="0 to V - 1 = 299"):
        linear_logprobs(hidden, head, sets=[np.array([1, beyond], np.uint64)])
    labels = np.array([1, beyond, 2, 3, 4, 5], np.uint64)
    assert np.isnan(linear_divergence(hidden, head, labels=labels, alpha=1.0)[0])
    for plain in (losses.cross_entropy, losses.token_log_probability):
        np.testing.assert_array_equal(np.isnan(plain(hidden @ head.T, labels)), [0, 1, 0, 0, 0, 0])
    none = np.int64(-(2**32) + 5)  # below int32 it is none, not token 5
    said = linear_logprobs(hidden, head, np.full(N, none))
    np.testing.assert_array_equal(said.logprobs, 0.0)


def test_what_is_known_inside_a_jit_is_looked_at_whatever_its_type():
    hidden, head = draw()
    for ids in (IDS + 200, jnp.asarray(IDS + 200, jnp.uint16), jnp.asarray(IDS + 200)):
        with pytest.raises(ValueError, match="327 is no token"):
            jax.jit(lambda ids=ids: linear_logprobs(hidden, head, ids).logprobs)()
    with pytest.raises(ValueError, match="K at least 1"):
        linear_logprobs(hidden, head, np.zeros((N, 0), int))


SEVEN = np.array([[3, 5], [0, 6], [1, 2], [4, 0], [6, 5], [2, 3]])


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("kind", ["forward_kl", "generalized_reverse_kl"])
def test_ids_that_are_none_change_nothing_even_as_many_as_the_vocabulary_has(kind, implementation):
    """2 tokens of 7 are known, in lists of 2, 6 and 7: the other 5 stay the ghost."""
    hidden, head = draw(vocab=7)
    log_p = given(7, SEVEN)

    def run(width):
        pad = ((0, 0), (0, width - 2))
        known = np.pad(SEVEN, pad, constant_values=-1), np.pad(log_p, pad, constant_values=np.nan)
        loss = lambda hidden: linear_divergence(
            hidden, head, kind=kind, teacher_ids=known[0], teacher_logprobs=known[1],
            implementation=implementation,
        )[0]  # fmt: skip
        return jax.jit(jax.value_and_grad(loss))(hidden)

    (want, slope), *others = (run(width) for width in (2, 6, 7))
    for value, other in others:
        np.testing.assert_allclose(value, want, rtol=1e-6)
        np.testing.assert_allclose(other, slope, atol=1e-7)
    if kind == "forward_kl":
        logits = hidden @ head.T
        padded = (
            np.pad(SEVEN, ((0, 0), (0, 5)), constant_values=-1),
            np.pad(log_p, ((0, 0), (0, 5))),
        )
        np.testing.assert_allclose(losses.topk_kl(logits, *padded).mean(), want, rtol=1e-6)


def test_where_all_tokens_are_known_no_rest_is_left():
    """Stored in float16 they sum to less than 1; the ghost of no token would be infinite."""
    hidden, head = draw(vocab=7)
    ids = np.tile(np.arange(7), (N, 1))
    log_p = given(7, ids) - 2e-3
    for implementation in (None, "reference"):
        value, _ = linear_divergence(
            hidden, head, teacher_ids=ids, teacher_logprobs=log_p, implementation=implementation
        )
        log_q = jax.nn.log_softmax(hidden @ head.T)
        want = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
        np.testing.assert_allclose(value, want, rtol=1e-5)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_traced_probabilities_that_break_a_rule(implementation):
    """Above 0 is 0 wherever it is read; above 1 together leaves no rest; NaN stays NaN."""
    hidden, head = draw(vocab=7)
    ids, log_p = SEVEN, given(7, SEVEN)
    log_q = np.asarray(jax.nn.log_softmax(hidden @ head.T), np.float64)
    picked = np.take_along_axis(log_q, ids, 1)

    @jax.jit
    def run(logprobs, rest, drawn):
        known = {"teacher_ids": ids, "teacher_logprobs": logprobs}
        ghost = {"teacher_rest": rest} | known
        tail = {"sampled_ids": jnp.full(N, 6), "sampled_logprobs": drawn} | known
        run = lambda kind="forward_kl", **more: linear_divergence(
            hidden, head, kind=kind, implementation=implementation, **more
        )
        (plain, means), (taken, _) = run(**known), run(**ghost)
        return (
            plain,
            means["teacher/kept_mass"].value,
            taken,
            run("generalized_reverse_kl", **tail)[0],
        )

    rest, drawn = np.full(N, 0.1, np.float32), np.full(N, -1, np.float32)
    certain = np.concatenate([np.full((N, 1), 0.4, np.float32), log_p[:, 1:]], 1)
    value, mass, _, tail = run(certain, rest, drawn)
    clipped = np.minimum(certain, 0).astype(np.float64)
    p = np.exp(clipped)
    # Rows of a sum above 1: the known tokens alone, never below 0.
    np.testing.assert_allclose(
        value, np.maximum((p * (clipped - picked)).sum(1), 0).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(mass, p.sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(tail, run(clipped, rest, drawn)[3], rtol=1e-6)
    np.testing.assert_array_equal(run(log_p, rest, drawn + 3)[3], run(log_p, rest, drawn * 0)[3])

    spoiled = rest.copy()
    spoiled[2] = np.nan
    assert np.isnan(run(log_p, spoiled, drawn)[2])
    for low, as_if in ((-3.0, 0.0), (7.0, 1.0)):
        got = run(log_p, np.full_like(rest, low), drawn)[2]
        np.testing.assert_array_equal(got, run(log_p, np.full_like(rest, as_if), drawn)[2])


def test_wrong_logprobs_beside_traced_ids_follow_the_rules_of_traced_ones():
    """Which of them count cannot be known: what is under a traced id of -1 may be anything."""
    hidden, head = draw(vocab=7)
    wrong = np.array([[0.3, np.nan]] * N, np.float32)
    run = jax.jit(
        lambda ids: linear_divergence(hidden, head, teacher_ids=ids, teacher_logprobs=wrong)[0]
    )
    one = np.where([True, False], SEVEN, -1)
    certain = linear_divergence(
        hidden, head, teacher_ids=SEVEN[:, :1], teacher_logprobs=np.zeros((N, 1), np.float32)
    )[0]
    np.testing.assert_allclose(run(one), certain, rtol=1e-6)
    assert np.isnan(run(SEVEN))


def test_a_number_of_no_drawn_token_may_be_anything():
    hidden, head = draw(vocab=7)
    log_p, drawn = given(7, SEVEN), np.full(N, -1.0)
    drawn[2] = np.nan
    loss = lambda ids: losses.sampled_reverse_kl(hidden @ head.T, SEVEN, log_p, ids, drawn)
    assert np.isfinite(loss(np.array([4, 4, -1, 4, 4, -1]))).all()
    with pytest.raises(ValueError, match="sampled_logprobs: the largest is nan"):
        loss(np.full(N, 4))


def test_plain_functions_mark_rows_whose_traced_numbers_are_nan():
    logits = jnp.float32(np.random.default_rng(0).normal(size=(2, 7)))
    ids, log_p = SEVEN[:2], given(7, SEVEN)[:2]
    bad = np.array([np.nan, 0.1], np.float32)

    @jax.jit
    def run(logits, bad):
        ghost = lambda z: losses.topk_kl(z, ids, log_p, teacher_rest=bad)
        drawn = jnp.array([4, 4])
        tail = lambda z: losses.sampled_reverse_kl(z, ids, log_p, drawn, jnp.log(bad))
        second = lambda f: jax.grad(lambda z: f(z)[1])(logits)
        return [(f(logits), second(f)) for f in (ghost, tail)]

    for values, slope in run(logits, bad):
        np.testing.assert_array_equal(np.isnan(values), [True, False])
        assert np.isfinite(slope).all() and not slope[0].any() and slope[1].any()
