"""What is stored of a teacher equals its distribution, counted and summed in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import teachers
from jaxdistill.data.teacher_cache import formats
from jaxdistill.evaluate import answers_to_store
from jaxdistill.methods import kd
from jaxdistill.types import Batch, Outputs

V, D = 700, 8
RANDOM = np.random.default_rng(0)
HIDDEN = RANDOM.normal(size=(2, 5, D)).astype(np.float32)
HEAD = RANDOM.normal(size=(V + 4, D)).astype(np.float32)  # four rows are padding
LOGITS = np.einsum("bld,vd->blv", HIDDEN.astype(np.float64), HEAD[:V].astype(np.float64))
LOGP = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
POSITIONS = np.tile(np.arange(5, dtype=np.int32), (2, 1))


def answers(form, positions=POSITIONS, keys=None):
    """The stored fields [B, L, ...] of the outputs above, as a capture makes them."""
    outputs = Outputs(jnp.asarray(HIDDEN), jnp.asarray(HEAD))
    keys = np.full((2, 5), 7, np.uint32) if keys is None else keys
    found = answers_to_store.of_outputs(form, outputs, jnp.asarray(positions), jnp.asarray(keys))
    flat = {name: np.asarray(a).reshape(10, *a.shape[2:]) for name, a in found.items()}
    fields = answers_to_store.finish(form, flat)
    for name, (dtype, shape) in form.fields().items():
        assert fields[name].dtype == dtype and fields[name].shape == (10, *shape), name
    return {name: values.reshape(2, 5, *values.shape[1:]) for name, values in fields.items()}


def batch_of(stored):
    """A batch of nothing but stored fields."""
    return Batch(None, None, None, None, None, teacher=jax.tree.map(jnp.asarray, stored))


@pytest.mark.parametrize("k", [1, 9, V])
def test_the_likeliest_tokens_and_the_rest_at_every_temperature(k):
    form = formats.choose("topk", vocab=V, embed=D, k=k, dtype="float32", temperatures=(0.5, 3.0))
    stored = answers(form)
    for temperature in (1.0, 0.5, 3.0):
        logp = LOGP / temperature
        logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
        batch = batch_of(stored)
        known = teachers.cached(form, temperature=temperature)({}, None, batch).known
        ids = np.asarray(known.ids)
        best = np.sort(logp, axis=-1)[..., ::-1][..., :k]
        np.testing.assert_allclose(np.take_along_axis(logp, ids, -1), best, rtol=0, atol=1e-12)
        np.testing.assert_allclose(known.logprobs, best, rtol=2e-6, atol=2e-6)
        others = np.exp(logp).sum(-1) - np.exp(best).sum(-1)
        np.testing.assert_allclose(known.rest, others, rtol=1e-5, atol=1e-15 if k < V else 1e-12)
        if k == V:
            assert not np.asarray(known.rest).any()


def test_draws_are_those_of_the_distribution_and_of_no_place():
    form = formats.choose("sampled", vocab=V, embed=D, k=2000, draws=2, seed=3)
    stored = answers(form)
    np.testing.assert_allclose(
        stored["entropy"][..., 0].astype(np.float64), -(np.exp(LOGP) * LOGP).sum(-1), rtol=1e-3
    )
    ids, p = formats.unpack_ids(stored["ids"]), np.exp(LOGP)
    count = np.zeros((2, 5, 2, V))
    for index in np.ndindex(2, 5, 2):
        np.add.at(count[index], ids[index], stored["counts"][index])
    assert (count.sum(-1) == form.k).all()
    assert (count[:, :, 0] != count[:, :, 1]).any(-1).all()  # the draws are different ones
    n = 2 * form.k
    share, usual = count.sum(2) / n, n * p >= 5  # rare tokens are taken together
    assert (np.abs(share - p)[usual] <= 5 * np.sqrt(p * (1 - p) / n)[usual]).all()
    rare, rare_share = (np.where(usual, 0, x).sum(-1) for x in (p, share))
    assert (np.abs(rare_share - rare) <= 5 * np.sqrt(rare * (1 - rare) / n)).all()
    z2 = np.where(usual, n * (share - p) ** 2 / p, 0).sum(-1)  # chi-square, at most usual tokens
    assert (np.abs(z2 - usual.sum(-1)) < 5 * np.sqrt(2 * usual.sum(-1))).all()
    # The rows the other way round, at other places: the same draws.
    again = formats.choose("sampled", vocab=V, embed=D, k=5, seed=3)
    keys = np.array([[1] * 5, [2] * 5], np.uint32)
    one = answers(again, keys=keys)
    other = answers(again, keys=keys[::-1].copy())
    same = answers(again, keys=keys)
    np.testing.assert_array_equal(one["ids"], same["ids"])
    assert (one["ids"] != other["ids"]).any()


def test_a_running_sum_over_a_large_vocabulary_moves_no_token():
    """Every token has the same share: 2^17 draws of 2^17 tokens, each block its own."""
    vocab = 1 << 17
    p = jnp.full(vocab, 1 / vocab, jnp.float32)
    drawn = np.asarray(answers_to_store.draw(p, jax.random.key(0), 1 << 17))
    shares = np.bincount(drawn // 8192, minlength=16) / len(drawn)
    assert np.abs(shares - 1 / 16).max() < 5 * np.sqrt(1 / 16 / len(drawn))
    assert drawn.max() > 0.999 * vocab
    np.testing.assert_array_equal(
        answers_to_store.draw(jnp.array([0.0, 1.0, 0.0]), jax.random.key(0), 50), np.ones(50)
    )


def test_counts_of_draws():
    ids, counts = answers_to_store.counted(np.array([[4, 2, 4, 4], [1, 2, 3, 4]]), 4)
    np.testing.assert_array_equal(ids, [[2, 4, 0, 0], [1, 2, 3, 4]])
    np.testing.assert_array_equal(counts, [[1, 3, 0, 0], [1, 1, 1, 1]])


def test_shares_of_draws_are_what_the_step_is_told():
    form = formats.choose("sampled", vocab=V, embed=D, k=4)
    ids, counts = answers_to_store.counted(np.array([[[4, 699, 4, 4]]]), 4)
    stored = {
        "ids": formats.pack_ids(ids, form.id_bytes),
        "counts": counts.astype(np.uint8),
        "entropy": np.zeros((1, 1, 1), np.float16),
    }
    known = teachers.cached(form)({}, None, batch_of(stored)).known
    np.testing.assert_array_equal(known.ids, [[[4, 699, -1, -1]]])
    np.testing.assert_allclose(np.exp(known.logprobs[0, 0, :2]), [0.75, 0.25], rtol=1e-6)
    assert known.rest is None


def test_drawn_tokens_give_the_cross_entropy_and_an_estimate_of_the_kl():
    form = formats.choose("sampled", vocab=V, embed=D, k=50)
    stored = {n: a if n == "entropy" else a[:, :, 0] for n, a in answers(form).items()}
    batch = batch_of(stored)
    mask = np.ones((2, 5), bool)
    mask[1, 3:] = False
    batch = dataclasses.replace(batch, targets=jnp.zeros((2, 5), jnp.int32), mask=jnp.asarray(mask))
    signal = teachers.cached(form)({}, None, batch)
    student = Outputs(jnp.asarray(HIDDEN) * 0.5, jnp.asarray(HEAD))
    objective = kd.objective(vocab=V)
    knobs = {"alpha": jnp.float32(0.25), "temperature": jnp.float32(1.0)}
    means = objective.apply({}, student, signal, batch, knobs)
    logq = 0.5 * LOGITS
    logq = logq - np.log(np.exp(logq).sum(-1, keepdims=True))
    ids, counts = formats.unpack_ids(stored["ids"]), stored["counts"] / 50
    drawn = -(counts * np.take_along_axis(logq, ids, -1)).sum(-1)
    entropy = stored["entropy"][..., 0].astype(np.float64)
    assert float(means["loss/divergence"].value) == pytest.approx(drawn[mask].mean(), rel=1e-5)
    expected = (drawn - entropy)[mask].mean()
    assert float(means["loss/kl_t1"].value) == pytest.approx(expected, rel=1e-4)
    ce = -logq[..., 0][mask].mean()
    loss = 0.25 * ce + 0.75 * drawn[mask].mean()
    assert float(means["loss"].value) == pytest.approx(loss, rel=1e-5)
