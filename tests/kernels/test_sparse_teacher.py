"""linear_divergence with a teacher of whom some tokens are known, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.kernels import linear_divergence

N, V, D, K, T = 24, 53, 8, 5, 1.7
KINDS = ("forward_kl", "generalized_forward_kl", "generalized_reverse_kl", "cross_entropy")


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def make(seed=0, k=K):
    rng = np.random.default_rng(seed)
    log_p = log_softmax(2 * rng.normal(size=(N, V)) / T)
    ids = np.argsort(-log_p, axis=1)[:, :k]
    ids = np.concatenate([ids[:, ::2], ids[:, 1::2]], axis=1)  # in no order
    return {
        "hidden": rng.normal(size=(N, D)),
        "head": rng.normal(size=(V, D)),
        "bias": rng.normal(size=V),
        "log_p": log_p,
        "ids": ids,
        "logprobs": np.take_along_axis(log_p, ids, 1),
        "labels": rng.integers(0, V, N),
        "mask": (rng.random(N) < 0.7) * rng.choice([1.0, 0.5], N),
    }


def loss64(x, kind, temperature=T, alpha=0.3):
    """The definition, in float64, with [N, V] in full."""
    s = x["hidden"] @ x["head"].T + x["bias"]
    ce = -log_softmax(s)[np.arange(N), x["labels"]]
    log_q = log_softmax(s / temperature)
    lq, lp = np.take_along_axis(log_q, x["ids"], 1), x["logprobs"]
    q, p = np.exp(lq), np.exp(lp)
    others = np.ones((N, V), bool)
    np.put_along_axis(others, x["ids"], False, 1)
    rest_q, rest_p = (np.exp(log_q) * others).sum(1), 1 - p.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ghost = np.where(others.any(1), rest_p * np.log(rest_p / rest_q), 0.0)
    value = {
        "forward_kl": lambda: (p * (lp - lq)).sum(1) + ghost,
        "generalized_forward_kl": lambda: (p * (lp - lq) - p + q).sum(1),
        "generalized_reverse_kl": lambda: (q * (lq - lp) - q + p).sum(1),
        "cross_entropy": lambda: -(p * lq).sum(1),
    }[kind]()
    per_token = alpha * ce + (1 - alpha) * temperature**2 * value
    return (per_token * x["mask"]).sum() / x["mask"].sum()


def ours(x, kind, dtype=jnp.float32, shape=(N,), **options):
    """(loss, metrics, gradients by name)."""
    whole = lambda a: jnp.asarray(a).reshape(*shape, *np.shape(a)[1:])

    def loss(hidden, head, bias, temperature):
        return linear_divergence(
            whole(hidden), head, student_bias=bias, temperature=temperature, kind=kind, alpha=0.3,
            teacher_ids=whole(x["ids"]), teacher_logprobs=whole(np.float32(x["logprobs"])),
            labels=whole(x["labels"]), mask=whole(np.float32(x["mask"])), **options,
        )  # fmt: skip

    arrays = [jnp.asarray(x[n], dtype) for n in ("hidden", "head", "bias")]
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (value, means), slopes = run(*arrays, jnp.float32(T))
    names = ("hidden", "head", "bias", "temperature")
    return value, means, dict(zip(names, map(np.asarray, slopes), strict=True))


def compare(got, x, kind, tolerance=1e-5, rtol=2e-6):
    value, _, slopes = got
    np.testing.assert_allclose(value, loss64(x, kind), rtol=rtol)
    rng, step = np.random.default_rng(7), 1e-6
    for name in ("hidden", "head", "bias"):
        along = rng.normal(size=x[name].shape)
        ends = [loss64(x | {name: x[name] + e * along}, kind) for e in (step, -step)]
        slope = slopes[name].astype(np.float64) * along
        np.testing.assert_allclose(
            slope.sum(), (ends[0] - ends[1]) / (2 * step), atol=tolerance * max(1, abs(slope).sum())
        )
    ends = [loss64(x, kind, T + e) for e in (step, -step)]
    np.testing.assert_allclose(
        slopes["temperature"], (ends[0] - ends[1]) / 2e-6, rtol=1e-2 if tolerance > 1e-3 else 3e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_equal_float64(kind):
    x = make()
    spoiled = x | {name: x[name].copy() for name in ("hidden", "ids", "logprobs", "labels")}
    off = x["mask"] == 0
    spoiled["hidden"][off] = spoiled["logprobs"][off] = np.nan
    spoiled["ids"][off], spoiled["labels"][off] = 7, 0
    got = ours(spoiled, kind, chunk=7)
    compare(got, x, kind)
    assert not got[2]["hidden"][off].any()


@pytest.mark.floor
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_with_the_vocabulary_split_and_the_reference_equal_float64(mesh8, kind):
    x = make()
    got = ours(x, kind, chunk=2, mesh=mesh8, shape=(8, 3))
    compare(got, x, kind)
    plain = ours(x, kind, implementation="reference")
    compare(plain, x, kind)
    means = plain[1]
    assert got[1].keys() == means.keys()
    for name, mean in means.items():
        np.testing.assert_allclose(got[1][name].value, mean.value, rtol=2e-6, err_msg=name)


@pytest.mark.floor
def test_bfloat16_keeps_float32_arithmetic():
    x = make()
    names = ("hidden", "head", "bias")
    rounded = {n: np.asarray(jnp.asarray(x[n], jnp.bfloat16), np.float64) for n in names}
    got = ours(x, "forward_kl", dtype=jnp.bfloat16, logits_dtype=jnp.float32)
    compare(got, x | rounded, "forward_kl", tolerance=1e-2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "generalized_reverse_kl"])
def test_the_gpus_kernel_equals_float64(interpreted_gpu, kind):
    """The student's statistics come from the kernel: value, metrics, every gradient."""
    x = make()
    got = ours(x, kind)
    compare(got, x, kind)
    check_metrics(got[1], x)


def test_metrics_equal_numpy():
    x = make()
    check_metrics(ours(x, "forward_kl", chunk=7)[1], x)


def check_metrics(means, x):
    log_q = log_softmax(x["hidden"] @ x["head"].T + x["bias"])
    best = np.argsort(-log_q, axis=1)[:, :K]
    expected = {
        "teacher/kept_mass": np.exp(x["logprobs"]).sum(1),
        "student/kept_mass": np.exp(np.take_along_axis(log_q, x["ids"], 1)).sum(1),
        "agree/top_k": [len(set(a) & set(b)) / K for a, b in zip(best, x["ids"], strict=True)],
        "student/entropy": -(np.exp(log_q) * log_q).sum(1),
    }
    assert means.keys() == expected.keys() | {"loss/ce", "loss/divergence"}
    for name, per_token in expected.items():
        want = (np.asarray(per_token) * x["mask"]).sum() / x["mask"].sum()
        np.testing.assert_allclose(means[name].value, want, rtol=1e-5)


def test_metrics_can_be_left_out():
    x = make()
    given = {"teacher_ids": x["ids"], "teacher_logprobs": np.float32(x["logprobs"])}
    loss = lambda hidden, monitor: linear_divergence(
        hidden, jnp.float32(x["head"]), chunk=7, monitor=monitor, **given
    )
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    hidden = jnp.float32(x["hidden"])
    (on, means), slope = run(hidden, True)
    (off, none), same = run(hidden, False)
    np.testing.assert_array_equal(on, off)
    np.testing.assert_array_equal(slope, same)
    assert means["teacher/kept_mass"].count == N and none["teacher/kept_mass"].count == 0


@pytest.mark.parametrize(
    ("kind", "dense"),
    [
        ("forward_kl", "forward_kl"),
        ("generalized_reverse_kl", "reverse_kl"),
    ],
)
def test_a_teacher_of_whom_all_is_known_is_the_dense_one(kind, dense):
    x = make(k=V)
    value, _, slopes = ours(x, kind)

    def loss(hidden, head):
        return linear_divergence(
            hidden, head, jnp.float32(T * x["log_p"]), jnp.eye(V), kind=dense, alpha=0.3,
            temperature=T, student_bias=jnp.float32(x["bias"]), labels=x["labels"],
            mask=jnp.float32(x["mask"]),
        )[0]  # fmt: skip

    arrays = jnp.float32(x["hidden"]), jnp.float32(x["head"])
    want, by = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*arrays)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for name, slope in zip(("hidden", "head"), by, strict=True):
        np.testing.assert_allclose(slopes[name], slope, atol=1e-6)


def known(x, k, kind, **more):
    order = np.argsort(-x["log_p"], axis=1)[:, :k]
    logprobs = np.float32(np.take_along_axis(x["log_p"], order, 1))
    given = {"teacher_ids": order, "teacher_logprobs": logprobs} | more
    hidden, head = jnp.float32(x["hidden"]), jnp.float32(x["head"])
    return linear_divergence(hidden, head, kind=kind, scale_by_t2=False, temperature=T, **given)[0]


def test_the_ghost_grows_to_the_whole_and_the_generalised_stays_below():
    x = make()
    run = lambda k, kind: float(jax.jit(lambda: known(x, k, kind))())
    ghosts = [run(k, "forward_kl") for k in (1, 9, V - 1, V)]
    generalised = [run(k, "generalized_forward_kl") for k in (1, 9, V)]
    assert all(a <= b + 1e-6 for a, b in zip(ghosts, ghosts[1:], strict=False))
    assert all(0 <= g <= e + 1e-6 for g, e in zip(generalised, ghosts, strict=False))
    np.testing.assert_allclose(ghosts[-2:], generalised[-1], rtol=2e-6)


# z = (1, .5, 0, -1) and z_T = (.2, 1.2, -.5, .3); tokens 0, 1 lead with the student, 1, 3 with the
# teacher. Values and gradients by the logits, from a float64 program of somebody else.
ORACLE = [
    ("generalized_reverse_kl", [0, 1], 0.210508, (0.308968, -0.243836, -0.047615, -0.017517)),
    ("generalized_reverse_kl", [1, 3], 0.126341, (0.114095, -0.096130, 0.041973, -0.059938)),
    ("generalized_forward_kl", [1, 3], 0.170900, (0.173979, -0.117938, 0.064003, -0.120044)),
    ("forward_kl", [1, 3], 0.303059, None),
]
STUDENT, TEACHER = np.array([1, 0.5, 0, -1]), np.array([0.2, 1.2, -0.5, 0.3])


def of_four(ids, kind, logits=STUDENT, **more):
    log_p = np.float32(log_softmax(TEACHER[None])[0])
    given = {"teacher_ids": jnp.array([ids]), "teacher_logprobs": jnp.array([log_p[list(ids)]])}
    loss = lambda hidden: linear_divergence(hidden, jnp.eye(4), kind=kind, **given, **more)[0]
    value, slope = jax.jit(jax.value_and_grad(loss))(jnp.float32(logits)[None])
    return float(value), np.asarray(slope)[0]


@pytest.mark.parametrize(("kind", "ids", "value", "slope"), ORACLE)
def test_oracle_values(kind, ids, value, slope):
    got, by_logits = of_four(ids, kind)
    np.testing.assert_allclose(got, value, atol=1e-6)
    if slope:
        np.testing.assert_allclose(by_logits, slope, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [
        ("forward_kl", 0.305765, (0.286022, -0.223462, 0.081029, -0.143590)),
        ("reverse_kl", 0.306657, (0.293048, -0.253492, 0.055495, -0.095050)),
    ],
)
def test_oracle_values_of_whole_rows(kind, value, slope):
    teacher = jnp.float32(TEACHER)[None], jnp.eye(4)
    loss = lambda hidden: linear_divergence(hidden, jnp.eye(4), *teacher, kind=kind)[0]
    got, by_logits = jax.jit(jax.value_and_grad(loss))(jnp.float32(STUDENT)[None])
    np.testing.assert_allclose(got, value, atol=1e-6)
    np.testing.assert_allclose(by_logits[0], slope, atol=1e-6)


def test_the_sampled_tail_makes_the_set_exact_in_expectation():
    """All tokens are drawn, each weighed by its probability."""
    q, log_p = np.exp(log_softmax(STUDENT[None])[0]), np.float32(log_softmax(TEACHER[None])[0])
    value, slope = 0.0, np.zeros(4)
    for drawn in range(4):
        more = {
            "sampled_ids": jnp.array([drawn]),
            "sampled_logprobs": jnp.array([log_p[drawn]]),
        }
        of_one = of_four([0, 1], "generalized_reverse_kl", **more)
        value, slope = value + q[drawn] * of_one[0], slope + q[drawn] * of_one[1]
    np.testing.assert_allclose(value, 0.306657, atol=1e-6)  # KL(q || p)
    np.testing.assert_allclose(slope, (0.293048, -0.253492, 0.055495, -0.095050), atol=1e-6)


def test_equal_models_are_exactly_zero_and_none_below():
    log_q = np.float32(log_softmax(STUDENT[None]))
    for kind in ("generalized_forward_kl", "generalized_reverse_kl"):
        run = jax.jit(
            lambda logprobs, kind=kind: linear_divergence(
                jnp.float32(STUDENT)[None], jnp.eye(4), kind=kind, teacher_logprobs=logprobs,
                teacher_ids=jnp.arange(4)[None],
            )[0]
        )  # fmt: skip
        for shift in (0.0, 1e-6, 1e-4):
            assert run(log_q - np.float32(shift)) >= 0, (kind, shift)


@pytest.mark.floor
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_a_kl_of_nearly_equal_models_is_not_below_zero(implementation):
    rng = np.random.default_rng(5)
    t = jnp.asarray(3 * rng.normal(size=(64, 200)), jnp.float32)
    s = t + 1e-4 * jnp.asarray(rng.normal(size=t.shape), jnp.float32)
    logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(t), 50)

    def values(s):
        one = lambda s, ids, logprobs: linear_divergence(
            s[None], jnp.eye(200), teacher_ids=ids[None], teacher_logprobs=logprobs[None],
            implementation=implementation,
        )[0]  # fmt: skip
        return jax.vmap(one)(s, ids, logprobs)

    value, plain = jax.jit(values)(s), losses.topk_kl(s, ids, logprobs)
    assert (value >= 0).all() and (value == 0).any() and (plain >= 0).all()
    slope = jax.jit(jax.grad(lambda s: values(s).sum()))(s)
    assert slope[np.asarray(value == 0)].any(axis=1).all()
    slope = jax.grad(lambda s: losses.topk_kl(s, ids, logprobs).sum())(s)
    assert slope[np.asarray(plain == 0)].any(axis=1).all()


def test_traced_numbers_that_break_the_rules():
    x = make()
    run = jax.jit(
        lambda ids, logprobs: known(x, K, "forward_kl", teacher_ids=ids, teacher_logprobs=logprobs)
    )
    ids, logprobs = jnp.asarray(x["ids"]), jnp.float32(x["logprobs"])
    plain = run(ids, logprobs)
    again = jnp.concatenate([ids, ids[:, :1]], 1), jnp.concatenate([logprobs, logprobs[:, 1:2]], 1)
    np.testing.assert_allclose(run(*again), plain, rtol=1e-6)  # an id counts once
    none = jnp.full((N, 1), -1), jnp.full((N, 1), jnp.nan)
    padded = [jnp.concatenate(pair, 1) for pair in zip((ids, logprobs), none, strict=True)]
    np.testing.assert_allclose(run(*padded), plain, rtol=1e-6)
    assert np.isnan(run(ids.at[0, 0].set(V), logprobs))


@pytest.mark.floor
def test_no_buffer_of_tokens_times_vocabulary():
    tokens, vocab, chunk = 512, 2048, 32
    shape = jax.ShapeDtypeStruct
    loss = lambda hidden, head, ids, logprobs: linear_divergence(
        hidden, head, teacher_ids=ids, teacher_logprobs=logprobs, chunk=chunk
    )[0]
    compiled = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        .lower(shape((tokens, 16), jnp.float32), shape((vocab, 16), jnp.float32),
               shape((tokens, 8), jnp.int32), shape((tokens, 8), jnp.float32))
        .compile()
    )  # fmt: skip
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 2
    assert f"[{tokens},{vocab}]" not in compiled.as_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "total_variation"}, "must be one of forward_kl, generalized_forward_kl"),
        ({"teacher_ids": [[0, V]]}, "53 is no token"),
        ({"teacher_ids": [[2, 2]]}, "2 stands twice"),
        ({"teacher_ids": [[0.0, 1.0]]}, "must be integers"),
        ({"teacher_ids": [[0, 1, 2]]}, "one shape"),
        ({"teacher_ids": [0]}, "teacher_ids"),
        ({"teacher_logprobs": None}, "go together"),
        ({"teacher_logprobs": [[0.2, -1.0]]}, "log-probabilities, not logits"),
        ({"teacher_logprobs": [[-0.1, -0.1]]}, "sum to 1.81"),
        ({"teacher_logprobs": [[-0.1, np.nan]]}, "largest is nan"),
        ({"teacher_rest": [-1.2]}, "not its log"),
        ({"teacher_rest": [[0.1]]}, "teacher_rest"),
        ({"teacher_rest": [0.7]}, "known tokens' probabilities it makes 1.203 of a row, above 1"),
        ({"sampled_ids": [1]}, "sampled_ids and sampled_logprobs"),
        ({"sampled_ids": [1], "sampled_logprobs": [-1.0]}, "only generalized_reverse_kl"),
        ({"teacher_hidden": np.ones((1, 2)), "teacher_head": np.ones((V, 2))}, "in place of"),
        ({"taid_t": 0.5}, "taid_t"),
    ],
)
def test_bad_input_is_named(change, words):
    given = {"teacher_ids": [[0, 1]], "teacher_logprobs": [[-1.0, -2.0]]} | change
    given = {n: np.asarray(a) if isinstance(a, list) else a for n, a in given.items()}
    with pytest.raises(ValueError, match=words):
        linear_divergence(jnp.ones((1, D)), jnp.ones((V, D)), **given)


def test_what_the_mask_leaves_out_may_break_every_rule():
    ids, logprobs = np.array([[0, 1], [99, 99]]), np.array([[-1.0, -2.0], [3.0, np.nan]])
    value, _ = linear_divergence(
        jnp.ones((2, D)), jnp.ones((V, D)), teacher_ids=ids, teacher_logprobs=logprobs,
        mask=np.array([True, False]),
    )  # fmt: skip
    assert np.isfinite(value)
