"""Answers in rows: what counts, how many rows there are, and the gradient that they give."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.data import batching
from jaxdistill.data.prompts import Prompt
from jaxdistill.data.routes import MicroBatchLayout, TeacherRoutes
from jaxdistill.methods import kd, sampled_kl
from jaxdistill.rollouts import answers as records
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.rows import buckets, rows_of
from jaxdistill.types import Outputs, TeacherSignal


def answer(prompt, tokens, ended=True, place=0, sample=0, version=0, drawn=None):
    scores = -0.5 - np.arange(len(tokens), dtype=np.float32)
    return Answer(
        Prompt(np.asarray(prompt, np.int32), {}),
        place,
        sample,
        version,
        np.asarray(tokens, np.int32),
        ended,
        scores,
        scores - 0.25 if drawn is None else np.asarray(drawn, np.float32),
    )


def rows(answers, seq_len=12, packing="best_fit", sizes=(8,), distilled=None, sampler=False):
    return rows_of(
        answers,
        seq_len=seq_len,
        pad=0,
        packing_by=packing,
        sizes=sizes,
        distilled=distilled,
        sampler=sampler,
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
    ((drawn, *_), _) = rows(given, sizes=(1,), sampler=True)
    assert "sampler_logprobs" not in first
    expected = [0, 0, -0.75, -1.75, -2.75, 0, -0.75, -1.75, 0, 0, 0, 0]
    assert drawn["sampler_logprobs"].tolist() == expected


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


EXACT = functools.partial(kd.objective, divergence="reverse_kl")
KNOBS = {"alpha": 0.0, "temperature": 1.0, "weight": 1.0}


def _expected_gradient(student, teacher, make=EXACT, sampler=None):
    """By enumeration: the mean over the sampler's two-token answers of an objective's gradient.

    A model is two tables, [1 + V, V]: the logits of the first token, and of the second after each
    first one. Its hidden states are one-hot, its head is the table. None: the student is the
    sampler.
    """
    vocab = student.shape[1]
    objective = make(vocab=vocab, chunk=None)
    knobs = {name: jnp.float32(value) for name, value in KNOBS.items()}
    pairs = list(itertools.product(range(vocab), repeat=2))
    of = student if sampler is None else sampler
    log_mu = np.asarray(jax.nn.log_softmax(of), np.float64)
    drawn = lambda pair: (log_mu[0, pair[0]], log_mu[1 + pair[0], pair[1]])
    # Token V is the prompt; a state tells the token that was read: the table's row.
    batches = [
        batching.stack(
            rows([answer([vocab], pair, drawn=drawn(pair))], 4, sizes=(1,), sampler=True)[0]
        )
        for pair in pairs
    ]

    @jax.jit
    def gradient(table, batch):
        first = batch.tokens == vocab
        states = jax.nn.one_hot(jnp.where(first, 0, batch.tokens + 1), 1 + vocab)
        see = lambda logits: Outputs(states @ logits, jnp.eye(vocab))
        signal = TeacherSignal(see(teacher))
        return jax.grad(lambda z: objective.apply({}, see(z), signal, batch, knobs)["loss"].total)(
            table
        )

    chance = [np.exp(sum(drawn(pair))) for pair in pairs]
    return sum(
        p * np.asarray(gradient(student, batch), np.float64)
        for p, batch in zip(chance, batches, strict=True)
    )


def tables(count):
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.normal(size=(5, 4)), jnp.float32) for _ in range(count)]


def test_the_exact_gradient_is_that_of_the_policy_gradient_with_l_at_the_sampled_token():
    student, teacher = tables(2)
    logq, logp = (np.asarray(jax.nn.log_softmax(one), np.float64) for one in (student, teacher))
    expected = np.zeros((5, 4))
    for one, two in itertools.product(range(4), repeat=2):
        for place, token in ((0, one), (1 + one, two)):
            slope = -np.exp(logq[place])
            slope[token] += 1  # of log q at the token, by the logits
            gap = logq[place, token] - logp[place, token]
            expected[place] += np.exp(logq[0, one] + logq[1 + one, two]) * gap * slope
    np.testing.assert_allclose(_expected_gradient(student, teacher), expected, atol=1e-6)
    ours = _expected_gradient(student, teacher, sampled_kl.objective)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_another_sampler_is_corrected_by_the_ratio_up_to_its_bound():
    """At the states that mu visits both are the gradient of KL(q || p); cut ratios are not."""
    student, teacher, sampler = tables(3)
    exact = _expected_gradient(student, teacher, sampler=sampler)
    free = functools.partial(sampled_kl.objective, max_ratio=1e6)
    ours = _expected_gradient(student, teacher, free, sampler)
    np.testing.assert_allclose(ours, exact, atol=1e-6)
    cut = _expected_gradient(student, teacher, sampled_kl.objective, sampler)
    assert np.abs(cut - exact).max() > 1e-3


def test_early_tokens_count_more():
    """Of two tokens the first counts 1 + gamma times, the second by what is left of |l|."""
    student, teacher = tables(2)
    logq, logp = (np.asarray(jax.nn.log_softmax(one), np.float64) for one in (student, teacher))
    expected = np.zeros((5, 4))
    for one, two in itertools.product(range(4), repeat=2):
        places = ((0, one), (1 + one, two))
        gaps = [logq[place, token] - logp[place, token] for place, token in places]
        left = abs(gaps[1]) / (abs(gaps[0]) + abs(gaps[1]))
        for (place, token), gap, weight in zip(places, gaps, (1.5, 1 + 0.5 * left), strict=True):
            slope = -np.exp(logq[place])
            slope[token] += 1
            expected[place] += np.exp(logq[0, one] + logq[1 + one, two]) * weight * gap * slope
    early = functools.partial(sampled_kl.objective, early=0.5)
    np.testing.assert_allclose(_expected_gradient(student, teacher, early), expected, atol=1e-6)


def test_weights_of_early_tokens_begin_anew_in_every_answer_of_a_row():
    """The specification's example twice in a row, prompts between; against each alone."""
    gains = np.asarray([[9, 0.5, -0.2, 1.0, -0.3, np.nan, 0.5, -0.2, 1.0, -0.3, 9]])
    mask = np.asarray([[0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0]], bool)
    segments = np.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    weights = losses.early_weights(gains, mask, 0.5, segments)[0]
    expected = (1.5, 1.375, 1.325, 1.075)
    np.testing.assert_allclose(weights[1:5], expected, atol=1e-6)
    np.testing.assert_allclose(weights[6:10], expected, atol=1e-6)
    nothing = losses.early_weights(np.zeros((1, 3)), np.ones((1, 3), bool), 0.5)
    np.testing.assert_allclose(nothing, 1.5)


def test_the_exact_gradient_of_two_steps_is_the_one_that_was_computed_elsewhere():
    """The specification's example: two tokens, the logits of token 1."""
    table = lambda one, after0, after1: jnp.asarray([[0, one], [0, after0], [0, after1]])
    exact = _expected_gradient(table(0.3, -0.4, 0.8), table(-0.5, 0.6, 0.1))
    np.testing.assert_allclose(exact[:, 1], (0.195567, -0.102245, 0.086015), atol=1e-6)


def test_answers_of_several_teachers_share_no_row_and_no_micro_batch():
    """By hand: four answers of math in two rows, two of code in one, three parts of two rows."""
    routing, layout = TeacherRoutes(("math", "code")), MicroBatchLayout(2, 2)
    given = []
    for number, name in enumerate(("math", "code", "math", "math", "code", "math")):
        one = answer([1, 2], [3 + number] * 4)
        given.append(dataclasses.replace(one, prompt=Prompt(one.prompt.tokens, {"teacher": name})))
    made = lambda *sizes: rows_of(
        given, seq_len=12, pad=0, packing_by="best_fit", sizes=sizes, distilled=None,
        routing=routing, layout=layout,
    )  # fmt: skip
    # Two rows in M = 2 parts take M + K - 1 = 3 parts of one row, which is room for the three.
    assert [int(row["route"]) for row in made(2, 4, 8)[0]] == [1, 1, 2]
    found, logprobs = made(4, 8)  # three parts of two rows; part p has the places p, p + 3
    assert [int(row["route"]) for row in found] == [1, 2, 0, 1, 0, 0]
    assert logprobs.shape == (6, 12)
    held = [sorted(set(row["tokens"].tolist()) - {0, 1, 2}) for row in found]
    assert sorted(held[0] + held[3]) == [3, 5, 6, 8] and held[1] == [4, 7]
    assert not any(found[place]["mask"].any() for place in (2, 4, 5))
