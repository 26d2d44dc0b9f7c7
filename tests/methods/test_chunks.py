"""Likelihoods of chunks from hidden states, against float64 NumPy, and ALM between equal models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.methods import alm
from jaxdistill.methods.chunks import Likelihoods, per_chunk_token
from jaxdistill.types import Batch, Outputs, TeacherSignal

B, L, M, D = 2, 7, 5, 4
VOCABS = 11, 13
OPENING = (2, 3), (1, 7, 12)
GROUPS = [[0, 1, 1, 2, 3, 3, 0], [0, 0, 1, 1, 1, 2, 2]]
OTHER = [[0, 1, 2, 2, 3], [0, 1, 1, 2, 0]]


def outputs(seed, vocab, length, rows=0):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(B, length, D)), rng.normal(size=(vocab + rows, D))
    return Outputs(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32))


@pytest.fixture
def batch():
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, VOCABS[0], (B, L)).astype(np.int32)
    view = {"tokens": rng.integers(0, VOCABS[1], (B, M)), "groups": OTHER}
    view = {name: jnp.asarray(value, jnp.int32) for name, value in view.items()}
    targets = np.pad(tokens[:, 1:], [(0, 0), (0, 1)])
    mask = jnp.asarray(np.pad(np.ones((B, L - 1), bool), [(0, 0), (0, 1)]))
    ones = jnp.ones((B, L), jnp.int32)
    return Batch(
        jnp.asarray(tokens), jnp.asarray(targets), mask, ones, ones,
        groups=jnp.asarray(GROUPS, jnp.int32), second=view,
    )  # fmt: skip


def by_definition(said, tokens, groups, vocab, opening, count=M):
    """float64: log q of each token of a group, and of a word that begins behind its last one."""
    logits = np.asarray(said.hidden, np.float64) @ np.asarray(said.head, np.float64)[:vocab].T
    logq = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chunks = np.zeros((B, count))
    for b in range(B):
        for i, group in enumerate(groups[b]):
            if not group:
                continue
            chunks[b, group - 1] += logq[b, i - 1, tokens[b, i]]
            if i + 1 == len(groups[b]) or groups[b][i + 1] != group:
                chunks[b, group - 1] += np.log(np.exp(logq[b, i, list(opening)]).sum())
    return chunks, logq


def test_chunks_of_both_sides_are_those_of_the_definition(batch):
    said, view = Likelihoods(OPENING, VOCABS[1], {"vocab": VOCABS[0]}), batch.second
    # Rows behind the vocabulary are no tokens.
    student, teacher = outputs(0, VOCABS[0], L, rows=2), outputs(1, VOCABS[1], M, rows=3)
    ours, ce = said.student(student, batch)
    expected, logq = by_definition(student, np.asarray(batch.tokens), GROUPS, VOCABS[0], OPENING[0])
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    picked = [logq[b, i, batch.tokens[b, i + 1]] for b in range(B) for i in range(L - 1)]
    assert ce.value == pytest.approx(-np.mean(picked), rel=1e-5) and ce.count == B * (L - 1)
    theirs, weights = said.teacher(teacher, batch)
    tokens = np.asarray(view["tokens"])
    expected, _ = by_definition(teacher, tokens, OTHER, VOCABS[1], OPENING[1])
    np.testing.assert_allclose(theirs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(weights, [[1, 2, 1, 0, 0], [2, 1, 0, 0, 0]])
    assert per_chunk_token(batch) == pytest.approx(12 / 7)


def objective_of(batch, student, teacher, alpha=0.25, tau=100.0):
    made = alm.objective(opening=OPENING, teacher_vocab=VOCABS[1], tau=tau, vocab=VOCABS[0])
    signal = TeacherSignal(teacher)
    return made.apply({}, student, signal, batch, {"alpha": jnp.float32(alpha)})


def test_the_loss_and_its_slope_by_finite_differences(batch):
    student, teacher = outputs(0, VOCABS[0], L), outputs(1, VOCABS[1], M)
    s, _ = by_definition(student, np.asarray(batch.tokens), GROUPS, VOCABS[0], OPENING[0])
    tokens = np.asarray(batch.second["tokens"])
    t, _ = by_definition(teacher, tokens, OTHER, VOCABS[1], OPENING[1])
    weights = np.array([[1, 2, 1, 0, 0], [2, 1, 0, 0, 0]])
    a, b = t / 100 - 1e-6, np.where(weights, s, -1) / 100 - 1e-6
    f = -(np.exp(a) * b - np.expm1(a) * np.log(-np.expm1(b)))
    means = objective_of(batch, student, teacher)
    least = -(np.exp(a) * a - np.expm1(a) * np.log(-np.expm1(a)))
    excess = (weights * (f - least)).sum() / weights.sum()
    expected = 0.25 * means["loss/ce"].value + 0.75 * 100 * excess
    assert float(means["loss"].value) == pytest.approx(float(expected), rel=1e-4)
    rng = np.random.default_rng(9)
    way = jnp.asarray(rng.normal(size=student.head.shape), jnp.float32)

    def loss(step):
        moved = dataclasses.replace(student, head=student.head + step * way)
        return objective_of(batch, moved, teacher)["loss"].value

    slope = jax.grad(loss)(jnp.float32(0.0))
    finite = (loss(jnp.float32(1e-2)) - loss(jnp.float32(-1e-2))) / 2e-2
    assert float(slope) == pytest.approx(float(finite), rel=2e-3)
    # A constant: nothing of the teacher is trained.
    by_teacher = jax.grad(
        lambda head: (
            objective_of(batch, student, dataclasses.replace(teacher, head=head))["loss"].value
        )
    )(teacher.head)
    assert not np.asarray(by_teacher).any()


def test_a_student_that_is_the_teacher_has_nothing_to_learn(batch):
    """Equal tokenizers: chunks are single tokens, the divergence and its slope are 0."""
    one = outputs(3, VOCABS[0], L)
    groups = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    same = dataclasses.replace(
        batch, groups=groups, second={"tokens": batch.tokens, "groups": groups}
    )
    made = alm.objective(opening=(OPENING[0],) * 2, teacher_vocab=VOCABS[0], vocab=VOCABS[0])

    def loss(head):
        student = dataclasses.replace(one, head=head)
        knobs = {"alpha": jnp.float32(0.0)}
        means = made.apply({}, student, TeacherSignal(one), same, knobs)
        return means["loss"].value, means["loss/divergence"].value

    (_, divergence), slope = jax.value_and_grad(loss, has_aux=True)(one.head)
    assert abs(divergence) < 1e-7
    np.testing.assert_allclose(slope, 0.0, atol=1e-5)


def test_the_order_of_either_vocabulary_does_not_matter(batch):
    student, teacher = outputs(0, VOCABS[0], L), outputs(1, VOCABS[1], M)
    expected = objective_of(batch, student, teacher)["loss"].value
    orders = [np.random.default_rng(2).permutation(v) for v in VOCABS]
    new = [np.argsort(order) for order in orders]  # old id -> new id
    moved = dataclasses.replace(
        batch,
        tokens=jnp.asarray(new[0])[batch.tokens],
        targets=jnp.asarray(new[0])[batch.targets],
        second=batch.second | {"tokens": jnp.asarray(new[1])[batch.second["tokens"]]},
    )
    student = dataclasses.replace(student, head=student.head[orders[0]])
    teacher = dataclasses.replace(teacher, head=teacher.head[orders[1]])
    made = alm.objective(
        opening=tuple(
            tuple(sorted(n[list(o)].tolist())) for n, o in zip(new, OPENING, strict=True)
        ),
        teacher_vocab=VOCABS[1],
        vocab=VOCABS[0],
    )
    knobs = {"alpha": jnp.float32(0.25)}
    means = made.apply({}, student, TeacherSignal(teacher), moved, knobs)
    assert float(means["loss"].value) == pytest.approx(float(expected), rel=1e-5)
