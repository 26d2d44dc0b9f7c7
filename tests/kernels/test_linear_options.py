"""The fused head loss with TAID, smoothing, functions, temperatures per token, and every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import sharding
from jaxdistill.kernels import choice, linear_divergence
from jaxdistill.losses import divergences
from tests.also import also

N, V, DS, DT = 48, 53, 16, 24


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(3)
    arrays = {
        "hs": rng.normal(size=(N, DS)),
        "ws": rng.normal(size=(V, DS)) * 0.7,
        "ht": rng.normal(size=(N, DT)),
        "wt": rng.normal(size=(V, DT)) * 0.7,
        "m": (rng.random(N) < 0.7).astype(float),
    }
    return {k: jnp.float32(v) for k, v in arrays.items()} | {
        "y": jnp.asarray(rng.integers(0, V, N))
    }


def run(x, *, mesh=None, shape=None, temperature=1.0, **options):
    """Loss, metrics and gradients by hidden states, head and temperature."""
    shape = shape or (N,)

    def loss(hs, ws, temperature):
        whole = lambda a: a.reshape(*shape, *a.shape[1:])
        return linear_divergence(
            whole(hs), ws, whole(x["ht"]), x["wt"], labels=whole(x["y"]), mask=whole(x["m"]),
            temperature=temperature, mesh=mesh, **options,
        )  # fmt: skip

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return compiled(x["hs"], x["ws"], jnp.asarray(temperature, jnp.float32))


def direct(x, per_token, alpha=0.0, smoothing=0.0, softcaps=(None, None)):
    """The same from [N, V] logits and autodiff, in float64: (loss, d hs, d ws)."""
    with jax.enable_x64(True):
        a = {k: jnp.asarray(np.asarray(v), jnp.float64) for k, v in x.items() if k != "y"}
        labels = np.asarray(x["y"])

        def loss(hs, ws):
            s, t = hs @ ws.T, a["ht"] @ a["wt"].T
            cap = lambda x, c: x if c is None else c * jnp.tanh(x / c)
            s, t = map(cap, (s, t), softcaps)
            log_q = jax.nn.log_softmax(s)
            ce = -(1 - smoothing) * log_q[np.arange(N), labels] - smoothing * log_q.mean(1)
            values = alpha * ce + (1 - alpha) * per_token(s, t)
            return (values * a["m"]).sum() / a["m"].sum()

        value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(a["hs"], a["ws"])
        return np.asarray(value), *map(np.asarray, slopes)


def compare(got, want, rtol=3e-6):
    (value, _), slopes = got
    np.testing.assert_allclose(value, want[0], rtol=rtol)
    for slope, expected in zip(slopes[:2], want[1:], strict=True):
        np.testing.assert_allclose(slope, expected, atol=rtol * np.abs(expected).max())


def kl64(s, t):
    log_p, log_q = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


both = pytest.mark.parametrize("implementation", [None, "reference"])


@both
@pytest.mark.parametrize("taid_t", [0.0, 0.4, 1.0])
def test_taid_is_the_divergence_from_a_detached_mixture_of_logits(x, taid_t, implementation):
    mixed = lambda s, t: kl64(s, (1 - taid_t) * jax.lax.stop_gradient(s) + taid_t * t)
    (value, means), slopes = run(x, taid_t=taid_t, implementation=implementation)
    want = direct(x, mixed)
    if taid_t == 0:
        assert abs(value) < 1e-6
        assert max(np.abs(slope).max() for slope in slopes[:2]) < 1e-7
    else:
        compare(((value, means), slopes), want)
    with jax.enable_x64(True):
        wide = {k: jnp.asarray(np.asarray(v), jnp.float64) for k, v in x.items()}
        s, t = wide["hs"] @ wide["ws"].T, wide["ht"] @ wide["wt"].T
        log_z = jax.nn.log_softmax((1 - taid_t) * s + taid_t * t)
        entropy = -((jnp.exp(log_z) * log_z).sum(1) * wide["m"]).sum() / wide["m"].sum()
    np.testing.assert_allclose(means["loss/target_entropy"].value, entropy, rtol=1e-5)
    # Metrics stay with the teacher.
    np.testing.assert_allclose(means["loss/kl_t1"].value, direct(x, kl64)[0], rtol=1e-5)


@both
def test_label_smoothing_equals_float64(x, implementation):
    got = run(x, alpha=0.3, label_smoothing=0.1, implementation=implementation)
    compare(got, direct(x, kl64, alpha=0.3, smoothing=0.1))


@both
def test_soft_caps_equal_float64(x, implementation):
    softcaps = {"student_softcap": 2.5, "teacher_softcap": 4.0}
    got = run(x, alpha=0.3, implementation=implementation, **softcaps)
    compare(got, direct(x, kl64, alpha=0.3, softcaps=(2.5, 4.0)))


def cubed_gap(s, t, labels):
    """A divergence of nobody's: needs whole rows, and the labels."""
    p, q = jax.nn.softmax(t), jax.nn.softmax(s)
    at_label = jnp.take_along_axis(q, labels[:, None], axis=1)[:, 0]
    return jnp.sort(jnp.abs(p - q) ** 3, axis=1)[:, -5:].sum(1) - 0.1 * at_label


@both
def test_a_function_of_whole_rows_runs_fused(x, implementation):
    got = run(x, kind=cubed_gap, alpha=0.2, chunk=16, implementation=implementation)
    with jax.enable_x64(True):
        labels = jnp.asarray(np.asarray(x["y"]))
    want = direct(x, lambda s, t: cubed_gap(s, t, labels), alpha=0.2)
    compare(got, want)


def adaptive(s, t, labels, weight):
    return weight * divergences.forward_kl(s, t) + divergences.reverse_kl(s, t)


def test_a_function_is_tempered_and_scaled_like_a_named_kind(x):
    named = run(x, kind="forward_kl", temperature=2.0, alpha=0.3)
    function = run(x, kind=plain_forward_kl, temperature=2.0, alpha=0.3)
    np.testing.assert_allclose(named[0][0], function[0][0], rtol=1e-6)
    for a, b in zip(named[1], function[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def plain_forward_kl(s, t, labels):
    return divergences.forward_kl(s, t)


@pytest.mark.parametrize("kind", ["forward_kl", "generalized_jsd", "total_variation"])
def test_a_temperature_per_token_has_a_gradient_per_token(x, kind):
    temperature = jnp.linspace(0.8, 3.0, N)
    options = {"kind": kind, "parameters": (0.3,) if kind == "generalized_jsd" else ()}
    (value, _), slopes = run(x, temperature=temperature, chunk=16, **options)
    assert slopes[2].shape == (N,)
    step = 1e-2
    for token in (0, 5, 31):
        ends = [
            run(x, temperature=temperature.at[token].add(sign * step), **options)[0][0]
            for sign in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(slopes[2][token], expected, atol=6e-5)
    one = run(x, temperature=1.5, **options)
    same = run(x, temperature=jnp.full(N, 1.5), **options)
    np.testing.assert_allclose(one[0][0], same[0][0], rtol=1e-6)
    np.testing.assert_allclose(one[1][2], same[1][2].sum(), rtol=1e-4)


@pytest.mark.parametrize("passes", [True, False])  # of a CPU, and one read of an accelerator
def test_metrics_can_be_left_out_and_change_nothing_else(x, passes, monkeypatch):
    monkeypatch.setattr(choice, "reads_in_passes", lambda device: passes)
    monitored = run(x, alpha=0.3, temperature=2.0, chunk=16)
    compiled = jax.jit(
        lambda monitor: linear_divergence(
            x["hs"], x["ws"], x["ht"], x["wt"], labels=x["y"], mask=x["m"], alpha=0.3,
            temperature=2.0, chunk=16, monitor=monitor,
        )
    )  # fmt: skip
    on, off = compiled(True), compiled(False)
    np.testing.assert_allclose(on[0], off[0], rtol=0 if passes else 1e-7)
    np.testing.assert_allclose(on[0], monitored[0][0], rtol=1e-7)
    for name, mean in monitored[0][1].items():
        np.testing.assert_allclose(on[1][name].value, mean.value, rtol=1e-6)
        if name in ("loss/ce", "loss/divergence"):
            rtol = 0 if passes else 1e-6
            np.testing.assert_allclose(off[1][name].total, on[1][name].total, rtol=rtol)
        else:
            assert off[1][name].count == 0
            assert off[1][name].value == 0


@pytest.fixture(scope="module")
def wholes():
    """What one device gives, by the options: each compiled once for all meshes."""
    return {}


MESHES = [(1, 8, 1, 1), (8, 1, 1, 1), (1, 1, 8, 1), (2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 1, 4)]
KL = {"kind": "forward_kl", "alpha": 0.3, "temperature": 2.0, "label_smoothing": 0.1}
OPTIONS = [
    {"kind": "generalized_jsd", "parameters": (0.3,), "alpha": 0.3},
    {"taid_t": 0.4, "alpha": 0.1, "student_softcap": 2.5, "teacher_softcap": 4.0},
    {"kind": cubed_gap, "alpha": 0.2},
]


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        *((sizes, KL) for sizes in MESHES[:3]),
        *(((1, 2, 2, 2), options) for options in OPTIONS),
        *also(*((sizes, KL) for sizes in MESHES[3:])),
        *also(*(((2, 1, 1, 4), options) for options in OPTIONS)),
    ],
)
def test_every_mesh_gives_the_same(x, wholes, sizes, options):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    mesh = sharding.make_mesh(*sizes)
    whole = wholes[id(options)] = wholes.get(id(options)) or run(x, **options)
    rows = (8, 6) if sizes[3] == 2 else (8, N // 8)
    shape = (4, 12) if sizes[3] == 4 else rows
    parts = run(x, mesh=mesh, shape=shape, chunk=4, **options)
    np.testing.assert_allclose(parts[0][0], whole[0][0], rtol=1e-6)
    for a, b in zip(parts[1], whole[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for name, mean in whole[0][1].items():
        np.testing.assert_allclose(parts[0][1][name].value, mean.value, rtol=2e-6, atol=1e-7)


def test_vocabulary_parallel_moves_no_head_and_no_logits():
    """On fsdp 4 x tensor 2 with few tokens: no head and no [tokens, V] crosses the mesh."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    mesh = sharding.make_mesh(1, 4, 2, 1)
    tokens, vocab, width = 64, 4096, 32
    place = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))
    array = lambda shape, *axes: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(*axes))
    head = array((vocab, width), ("fsdp", "tensor"))
    hidden = array((tokens, width), ("data", "fsdp"))

    def loss(hs, ws, ht, wt):
        return linear_divergence(hs, ws, ht, wt, temperature=2.0, mesh=mesh)[0]

    text = (
        jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(hidden.sharding, head.sharding))
        .lower(hidden, head, hidden, head)
        .compile()
        .as_text()
    )
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathered, "tokens are brought together"
    assert all(f"{vocab}" not in line.split(" all-gather(")[0] for line in gathered), gathered


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": cubed_gap, "parameters": (0.1,)}, "bind them"),
        ({"student_softcap": 0.0}, "softcap"),
        ({"implementation": "triton"}, "must be one of"),
        ({"implementation": "mosaic_gpu"}, "cannot run"),
        ({"implementation": "reference", "vocab_axes": "model"}, "whole head"),
    ],
)
def test_bad_choices_are_named(x, change, words):
    with pytest.raises(ValueError, match=words):
        linear_divergence(x["hs"], x["ws"], x["ht"], x["wt"], **change)


def test_tokens_that_the_mesh_does_not_divide_are_named(x, mesh8):
    with pytest.raises(ValueError, match="no multiple"):
        linear_divergence(x["hs"][:45], x["ws"], x["ht"][:45], x["wt"], mesh=mesh8)


def test_a_bound_function_compiles_once(x):
    traces = []

    def traced(s, t, labels, weight):
        traces.append(1)
        return weight * divergences.forward_kl(s, t)

    kind = functools.partial(traced, weight=0.5)
    step = jax.jit(lambda hs: linear_divergence(hs, x["ws"], x["ht"], x["wt"], kind=kind)[0])
    step(x["hs"])
    before = len(traces)
    step(x["hs"] + 1)
    assert len(traces) == before


def test_inside_a_shard_map_of_ones_own(x):
    """Rows of the heads on one axis, tokens on another; every device calls for its own part."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    mesh = jax.make_mesh((2, 4), ("rows", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    even = x | {"ws": x["ws"][:52], "wt": x["wt"][:52], "y": jnp.minimum(x["y"], 51)}
    tokens, vocab = jax.P("rows"), jax.P("model")

    def local(hs, ws, ht, wt, y, m):
        def loss(hs, ws):
            total, _ = linear_divergence(
                hs, ws, ht, wt, labels=y, mask=m, alpha=0.3, temperature=2.0, reduction="sum",
                chunk=8, vocab_axes="model",
            )  # fmt: skip
            return total

        total, (by_hidden, by_head) = jax.value_and_grad(loss, argnums=(0, 1))(hs, ws)
        return jax.lax.psum(total, "rows"), by_hidden, jax.lax.psum(by_head, "rows")

    run_sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, vocab, tokens, vocab, tokens, tokens),
        out_specs=(jax.P(), tokens, vocab),
        check_vma=False,
    )
    got = jax.jit(run_sharded)(*(even[name] for name in ("hs", "ws", "ht", "wt", "y", "m")))
    (value, _), slopes = run(even, alpha=0.3, temperature=2.0, reduction="sum")
    np.testing.assert_allclose(got[0], value, rtol=2e-6)
    for ours, want in zip(got[1:], slopes[:2], strict=True):
        np.testing.assert_allclose(ours, want, atol=3e-6 * float(jnp.abs(want).max()))


def test_padded_columns_of_float16_are_no_tokens():
    """V of no multiple of the devices, smoothed over the real columns alone."""
    rng = np.random.default_rng(0)
    h, w = (jnp.asarray(rng.normal(size=shape), jnp.float16) for shape in ((4, 8), (11, 8)))
    mesh = sharding.make_mesh(1, 1, 2, 1, devices=jax.devices()[:2])
    run = jax.jit(
        lambda h: linear_divergence(
            h, w, labels=jnp.arange(4), alpha=1.0, label_smoothing=0.1, mesh=mesh
        )[0]
    )
    with jax.set_mesh(mesh):
        value = run(h)
    logits = np.float64(np.float16(np.float32(h) @ np.float32(w).T))
    log_q = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    want = (-0.9 * log_q[range(4), range(4)] - 0.1 * log_q.mean(1)).mean()
    np.testing.assert_allclose(value, want, rtol=1e-5)


def test_a_slope_of_slopes_has_none_of_the_teachers():
    """Of a head that is student and teacher at once, whose teacher's side is a constant."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3), (5, 3)))

    def ours(head):
        return linear_divergence(hidden, head, hidden[::-1] * 2, head)[0]

    def plain(head):
        taught = jax.lax.stop_gradient(hidden[::-1] * 2 @ head.T)
        log_q, log_p = map(jax.nn.log_softmax, (hidden @ head.T, taught))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1))

    along = jnp.asarray(rng.normal(size=head.shape), jnp.float32)
    got, want = (
        jax.grad(lambda w, f=f: jnp.vdot(jax.grad(f)(w), along))(head) for f in (ours, plain)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
