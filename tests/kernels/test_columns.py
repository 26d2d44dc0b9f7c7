"""Heads that agree only on listed columns, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.kernels import linear_divergence
from jaxdistill.kernels.linear_divergence import arguments

N, VS, VT, D, T = 24, 23, 31, 6, 1.7
STUDENT = np.array([0, 2, 3, 7, 11, 12, 20, 22])
TEACHER = np.array([5, 0, 30, 8, 9, 1, 17, 2])


def make():
    rng = np.random.default_rng(2)
    return {
        "hidden": rng.normal(size=(N, D)),
        "head": rng.normal(size=(VS, D)),
        "bias": rng.normal(size=VS),
        "taught": rng.normal(size=(N, D)),
        "teacher": rng.normal(size=(VT, D)),
        "labels": rng.integers(0, VS, N),
        "mask": (rng.random(N) < 0.7).astype(float),
    }


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def loss64(x, kind, others, temperature=T, alpha=0.3):
    s, t = x["hidden"] @ x["head"].T + x["bias"], x["taught"] @ x["teacher"].T
    ce = -log_softmax(s)[np.arange(N), x["labels"]]

    def shared(z, columns):
        z = log_softmax(z / temperature)
        if others == "mask":
            return log_softmax(z[:, columns])
        rest = 1 - np.exp(z[:, columns]).sum(1, keepdims=True)
        return np.concatenate([z[:, columns], np.log(rest)], axis=1)

    lq, lp = shared(s, STUDENT), shared(t, TEACHER)
    divergence = {
        "forward_kl": (np.exp(lp) * (lp - lq)).sum(1),
        "total_variation": 0.5 * np.abs(np.exp(lp) - np.exp(lq)).sum(1),
    }[kind]
    per_token = alpha * ce + (1 - alpha) * temperature**2 * divergence
    return (per_token * x["mask"]).sum() / x["mask"].sum()


LISTS = {"student": STUDENT, "teacher": TEACHER}


def ours(x, kind, others, shape=(N,), dtype=jnp.float32, lists=LISTS, **options):
    whole = lambda a: jnp.asarray(a).reshape(*shape, *np.shape(a)[1:])

    def loss(hidden, head, bias, temperature):
        return linear_divergence(
            whole(hidden), head, whole(jnp.asarray(x["taught"], dtype)),
            jnp.asarray(x["teacher"], dtype),
            kind=kind, other_columns=others,
            student_columns=lists["student"], teacher_columns=lists["teacher"],
            labels=whole(x["labels"]), mask=whole(np.float32(x["mask"])), alpha=0.3,
            temperature=temperature, student_bias=bias, **options,
        )  # fmt: skip

    names = ("hidden", "head", "bias")
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (value, means), slopes = run(*(jnp.asarray(x[n], dtype) for n in names), jnp.float32(T))
    return value, means, dict(zip((*names, "temperature"), map(np.asarray, slopes), strict=True))


def compare(got, x, kind, others, tolerance=1e-5):
    value, _, slopes = got
    np.testing.assert_allclose(value, loss64(x, kind, others), rtol=2e-6)
    rng, step = np.random.default_rng(7), 1e-6
    for name in ("hidden", "head", "bias"):
        along = rng.normal(size=x[name].shape)
        ends = [loss64(x | {name: x[name] + e * along}, kind, others) for e in (step, -step)]
        slope = slopes[name].astype(np.float64) * along
        atol = tolerance * max(1, abs(slope).sum())
        np.testing.assert_allclose(slope.sum(), (ends[0] - ends[1]) / (2 * step), atol=atol)
    ends = [loss64(x, kind, others, T + e) for e in (step, -step)]
    np.testing.assert_allclose(
        slopes["temperature"], (ends[0] - ends[1]) / 2e-6, rtol=5 * tolerance
    )


@pytest.mark.parametrize(
    ("kind", "others"), [("forward_kl", "bucket"), ("total_variation", "mask")]
)
def test_value_and_gradients_equal_float64(kind, others):
    x = make()
    spoiled = x | {name: x[name].copy() for name in ("hidden", "taught")}
    spoiled["hidden"][x["mask"] == 0] = spoiled["taught"][x["mask"] == 0] = np.nan
    got = ours(spoiled, kind, others, chunk=7)
    compare(got, x, kind, others)
    assert not got[2]["hidden"][x["mask"] == 0].any()


@pytest.mark.parametrize(("others", "dtype"), [("bucket", "float32"), ("mask", "bfloat16")])
def test_the_gpus_kernel_equals_float64(interpreted_gpu, others, dtype):
    """Whose statistics are of one model at a time: widths of 23 and 31 in tiles of 64."""
    x, names = make(), ("hidden", "head", "bias", "taught", "teacher")
    rounded = {n: np.asarray(jnp.asarray(x[n], dtype), np.float64) for n in names}
    got = ours(x, "forward_kl", others, dtype=dtype, logits_dtype=jnp.float32)
    compare(got, x | rounded, "forward_kl", others, 1e-5 if dtype == "float32" else 1e-2)
    log_q = log_softmax(rounded["hidden"] @ rounded["head"].T + rounded["bias"])
    entropy = -(np.exp(log_q) * log_q).sum(1)
    want = (entropy * x["mask"]).sum() / x["mask"].sum()
    np.testing.assert_allclose(got[1]["student/entropy"].value, want, rtol=1e-5)


@pytest.mark.floor
def test_bfloat16_keeps_float32_arithmetic():
    x, names = make(), ("hidden", "head", "bias", "taught", "teacher")
    rounded = {n: np.asarray(jnp.asarray(x[n], jnp.bfloat16), np.float64) for n in names}
    got = ours(x, "forward_kl", "mask", dtype=jnp.bfloat16, logits_dtype=jnp.float32)
    compare(got, x | rounded, "forward_kl", "mask", tolerance=1e-2)


@pytest.mark.floor
def test_a_mesh_with_the_vocabulary_split_and_the_reference_equal_float64(mesh8):
    x = make()
    got = ours(x, "forward_kl", "bucket", chunk=2, mesh=mesh8, shape=(8, 3))
    compare(got, x, "forward_kl", "bucket")
    plain = ours(x, "forward_kl", "bucket", implementation="reference")
    compare(plain, x, "forward_kl", "bucket")
    assert got[1].keys() == plain[1].keys()
    for name, mean in plain[1].items():
        np.testing.assert_allclose(got[1][name].value, mean.value, rtol=5e-6, err_msg=name)


@pytest.mark.floor
@pytest.mark.parametrize("others", ["mask", "bucket"])
def test_nearly_all_columns_on_a_mesh_are_what_one_device_finds(mesh8, others):
    """22 of 23 rows, no multiple of the four devices that share them; and the slope by T."""
    rng, x = np.random.default_rng(1), make()
    lists = {"student": np.arange(1, VS), "teacher": rng.permutation(VT)[: VS - 1]}
    many = ours(x, "forward_kl", others, lists=lists, chunk=2, mesh=mesh8, shape=(8, 3))
    one = ours(x, "forward_kl", others, lists=lists, implementation="reference")
    np.testing.assert_allclose(many[0], one[0], rtol=2e-6)
    for name, slope in one[2].items():
        np.testing.assert_allclose(many[2][name], slope, atol=2e-6, rtol=2e-5, err_msg=name)


def near(gap, others, T, tokens=64, vocab=500):
    """Of teachers that are a student and a little more: our D and dD/dT, and float64's."""
    rng = np.random.default_rng(0)
    s = 3 * rng.normal(size=(tokens, vocab))
    t = s + gap * rng.normal(size=(tokens, vocab))
    shared, eye = np.arange(0, vocab - 7, 2), jnp.eye(vocab)

    def value(T, **options):
        return linear_divergence(
            jnp.float32(s), eye, jnp.float32(t), eye, student_columns=shared, temperature=T,
            teacher_columns=shared, other_columns=others, **options,
        )[0]  # fmt: skip

    def value64(T):
        def seen(z):
            log = log_softmax(z / T)
            if others == "mask":
                return log_softmax(log[:, shared])
            rest = np.log(np.exp(np.delete(log, shared, 1)).sum(1, keepdims=True))
            return np.concatenate([log[:, shared], rest], axis=1)

        lq, lp = seen(np.float64(np.float32(s))), seen(np.float64(np.float32(t)))
        return (T**2 * (np.exp(lp) * (lp - lq)).sum(1)).mean()

    want = (value64(T + 1e-3 * T) - value64(T - 1e-3 * T)) / (2e-3 * T)
    return value, (value64(T), want)


@pytest.mark.parametrize("others", ["mask", "bucket"])
def test_the_slope_by_a_high_temperature_is_no_rounding_noise(others):
    value, (_, want) = near(0.1, others, 20.0)
    np.testing.assert_allclose(jax.jit(jax.grad(value))(jnp.float32(20.0)), want, rtol=0.03)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_nearly_equal_heads_are_not_below_zero(implementation):
    """Each row by itself; and the slope is that of the sum, not 0, where rounding left less."""
    rng = np.random.default_rng(5)
    t = jnp.asarray(3 * rng.normal(size=(64, 200)), jnp.float32)
    s, shared = t + 1e-4 * jnp.asarray(rng.normal(size=t.shape), jnp.float32), np.arange(180)

    def values(s):
        one = lambda s, t: linear_divergence(
            s[None], jnp.eye(200), t[None], jnp.eye(200), student_columns=shared,
            teacher_columns=shared, other_columns="bucket", implementation=implementation,
        )  # fmt: skip
        value, means = jax.vmap(one)(s, t)
        return value, means["loss/kl_t1"].total

    value, kl = jax.jit(values)(s)
    assert (value >= 0).all() and (kl >= 0).all() and (value == 0).any()
    slope = jax.jit(jax.grad(lambda s: values(s)[0].sum()))(s)
    assert slope[np.asarray(value == 0)].any(axis=1).all()


def test_all_columns_in_another_order_are_the_same_vocabulary():
    rng = np.random.default_rng(0)
    hidden, head, teacher = (jnp.float32(rng.normal(size=s)) for s in ((9, 5), (11, 5), (11, 5)))
    order = rng.permutation(11)
    mapped = linear_divergence(
        hidden, head, hidden, teacher[order], student_columns=jnp.arange(11),
        teacher_columns=np.argsort(order), temperature=2.0,
    )[0]  # fmt: skip
    plain = linear_divergence(hidden, head, hidden, teacher, temperature=2.0)[0]
    np.testing.assert_allclose(mapped, plain, rtol=1e-6)


@pytest.mark.parametrize("others", ["mask", "bucket"])
def test_traced_columns_that_are_none_or_stand_twice_are_left_out(others):
    x = make()
    arrays = [jnp.float32(x[name]) for name in ("hidden", "head", "taught", "teacher")]

    def run(student, teacher, implementation=None):
        loss = lambda head: linear_divergence(
            arrays[0], head, *arrays[2:], student_columns=student, teacher_columns=teacher,
            other_columns=others, implementation=implementation,
        )  # fmt: skip
        (value, means), slope = jax.value_and_grad(loss, has_aux=True)(arrays[1])
        return value, slope, [mean.value for mean in means.values()]

    want = jax.jit(lambda: run(STUDENT, TEACHER))()
    more = [23, 1, -1, *STUDENT, 9, 0], [6, 99, 7, *TEACHER, 5, 3]
    for implementation in (None, "reference"):
        got = jax.jit(lambda *lists, i=implementation: run(*lists, i))(*map(jnp.array, more))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-6, atol=1e-7), got, want)


@pytest.mark.parametrize("others", ["mask", "bucket"])
@pytest.mark.parametrize("traced", [0, 1])
def test_a_column_of_one_traced_list_takes_its_partner_with_it(others, traced):
    x = make()
    arrays = [jnp.float32(x[name]) for name in ("hidden", "head", "taught", "teacher")]
    known = np.arange(4), np.array([7, 3, 0, 5])
    broken = [np.array(one) for one in known]
    broken[traced][1] = 99

    def run(one, implementation=None):
        lists = [one if at == traced else broken[at] for at in range(2)]
        return linear_divergence(
            *arrays, student_columns=lists[0], teacher_columns=lists[1], other_columns=others,
            implementation=implementation,
        )[0]  # fmt: skip

    kept = [one[[0, 2, 3]] for one in known]
    want = linear_divergence(
        *arrays, student_columns=kept[0], teacher_columns=kept[1], other_columns=others
    )[0]
    for implementation in (None, "reference"):
        got = jax.jit(lambda one, i=implementation: run(one, i))(jnp.asarray(broken[traced]))
        np.testing.assert_allclose(got, want, rtol=5e-6)


def test_the_plain_function_holds_the_mass_of_the_others():
    z = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
    np.testing.assert_allclose(
        jax.nn.softmax(losses.shared_columns(z, [1, 3], others="bucket")),
        [[0.2, 0.4, 0.4]],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        jax.nn.softmax(losses.shared_columns(z, [1, 3])), [[1 / 3, 2 / 3]], rtol=1e-6
    )


def test_the_default_chunk_counts_the_columns_that_devices_bring_together(mesh8, monkeypatch):
    counted, plain = [], arguments.chunk_size
    monkeypatch.setattr(
        arguments, "chunk_size", lambda *sizes: counted.append(sizes[4]) or plain(*sizes)
    )
    lists = {"student_columns": STUDENT, "teacher_columns": TEACHER, "other_columns": "bucket"}
    hidden, rows = jnp.ones((8, 3, D)), (jnp.ones((VS, D)), jnp.ones((VT, D)))
    for mesh in (mesh8, None):
        run = lambda hidden, mesh=mesh: linear_divergence(
            hidden, rows[0], hidden, rows[1], mesh=mesh, **lists
        )
        jax.eval_shape(run, hidden)
    assert counted == [2 * 4 * (len(STUDENT) + 1), 0]


@pytest.mark.floor
def test_no_buffer_of_tokens_times_vocabulary():
    tokens, vocab, taught = 512, 2048, 3072
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    shared = np.arange(0, vocab, 2)
    loss = lambda *arrays: linear_divergence(
        *arrays, student_columns=shared, teacher_columns=shared, other_columns="bucket", chunk=32
    )[0]
    compiled = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        .lower(shape(tokens, 16), shape(vocab, 16), shape(tokens, 8), shape(taught, 8))
        .compile()
    )
    both = tokens * (vocab + taught) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < both / 4
    text = compiled.as_text()
    assert not [width for width in (vocab, taught, len(shared)) if f"[{tokens},{width}]" in text]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student_columns": [1, 0]}, "must ascend"),
        ({"student_columns": [0, 23]}, "23 is no column"),
        ({"teacher_columns": [3, 3]}, "3 stands twice"),
        ({"teacher_columns": [3]}, "lengths agree"),
        ({"teacher_columns": None}, "go together"),
        ({"other_columns": "drop"}, "must be one of mask, bucket"),
        ({"taid_t": 0.5}, "named kind"),
        ({"student_columns": []}, "one or more columns"),
        ({"student_columns": [3], "teacher_columns": [3]}, "0 for any student"),
    ],
)
def test_bad_input_is_named(change, words):
    given = {"student_columns": [0, 1], "teacher_columns": [4, 2]} | change
    given = {n: np.array(a, int) if isinstance(a, list) else a for n, a in given.items()}
    with pytest.raises(ValueError, match=words):
        linear_divergence(
            jnp.ones((1, D)), jnp.ones((VS, D)), jnp.ones((1, D)), jnp.ones((VT, D)), **given
        )
