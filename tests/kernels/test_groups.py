"""Groups of rows, as a CPU takes them, give what all rows at once give, and need little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.kernels import divergence, groups, linear_divergence
from jaxdistill.kernels.linear_divergence import chunk as chunks

N, V, D = 24, 53, 16
KNOWN = np.stack([np.random.default_rng(row).permutation(V)[:5] for row in range(N)])
SHARED = np.arange(3, 40)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


LABELS = jnp.asarray(np.random.default_rng(9).integers(0, V, N))
MASK = jnp.asarray(np.random.default_rng(8).random(N) < 0.7, jnp.float32)
TEACHER = {"teacher_hidden": normal(N, D, seed=2), "teacher_head": normal(V, D, seed=3)}


def gap(s, t, labels):
    """A divergence of the caller's own, whose slope reads whole rows."""
    return jnp.sum((s - t) ** 2 * jax.nn.softmax(t), axis=1)


@pytest.fixture
def of_four(monkeypatch):
    """Groups of four rows."""

    def shrink(rows):
        monkeypatch.setattr(groups, "_BYTES_CPU", 4 * 4 * V)
        assert groups.group_size(rows, V, "cpu") == 4

    return shrink


def test_the_group_is_a_divisor_near_the_caches_share():
    fitting = 2**19 // (4 * 32_000)
    assert groups.group_size(256, 32_000, "cpu") == fitting == 4
    assert groups.group_size(6, 32_000, "cpu") == 3
    assert groups.group_size(254, 32_000, "cpu") == 2
    assert groups.group_size(251, 32_000, "cpu") == 251  # a prime: not one row after another
    assert groups.group_size(16, 10**7, "cpu") == 1
    assert groups.group_size(256, 32_000, "gpu") == 256
    assert groups.group_size(0, 32_000, "cpu") == 0


@pytest.mark.parametrize("group", [2, 6])
def test_groups_come_back_in_the_order_of_their_rows(group):
    x, y = normal(6, 5), normal(6, seed=1)
    found = groups.in_groups(lambda rows: {"sum": rows[0].sum(1) * rows[1]}, group, (x, y))
    np.testing.assert_allclose(found["sum"], np.asarray(x).sum(1) * np.asarray(y), rtol=1e-6)
    written, sums = groups.in_place(lambda x, y: (x * y[:, None], x.sum(1)), group, x, y)
    np.testing.assert_allclose(written, np.asarray(x) * np.asarray(y)[:, None], rtol=1e-6)
    np.testing.assert_allclose(sums, np.asarray(x).sum(1), rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        TEACHER,
        TEACHER | {"logits_dtype": "bfloat16"},
        TEACHER | {"student_softcap": 3.0, "teacher_softcap": 4.0},
        TEACHER | {"kind": "generalized_jsd", "parameters": (0.3,), "label_smoothing": 0.1},
        TEACHER | {"taid_t": 0.4},
        TEACHER | {"kind": gap},
        TEACHER | {"kind": gap, "logits_dtype": "bfloat16"},
        {"teacher_ids": KNOWN, "teacher_logprobs": np.full((N, 5), np.log(0.1), np.float32)},
        TEACHER | {"student_columns": SHARED, "teacher_columns": SHARED, "other_columns": "bucket"},
    ],
    ids=["kl", "narrow", "capped", "jsd", "taid", "own", "own-narrow", "known", "columns"],
)
@pytest.mark.parametrize("per_token", [False, True])
def test_groups_of_a_chunk_give_what_the_whole_chunk_gives(of_four, options, per_token):
    temperature = jnp.linspace(0.8, 2.5, N) if per_token else jnp.float32(1.7)

    def run():
        def loss(hidden, head, temperature):
            return linear_divergence(
                hidden, head, labels=LABELS, mask=MASK, alpha=0.3, temperature=temperature,
                chunk=12, **options,
            )  # fmt: skip

        slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        return slopes(normal(N, D), normal(V, D, seed=1), temperature)

    whole = run()
    of_four(12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-6, 2e-6), run(), whole)
    assert np.abs(whole[1][1]).max() > 0.01


@pytest.mark.parametrize("grouped", [False, True])
def test_a_whole_chunk_is_read_in_the_dtype_it_came_in(of_four, monkeypatch, grouped):
    seen, rows = set(), chunks._rows
    spy = lambda static, x, shards, of: (
        seen.add(of.student.dtype.name),
        rows(static, x, shards, of),
    )
    monkeypatch.setattr(chunks, "_rows", lambda *given: spy(*given)[1])
    if grouped:
        of_four(12)
    loss = lambda hidden, head: linear_divergence(
        hidden, head, **TEACHER, kind=gap, logits_dtype="bfloat16", chunk=12
    )[0]
    jax.jit(jax.grad(loss)).lower(normal(N, D), normal(V, D, seed=1))
    assert ("float32" in seen) == grouped
    assert "bfloat16" in seen


@pytest.mark.parametrize("per_row", [False, True])
def test_groups_of_logits_give_what_all_rows_give(of_four, per_row):
    student, teacher = normal(3, 8, V) * 3, normal(3, 8, V, seed=1) * 3
    labels, weights = LABELS.reshape(3, 8), normal(3, 8, seed=5)
    temperature = jnp.linspace(0.8, 2.5, N).reshape(3, 8) if per_row else jnp.float32(1.7)

    def run():
        def total(student, temperature, alpha):
            values = divergence(
                student, teacher, labels=labels, kind="generalized_jsd", parameters=(0.3,),
                temperature=temperature, alpha=alpha,
            )  # fmt: skip
            return jnp.sum(values * weights), values

        slopes = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
        return slopes(student, temperature, 0.3)

    whole = run()
    of_four(24)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-6, 2e-6), run(), whole)


def test_groups_on_a_mesh_that_shares_the_vocabulary(mesh8, monkeypatch):
    student, teacher = normal(24, 64) * 3, normal(24, 64, seed=1) * 3

    def run(mesh):
        total = lambda student, temperature: jnp.sum(
            divergence(student, teacher, labels=LABELS, temperature=temperature, mesh=mesh)
        )
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(student, 1.7)

    whole = run(None)
    monkeypatch.setattr(groups, "_BYTES_CPU", 3 * 4 * 32)
    assert mesh8.shape["tensor"] == 2
    assert groups.group_size(6, 32, "cpu") == 3  # of the rows and columns of one device
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-6, 2e-6), run(mesh8), whole)


@pytest.mark.floor
@pytest.mark.parametrize("kind", ["forward_kl", gap], ids=["kl", "own"])
def test_slopes_take_the_place_of_a_chunks_logits(kind):
    tokens, vocab, chunk = 256, 16_384, 64
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    loss = lambda hs, ws, ht, wt: linear_divergence(hs, ws, ht, wt, kind=kind, chunk=chunk)[0]
    shapes = shape(tokens, 8), shape(vocab, 8), shape(tokens, 8), shape(vocab, 8)
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert groups.group_size(chunk, vocab, "cpu") < chunk
    logits = chunk * vocab * 4
    assert 2 * logits < compiled.memory_analysis().temp_size_in_bytes < 2.6 * logits


@pytest.mark.floor
@pytest.mark.parametrize("kind", ["forward_kl", "total_variation"])
def test_a_divergence_of_logits_makes_no_second_array_of_their_size(kind):
    shape = jax.ShapeDtypeStruct((1024, 16_384), jnp.float32)

    def loss(student, teacher, temperature):
        return jnp.mean(divergence(student, teacher, kind=kind, temperature=temperature))

    slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
    compiled = slopes.lower(shape, shape, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < shape.size * 4 / 4
