"""ULD and GOLD at the ends of chunks: float64 NumPy, the KL of one vocabulary, orders, slopes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.methods import gold, kd, uld
from jaxdistill.types import TeacherSignal
from tests.methods.test_chunks import GROUPS, OTHER, VOCABS, B, L, M, batch, outputs

__all__ = ["batch"]  # a fixture
MATCHED = (1, 4, 5, 9), (12, 0, 3, 7)
KNOBS = {"alpha": jnp.float32(0.25)}


def last_rows(said, tokens, groups, vocab):
    """float64 {(row, chunk): probabilities of its last token, its earlier ones multiplied in}."""
    logits = np.asarray(said.hidden, np.float64) @ np.asarray(said.head, np.float64)[:vocab].T
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = {}
    for b, row in enumerate(groups):
        for chunk in set(row) - {0}:
            *earlier, last = np.flatnonzero(np.asarray(row) == chunk)
            scale = np.prod([q[b, i - 1, tokens[b, i]] for i in earlier])
            found[b, chunk] = scale * q[b, last - 1]
    return found


def by_rank(q, p):
    width = max(len(q), len(p))
    falling = lambda x: np.pad(-np.sort(-x), (0, width - len(x)))
    return np.abs(falling(q) - falling(p)).sum()


def jsd(q, p, beta):
    apart = lambda a, b: (a * np.log(a / b) - a + b).sum()
    m = beta * p + (1 - beta) * q
    return {0.0: apart(p, q), 1.0: apart(q, p)}.get(
        beta, beta * apart(p, m) + (1 - beta) * apart(q, m)
    )


def hybrid(q, p, beta, weight):
    rest = [np.setdiff1d(np.arange(len(x)), ids) for x, ids in zip((q, p), MATCHED, strict=True)]
    matched = jsd(q[list(MATCHED[0])], p[list(MATCHED[1])], beta)
    return weight * matched + (1 - weight) * by_rank(q[rest[0]], p[rest[1]])


MADE = {
    "uld": (lambda **o: uld.objective(**o), by_rank),
    "gold": (
        lambda **o: gold.objective(matched=MATCHED, **o),
        lambda q, p: hybrid(q, p, 0.5, 4 / VOCABS[1]),
    ),
    "gold forward": (
        lambda **o: gold.objective(matched=MATCHED, beta=0.0, matched_weight=0.7, **o),
        lambda q, p: hybrid(q, p, 0.0, 0.7),
    ),
    "gold reverse": (
        lambda **o: gold.objective(matched=MATCHED, beta=1.0, matched_weight=0.7, **o),
        lambda q, p: hybrid(q, p, 1.0, 0.7),
    ),
}


@pytest.fixture(scope="module")
def pair():
    return outputs(0, VOCABS[0], L, rows=2), outputs(1, VOCABS[1], M, rows=1)


@pytest.mark.parametrize("chunk", [None, 2, 6])
@pytest.mark.parametrize("name", MADE)
def test_the_mean_over_chunks_is_that_of_the_definition(name, chunk, batch, pair):
    make, definition = MADE[name]
    made = make(vocab=VOCABS[0], teacher_vocab=VOCABS[1], chunk=chunk)
    means = made.apply({}, pair[0], TeacherSignal(pair[1]), batch, KNOBS)
    ours = last_rows(pair[0], np.asarray(batch.tokens), GROUPS, VOCABS[0])
    theirs = last_rows(pair[1], np.asarray(batch.second["tokens"]), OTHER, VOCABS[1])
    assert ours.keys() == theirs.keys() and len(ours) == 5
    expected = np.mean([definition(ours[key], theirs[key]) for key in ours])
    assert float(means["loss/divergence"].value) == pytest.approx(expected, rel=1e-5)
    whole = 0.25 * float(means["loss/ce"].value) + 0.75 * expected
    assert float(means["loss"].value) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", ["uld", "gold"])
def test_the_slope_by_finite_differences(name, batch, pair):
    made = MADE[name][0](vocab=VOCABS[0], teacher_vocab=VOCABS[1])
    student, teacher = pair
    way = jnp.asarray(np.random.default_rng(4).normal(size=student.hidden.shape), jnp.float32)

    def loss(step):
        moved = dataclasses.replace(student, hidden=student.hidden + step * way)
        means = made.apply({}, moved, TeacherSignal(teacher), batch, {"alpha": jnp.float32(0.0)})
        return means["loss"].value

    slope = float(jax.jit(jax.grad(loss))(0.0))
    values = jax.jit(loss)
    finite = float(values(2e-3) - values(-2e-3)) / 4e-3
    assert slope == pytest.approx(finite, rel=2e-2) and abs(slope) > 1e-3


def test_with_one_vocabulary_gold_is_its_kl_in_value_and_slope(batch):
    student, teacher = outputs(0, VOCABS[0], L), outputs(7, VOCABS[0], L)
    groups = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    view = {"tokens": batch.tokens, "groups": groups}
    same = dataclasses.replace(batch, groups=groups, second=view)
    ids = range(VOCABS[0])
    options = {"vocab": VOCABS[0]}
    hybrid = gold.objective(matched=(ids, ids), teacher_vocab=VOCABS[0], beta=0.0, **options)
    knobs = KNOBS | {"temperature": jnp.float32(1.0)}

    def loss(head, made):
        student_now = dataclasses.replace(student, head=head)
        return made.apply({}, student_now, TeacherSignal(teacher), same, knobs)["loss"].value

    value, slope = jax.value_and_grad(loss)(student.head, hybrid)
    expected, their_slope = jax.value_and_grad(loss)(student.head, kd.objective(**options))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(slope, their_slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["uld", "gold"])
def test_the_order_of_either_vocabulary_does_not_matter(name, batch, pair):
    orders = [np.random.default_rng(2).permutation(v) for v in VOCABS]
    new = [np.argsort(order) for order in orders]
    moved = dataclasses.replace(
        batch,
        tokens=jnp.asarray(new[0])[batch.tokens],
        targets=jnp.asarray(new[0])[batch.targets],
        second=batch.second | {"tokens": jnp.asarray(new[1])[batch.second["tokens"]]},
    )
    sides = [
        dataclasses.replace(side, head=side.head[order])
        for side, order in zip(pair, orders, strict=True)
    ]
    sizes = {"vocab": VOCABS[0], "teacher_vocab": VOCABS[1]}
    matched = tuple(tuple(n[list(ids)].tolist()) for n, ids in zip(new, MATCHED, strict=True))
    make = {"uld": uld.objective, "gold": lambda **o: gold.objective(matched=matched, **o)}[name]
    value = make(**sizes).apply({}, sides[0], TeacherSignal(sides[1]), moved, KNOBS)["loss"].value
    made = MADE[name][0](**sizes)
    expected = made.apply({}, pair[0], TeacherSignal(pair[1]), batch, KNOBS)["loss"].value
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
