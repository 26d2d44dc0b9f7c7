"""linear_divergence against float64 NumPy: value, every gradient, masks, meshes, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.kernels import linear_divergence, measure
from jaxdistill.kernels.linear_divergence.chunk import chunk_size

N, V, DS, DT = 40, 53, 16, 24


def make(seed=0, tokens=N, vocab=V, scale=1.0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape) * scale
    return {
        "hs": normal(tokens, DS),
        "ws": normal(vocab, DS),
        "ht": normal(tokens, DT),
        "wt": normal(vocab, DT),
        "bs": normal(vocab),
        "bt": normal(vocab),
        "y": rng.integers(0, vocab, tokens),
        "m": (rng.random(tokens) < 0.7) * rng.choice([1.0, 0.5], tokens),
    }


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def loss64(x, kind, alpha, temperature, scale_by_t2=True):
    """The definition, in float64, with [N, V] in full."""
    s, t = x["hs"] @ x["ws"].T + x["bs"], x["ht"] @ x["wt"].T + x["bt"]
    ce = -log_softmax(s)[np.arange(len(s)), x["y"]]
    lq, lp = log_softmax(s / temperature), log_softmax(t / temperature)
    p, q = np.exp(lp), np.exp(lq)
    divergence = {
        "forward_kl": lambda: (p * (lp - lq)).sum(1),
        "reverse_kl": lambda: (q * (lq - lp)).sum(1),
        "total_variation": lambda: 0.5 * np.abs(p - q).sum(1),
        "generalized_jsd": lambda: (
            0.3 * (p * (lp - np.log(0.3 * p + 0.7 * q))).sum(1)
            + 0.7 * (q * (lq - np.log(0.3 * p + 0.7 * q))).sum(1)
        ),
    }[kind]()
    if scale_by_t2:
        divergence = divergence * temperature**2
    per_token = alpha * ce + (1 - alpha) * divergence
    return (per_token * x["m"]).sum() / x["m"].sum()


def slope64(x, name, *options, step=1e-6):
    """Central differences of the definition along 12 random entries: (indices, values)."""
    rng = np.random.default_rng(1)
    places = [tuple(rng.integers(0, n) for n in x[name].shape) for _ in range(12)]
    values = []
    for place in places:
        ends = []
        for sign in (1, -1):
            moved = x | {name: x[name].copy()}
            moved[name][place] += sign * step
            ends.append(loss64(moved, *options))
        values.append((ends[0] - ends[1]) / (2 * step))
    return places, np.array(values)


PARAMETERS = {"generalized_jsd": (0.3,)}


def program(x, kind, scale_by_t2=True, dtype=jnp.float32, **options):
    """(alpha, temperature) -> value, means and slopes: compiled once for all of them."""
    a = {name: jnp.asarray(v, jnp.int32 if name == "y" else dtype) for name, v in x.items()}

    def loss(hs, ws, bs, alpha, temperature):
        return linear_divergence(
            hs, ws, a["ht"], a["wt"], labels=a["y"], mask=jnp.asarray(x["m"], jnp.float32),
            kind=kind, parameters=PARAMETERS.get(kind, ()), alpha=alpha, temperature=temperature,
            scale_by_t2=scale_by_t2, student_bias=bs, teacher_bias=a["bt"], **options,
        )  # fmt: skip

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))
    names = ("hs", "ws", "bs", "alpha", "temperature")

    def at(alpha, temperature):
        (value, means), slopes = run(a["hs"], a["ws"], a["bs"], float(alpha), float(temperature))
        return value, means, dict(zip(names, slopes, strict=True))

    return at


def ours(x, kind, alpha, temperature, scale_by_t2=True, dtype=jnp.float32, **options):
    return program(x, kind, scale_by_t2, dtype, **options)(alpha, temperature)


@functools.cache
def whole():
    """Of one chunk, for tests that compare with it."""
    return ours(make(), "forward_kl", 0.4, 2.0, chunk=N)


both = pytest.mark.parametrize("implementation", [None, "reference"])


@both
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "total_variation", "generalized_jsd"])
def test_value_and_gradients_equal_float64(kind, implementation):
    x = make()
    run = program(x, kind, chunk=16, implementation=implementation)
    for alpha, temperature in ((0.3, 2.0), (0.0, 0.7), (1.0, 1.0)):
        value, _, slopes = run(alpha, temperature)
        np.testing.assert_allclose(value, loss64(x, kind, alpha, temperature), rtol=2e-6)
        for name in ("hs", "ws", "bs"):
            places, expected = slope64(x, name, kind, alpha, temperature)
            got = np.array([slopes[name][place] for place in places])
            atol = 2e-6 * max(1, np.abs(slopes[name]).max())
            np.testing.assert_allclose(got, expected, atol=atol)
        for index, name in enumerate(("alpha", "temperature")):
            ends = []
            for sign in (1e-6, -1e-6):
                point = [alpha, temperature]
                point[index] += sign
                ends.append(loss64(x, kind, *point))
            expected = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(slopes[name], expected, rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize("taid_t", [None, 0.4])
def test_at_a_temperature_of_one_each_sum_is_made_once(taid_t, monkeypatch):
    """Known to be 1, it makes once what a traced 1 makes twice; all numbers stay what they are."""
    x, asked, right = make(), [], measure.measure
    monkeypatch.setattr(measure, "measure", lambda *a: asked.append(set(a[0])) or right(*a))
    arrays = [jnp.float32(x[name]) for name in ("hs", "ws", "ht", "wt")]

    def loss(hs, ws, ht, wt, temperature):
        return linear_divergence(
            hs, ws, ht, wt, labels=x["y"], alpha=0.3, temperature=temperature, taid_t=taid_t,
            chunk=16,
        )  # fmt: skip

    run = lambda *arrays: jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arrays)
    (want, means), slopes = run(*arrays, jnp.float32(1))
    twice = asked.pop()
    assert {"sum_s", "sum_s1"} < twice
    one = jax.jit(jax.value_and_grad(lambda *a: loss(*a, 1.0), argnums=(0, 1), has_aux=True))
    (value, same), found = one(*arrays)
    teacher = {"sum_t1", "self_t1", "gap_t1"} if taid_t else set()
    assert {name for name in asked.pop() if name.endswith("1")} == teacher
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert same.keys() == means.keys()
    for name, mean in means.items():
        np.testing.assert_allclose(same[name].value, mean.value, rtol=2e-6, err_msg=name)
    for slope, other in zip(found, slopes, strict=True):
        np.testing.assert_allclose(slope, other, atol=1e-6)


def test_t2_is_a_choice():
    x = make()
    value, _, slopes = ours(x, "forward_kl", 0.2, 3.0, scale_by_t2=False)
    np.testing.assert_allclose(value, loss64(x, "forward_kl", 0.2, 3.0, False), rtol=2e-6)
    ends = [loss64(x, "forward_kl", 0.2, 3.0 + sign, False) for sign in (1e-6, -1e-6)]
    np.testing.assert_allclose(slopes["temperature"], (ends[0] - ends[1]) / 2e-6, rtol=3e-5)


def test_direction_of_forward_kl_is_teacher_to_student():
    x = make()
    forward = ours(x, "forward_kl", 0.0, 1.0)[0]
    swapped = x | {"hs": x["ht"], "ws": x["wt"], "ht": x["hs"], "wt": x["ws"]}
    swapped |= {"bs": x["bt"], "bt": x["bs"]}
    np.testing.assert_allclose(forward, ours(swapped, "reverse_kl", 0.0, 1.0)[0], rtol=1e-5)
    assert abs(forward - ours(x, "reverse_kl", 0.0, 1.0)[0]) > 0.1


@pytest.mark.parametrize("chunk", [1, 7, 8, 64])
def test_chunks_change_nothing(chunk):
    x = make()
    value, means, slopes = ours(x, "forward_kl", 0.4, 2.0, chunk=chunk)
    one, whole_means, whole_slopes = whole()
    np.testing.assert_allclose(value, one, rtol=1e-6)
    for name in slopes:
        np.testing.assert_allclose(slopes[name], whole_slopes[name], atol=2e-6)
    for name in means:
        np.testing.assert_allclose(means[name].value, whole_means[name].value, rtol=2e-6)


@pytest.mark.floor
def test_a_mesh_changes_nothing(mesh8):
    x = make()
    value, means, slopes = ours(x, "reverse_kl", 0.4, 2.0, chunk=4, mesh=mesh8)
    whole, whole_means, whole_slopes = ours(x, "reverse_kl", 0.4, 2.0)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    for name in slopes:
        np.testing.assert_allclose(slopes[name], whole_slopes[name], atol=2e-6)
    for name in means:
        np.testing.assert_allclose(means[name].total, whole_means[name].total, rtol=2e-6)


def test_the_mean_is_the_sum_over_the_weights():
    x = make()
    total = ours(x, "forward_kl", 0.4, 2.0, reduction="sum")[0]
    np.testing.assert_allclose(total, loss64(x, "forward_kl", 0.4, 2.0) * x["m"].sum(), rtol=2e-6)


@both
def test_means_for_monitoring_equal_float64(implementation):
    x = make()
    _, means, _ = ours(x, "reverse_kl", 0.4, 2.0, chunk=8, implementation=implementation)
    s, t = x["hs"] @ x["ws"].T + x["bs"], x["ht"] @ x["wt"].T + x["bt"]
    lq, lp = log_softmax(s), log_softmax(t)
    p, q = np.exp(lp), np.exp(lq)
    lq2, lp2 = log_softmax(s / 2), log_softmax(t / 2)
    expected = {
        "loss/ce": -lq[np.arange(N), x["y"]],
        "loss/divergence": 4 * (np.exp(lq2) * (lq2 - lp2)).sum(1),
        "loss/kl_t1": (p * (lp - lq)).sum(1),
        "agree/top1": s.argmax(1) == t.argmax(1),
        "teacher/entropy": -(p * lp).sum(1),
        "student/entropy": -(q * lq).sum(1),
    }
    assert means.keys() == expected.keys()
    for name, per_token in expected.items():
        np.testing.assert_allclose(means[name].total, (per_token * x["m"]).sum(), rtol=1e-5)
        np.testing.assert_allclose(means[name].count, x["m"].sum(), rtol=1e-6)


@both
def test_a_token_of_weight_zero_may_hold_anything(implementation):
    x = make()
    spoiled = {name: value.copy() for name, value in x.items()}
    off = x["m"] == 0
    spoiled["hs"][off], spoiled["ht"][off] = np.nan, np.inf
    spoiled["y"][off] = -100
    value, means, slopes = ours(spoiled, "forward_kl", 0.4, 2.0, implementation=implementation)
    clean, _, clean_slopes = ours(x, "forward_kl", 0.4, 2.0, implementation=implementation)
    np.testing.assert_array_equal(value, clean)
    np.testing.assert_array_equal(slopes["ws"], clean_slopes["ws"])
    assert not slopes["hs"][off].any()
    assert all(np.isfinite(mean.total) for mean in means.values())


def test_nothing_counted_is_zero_and_finite():
    x = make() | {"m": np.zeros(N)}
    value, means, slopes = ours(x, "forward_kl", 0.4, 2.0)
    assert value == 0
    assert all(mean.value == 0 for mean in means.values())
    assert all(not np.asarray(slope).any() for slope in slopes.values())


def test_a_perfect_model_has_no_cross_entropy_and_the_teacher_itself_no_divergence():
    x = make()
    hidden = np.eye(V)[x["y"]] * 200.0
    value, means = linear_divergence(
        jnp.float32(hidden), jnp.eye(V), jnp.float32(hidden), jnp.eye(V), labels=x["y"], alpha=0.5
    )
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert means["agree/top1"].value == 1


def test_logits_of_300_stay_finite_and_exact():
    x = make(scale=1.0)
    x["hs"], x["ht"] = x["hs"] * 60, x["ht"] * 60
    value, _, slopes = ours(x, "forward_kl", 0.5, 2.0)
    np.testing.assert_allclose(value, loss64(x, "forward_kl", 0.5, 2.0), rtol=1e-5)
    assert all(np.isfinite(np.asarray(slope)).all() for slope in slopes.values())


def test_a_vocabulary_of_one():
    x = make(vocab=1)
    value, _, slopes = ours(x, "forward_kl", 0.5, 2.0)
    np.testing.assert_allclose(value, 0, atol=1e-7)
    np.testing.assert_allclose(slopes["hs"], 0, atol=1e-7)


@pytest.mark.floor
def test_bfloat16_keeps_float32_arithmetic():
    x = make(scale=0.5)
    value, _, slopes = ours(x, "forward_kl", 0.5, 2.0, dtype=jnp.bfloat16, logits_dtype=jnp.float32)
    rounded = {
        k: np.asarray(jnp.asarray(v, jnp.bfloat16), np.float64) if k not in ("y", "m") else v
        for k, v in x.items()
    }
    # The inputs are rounded once; products accumulate in float32, so the value is nearly exact.
    np.testing.assert_allclose(value, loss64(rounded, "forward_kl", 0.5, 2.0), rtol=1e-4)
    assert slopes["hs"].dtype == slopes["ws"].dtype == jnp.bfloat16


def test_cross_entropy_alone_needs_no_teacher():
    x = make()
    value, means = linear_divergence(
        jnp.float32(x["hs"]), jnp.float32(x["ws"]), labels=x["y"], mask=x["m"], alpha=1.0,
        student_bias=jnp.float32(x["bs"]),
    )  # fmt: skip
    np.testing.assert_allclose(value, loss64(x, "forward_kl", 1.0, 1.0), rtol=2e-6)
    assert "loss/divergence" not in means


def test_cross_entropy_alone_on_the_gpus_kernel_equals_float64(interpreted_gpu):
    """Statistics of labels alone: one model's, read once; with the metrics and the gradients."""
    x = make()

    def loss(hs, ws, bs):
        return linear_divergence(
            hs, ws, labels=x["y"], mask=jnp.float32(x["m"]), alpha=1.0, student_bias=bs
        )

    names = ("hs", "ws", "bs")
    arrays = [jnp.float32(x[name]) for name in names]
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (value, means), slopes = run(*arrays)
    np.testing.assert_allclose(value, loss64(x, "forward_kl", 1.0, 1.0), rtol=2e-6)
    log_q = log_softmax(x["hs"] @ x["ws"].T + x["bs"])
    entropy = (-(np.exp(log_q) * log_q).sum(1) * x["m"]).sum() / x["m"].sum()
    np.testing.assert_allclose(means["student/entropy"].value, entropy, rtol=2e-6)
    for name, slope in zip(names, slopes, strict=True):
        places, want = slope64(x, name, "forward_kl", 1.0, 1.0)
        got = [slope[place] for place in places]
        np.testing.assert_allclose(got, want, atol=2e-6, err_msg=name)


@pytest.mark.floor
def test_remat_scan_and_vmap_keep_the_gradient():
    x = {k: jnp.float32(v) for k, v in make().items() if k != "y"}

    def loss(hs):
        return linear_divergence(hs, x["ws"], x["ht"], x["wt"], temperature=2.0, chunk=8)[0]

    plain = jax.jit(jax.grad(loss))(x["hs"])
    rematted = jax.jit(jax.grad(jax.checkpoint(loss)))(x["hs"])
    scanned = jax.jit(
        jax.grad(lambda hs: jax.lax.scan(lambda c, _: (c + loss(hs), None), 0.0, None, length=3)[0])
    )(x["hs"])
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([x["hs"], x["hs"]]))
    summed = jax.jit(jax.grad(lambda hs: jax.vmap(loss)(hs).sum()))(jnp.stack([x["hs"]] * 2))
    np.testing.assert_allclose(rematted, plain, atol=1e-7)
    np.testing.assert_allclose(scanned, 3 * plain, atol=1e-6)
    np.testing.assert_allclose(mapped[1], plain, atol=1e-7)
    np.testing.assert_allclose(summed[1], plain, atol=1e-7)


@pytest.mark.floor
def test_no_buffer_of_tokens_times_vocabulary():
    tokens, vocab, chunk = 512, 2048, 32
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    loss = lambda hs, ws, ht, wt, y: linear_divergence(
        hs, ws, ht, wt, labels=y, alpha=0.5, temperature=2.0, chunk=chunk
    )[0]
    compiled = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        .lower(shape(tokens, DS), shape(vocab, DS), shape(tokens, DT), shape(vocab, DT),
               jax.ShapeDtypeStruct((tokens,), jnp.int32))
        .compile()
    )  # fmt: skip
    whole = tokens * vocab * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2
    assert f"[{tokens},{vocab}]" not in compiled.as_text()


def test_chunks_are_equal_and_within_the_budget():
    assert chunk_size(1024, 32_000, "cpu") * 32_000 * 4 <= 2**25 + 8 * 32_000 * 4
    assert chunk_size(8192, 128_256, "gpu") == 512
    assert chunk_size(8192, 128_256, "gpu", itemsize=2) == 1024
    for tokens, vocab in ((8192, 151_936), (4096, 151_936), (8192, 128_256), (1000, 2_000_000)):
        for itemsize in (2, 4):
            chunk = chunk_size(tokens, vocab, "gpu", itemsize)
            assert chunk % (128 if vocab < 10**6 else 64) == 0
            assert chunk * vocab * itemsize <= max(2**28, 64 * vocab * itemsize)
    # Of a vocabulary that 8 devices share, and of 64,129 float32 entries of two models on each.
    assert chunk_size(8192, 16_064, "gpu", 2) == 2048
    assert chunk_size(8192, 16_064, "gpu", 2, gathered=8 * 64_129) == 384
    assert chunk_size(100, 640, "gpu") == 128
    assert chunk_size(64, 640, "gpu") == chunk_size(3, 640, "gpu") == 64
    for tokens in (1, 5, 8, 100, 1000, 4096):
        chunk = chunk_size(tokens, 32_000, "cpu")
        assert 1 <= chunk <= tokens
        assert -(-tokens // chunk) * chunk - tokens < chunk


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "kl"}, "kind"),
        ({"reduction": "none"}, "reduction"),
        ({"labels": None, "alpha": 0.5}, "labels"),
        ({"teacher_head": None}, "go together"),
        ({"teacher_head": jnp.zeros((V + 1, DT))}, "vocabulary must agree"),
        ({"student_head": jnp.zeros((V, DS + 1))}, "student_head"),
        ({"student_bias": jnp.zeros(3)}, "student_bias"),
    ],
)
def test_bad_input_is_named(change, words):
    x = make()
    arguments = {
        "student_hidden": jnp.float32(x["hs"]),
        "student_head": jnp.float32(x["ws"]),
        "teacher_hidden": jnp.float32(x["ht"]),
        "teacher_head": jnp.float32(x["wt"]),
        "labels": x["y"],
    }
    with pytest.raises(ValueError, match=words):
        linear_divergence(**(arguments | change))
