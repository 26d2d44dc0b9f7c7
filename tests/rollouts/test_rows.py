"""Answers in rows: what counts, how many rows there are, and the gradient that they give."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.data import pipeline
from jaxdistill.data.prompts import Prompt
from jaxdistill.methods import kd
from jaxdistill.rollouts import answers as records
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.rows import buckets, rows_of
from jaxdistill.types import Outputs, TeacherSignal


def answer(prompt, tokens, ended=True, place=0, sample=0, version=0):
    scores = -0.5 - np.arange(len(tokens), dtype=np.float32)
    return Answer(
        Prompt(np.asarray(prompt, np.int32), {}),
        place,
        sample,
        version,
        np.asarray(tokens, np.int32),
        ended,
        scores,
        scores - 0.25,
    )


def rows(answers, seq_len=12, packing="best_fit", sizes=(8,), distilled=None):
    return rows_of(
        answers, seq_len=seq_len, pad=0, packing_by=packing, sizes=sizes, distilled=distilled
    )


def test_the_answer_counts_and_nothing_else_does():
    """The prompt, padding and what follows the end are masked; the end token counts."""
    end = 9
    given = [answer([1, 2, 3], [4, 0, end]), answer([5], [6, 6], ended=False)]
    (first, *_), logprobs = rows(given, sizes=(1,))
    assert first["tokens"].tolist() == [1, 2, 3, 4, 0, end, 5, 6, 6, 0, 0, 0]
    counted = [(i, int(first["targets"][i])) for i in np.flatnonzero(first["mask"])]
    assert counted == [(2, 4), (3, 0), (4, end), (6, 6), (7, 6)]  # a token 0 is no padding
    assert first["positions"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 0, 0]
    assert first["segment_ids"].tolist() == [1] * 6 + [2] * 3 + [0] * 3
    assert logprobs[0].tolist() == [0, 0, -0.5, -1.5, -2.5, 0, -0.5, -1.5, 0, 0, 0, 0]


def test_only_the_first_tokens_count_where_that_is_asked():
    (row,), logprobs = rows([answer([1, 2], [3, 4, 5, 6])], sizes=(1,), distilled=2)
    assert np.flatnonzero(row["mask"]).tolist() == [1, 2]
    assert np.count_nonzero(logprobs) == 2


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_no_answer_is_lost_and_rows_are_filled_up_to_a_bucket(packing):
    given = [answer([1] * (1 + i % 3), [2] * (1 + i % 5)) for i in range(7)]
    made, logprobs = rows(given, packing=packing, sizes=(2, 4, 6, 8))
    used = sum(row["segment_ids"].any() for row in made)
    assert len(made) == len(logprobs) == next(n for n in (2, 4, 6, 8) if n >= used)
    assert (used == 7) == (packing == "none")
    assert sum(row["mask"].sum() for row in made) == sum(len(one.tokens) for one in given)


def test_buckets_are_few_and_waste_at_most_half():
    assert buckets(64, 1) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    assert buckets(24, 8) == (8, 16, 24)
    assert buckets(8, 8) == (8,)
    for most, unit in ((64, 1), (96, 4), (40, 8), (1000, 8)):
        sizes = buckets(most, unit)
        assert sizes[-1] == most and all(size % unit == 0 for size in sizes)
        gaps = zip(sizes, sizes[1:], strict=False)
        assert all(next_ <= max(2 * size, size + unit) for size, next_ in gaps)
        assert len(sizes) <= 2 * np.log2(most / unit) + 2


def test_answers_come_back_from_a_checkpoint_as_they_were():
    given = [answer([1], [2, 3], True, 5, 0, 4), answer([1], [70000], False, 5, 1, 4)]
    back = records.unpacked(records.packed(given), lambda place: given[0].prompt)
    for one, other in zip(given, back, strict=True):
        for field in ("place", "sample", "version", "ended"):
            assert getattr(one, field) == getattr(other, field)
        for field in ("tokens", "logprobs", "drawn_logprobs"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_numbers_of_answers_that_are_all_cut_or_empty():
    cut = dict(records.numbers([answer([1], [2, 3], ended=False)] * 2, 7))
    assert (cut["rollout/truncated"], cut["rollout/empty"], cut["rollout/age"]) == (1, 0, 7)
    empty = dict(records.numbers([answer([1], [9]), answer([1], [9])], 0))
    assert (empty["rollout/truncated"], empty["rollout/empty"]) == (0, 1)
    assert empty["rollout/entropy"] == pytest.approx(0.75)


def _expected_gradient(student, teacher):
    """By enumeration: the mean over the student's two-token answers of the exact loss's gradient.

    The model is two tables, [1 + V, V]: the logits of the first token, and of the second after each
    first one. Its hidden states are one-hot, its head is the table.
    """
    vocab = student.shape[1]
    objective = kd.objective(divergence="reverse_kl", vocab=vocab, chunk=None)
    knobs = {"alpha": jnp.float32(0), "temperature": jnp.float32(1)}
    pairs = list(itertools.product(range(vocab), repeat=2))
    # Token V is the prompt; a state tells the token that was read: the table's row.
    batches = [pipeline.stack(rows([answer([vocab], pair)], 4, sizes=(1,))[0]) for pair in pairs]

    @jax.jit
    def gradient(table, batch):
        first = batch.tokens == vocab
        states = jax.nn.one_hot(jnp.where(first, 0, batch.tokens + 1), 1 + vocab)
        see = lambda logits: Outputs(states @ logits, jnp.eye(vocab))
        signal = TeacherSignal(see(teacher))
        return jax.grad(lambda z: objective.apply({}, see(z), signal, batch, knobs)["loss"].total)(
            table
        )

    logq = np.asarray(jax.nn.log_softmax(student), np.float64)
    chance = [np.exp(logq[0, one] + logq[1 + one, two]) for one, two in pairs]
    exact = sum(
        p * np.asarray(gradient(student, batch), np.float64)
        for p, batch in zip(chance, batches, strict=True)
    )
    return exact, logq, chance, pairs


def test_the_exact_gradient_is_that_of_the_policy_gradient_with_l_at_the_sampled_token():
    rng = np.random.default_rng(3)
    student, teacher = (jnp.asarray(rng.normal(size=(5, 4)), jnp.float32) for _ in range(2))
    exact, logq, chance, pairs = _expected_gradient(student, teacher)
    logp = np.asarray(jax.nn.log_softmax(teacher), np.float64)
    sampled = np.zeros((5, 4))
    for p, (one, two) in zip(chance, pairs, strict=True):
        for place, token in ((0, one), (1 + one, two)):
            slope = -np.exp(logq[place])
            slope[token] += 1  # of log q at the token, by the logits
            sampled[place] += p * (logq[place, token] - logp[place, token]) * slope
    np.testing.assert_allclose(exact, sampled, atol=1e-6)


def test_the_exact_gradient_of_two_steps_is_the_one_that_was_computed_elsewhere():
    """The specification's example: two tokens, the logits of token 1."""
    table = lambda one, after0, after1: jnp.asarray([[0, one], [0, after0], [0, after1]])
    exact, *_ = _expected_gradient(table(0.3, -0.4, 0.8), table(-0.5, 0.6, 0.1))
    np.testing.assert_allclose(exact[:, 1], (0.195567, -0.102245, 0.086015), atol=1e-6)
