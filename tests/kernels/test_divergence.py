"""Divergence of dense logits against float64: every kind, every dtype, hard cases, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import sharding
from jaxdistill.kernels import choice, divergence, rows
from jaxdistill.losses import divergences
from tests.also import also

PARAMETERS = {
    "symmetric_kl": (0.3,),
    "generalized_jsd": (0.3,),
    "skew_forward_kl": (0.1,),
    "skew_reverse_kl": (0.1,),
    "alpha_divergence": (0.4,),
    "alpha_beta_divergence": (0.4, 0.5),
}
NAMES = {
    "symmetric_kl": ("weight",),
    "generalized_jsd": ("beta",),
    "skew_forward_kl": ("skew",),
    "skew_reverse_kl": ("skew",),
    "alpha_divergence": ("alpha",),
    "alpha_beta_divergence": ("alpha", "beta"),
}
KINDS = sorted(rows.KINDS)


def logits(shape=(40, 53), seed=0, scale=3.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape) * scale, dtype) for _ in range(2))


def exact(kind, student, teacher, weights, temperature=1.0, taid_t=None, alpha=0.0, labels=None):
    """(values, d sum(weights * values) / d student, ... / d T) of the reference in float64."""
    with jax.enable_x64(True):
        s, t, w = (jnp.asarray(np.asarray(a, np.float64)) for a in (student, teacher, weights))
        labels = None if labels is None else np.asarray(labels)
        options = {"taid_t": taid_t, "alpha": alpha, "labels": labels}
        result = ours(kind, s, t, w, temperature, implementation="reference", **options)
        return tuple(map(np.asarray, result))


def ours(kind, student, teacher, weights, temperature=1.0, **options):
    def total(student, temperature):
        values = divergence(
            student, teacher, kind=kind, parameters=PARAMETERS.get(kind, ()),
            temperature=temperature, **options,
        )  # fmt: skip
        return jnp.sum(values * weights), values

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, values), slopes = run(student, jnp.asarray(temperature, jnp.float32))
    return values, *slopes


def check(got, want, value=1e-6, slope=2e-6):
    scale = 1 + np.abs(want[0])
    np.testing.assert_array_less(np.abs(np.asarray(got[0], np.float64) - want[0]) / scale, value)
    np.testing.assert_allclose(
        np.asarray(got[1], np.float64), want[1], atol=slope * max(1, np.abs(want[1]).max())
    )
    np.testing.assert_allclose(got[2], want[2], rtol=3e-5, atol=1e-4)


weights_of = lambda n: jnp.asarray(np.random.default_rng(9).uniform(0.5, 1.5, n), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_value_and_gradients_equal_float64(kind, temperature):
    s, t = logits()
    w = weights_of(40)
    check(ours(kind, s, t, w, temperature), exact(kind, s, t, w, temperature))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_equals_the_losses(kind):
    s, t = logits()
    numbers = map(jnp.float32, PARAMETERS.get(kind, ()))
    w, named = weights_of(40), dict(zip(NAMES.get(kind, ()), numbers, strict=True))
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(np.float64(x)) for x in (s, t))
        want = getattr(divergences, kind)(*wide, temperature=jnp.float32(1.7), **named)
    np.testing.assert_allclose(exact(kind, s, t, w, 1.7)[0], want, rtol=1e-7, atol=1e-9)


def test_cross_entropy_and_taid_come_from_the_same_statistics():
    s, t = logits()
    w, y = weights_of(40), jnp.asarray(np.random.default_rng(1).integers(0, 53, 40))
    got = ours("forward_kl", s, t, w, 2.0, alpha=0.3, labels=y, taid_t=0.4)
    check(got, exact("forward_kl", s, t, w, 2.0, 0.4, 0.3, y))


def test_alpha_has_a_gradient():
    s, t = logits()
    y = jnp.zeros(40, jnp.int32)
    total = lambda alpha: divergence(s, t, labels=y, alpha=alpha, temperature=2.0).sum()
    slope = jax.grad(total)(0.3)
    np.testing.assert_allclose(slope, total(1.0) - total(0.0), rtol=1e-4)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_logits_of_300_stay_exact(kind):
    s, t = logits(scale=80.0)
    s = s.at[0, 0].set(300.0).at[1, 0].set(-300.0)
    w = jnp.ones(40)
    got, want = ours(kind, s, t, w, 2.0), exact(kind, s, t, w, 2.0)
    # Gaps of hundreds cancel in the reverse direction's slope: that much is float32's.
    check((*got[:2], want[2]), want, slope=4e-6 if kind == "reverse_kl" else 2e-6)


def test_shifting_logits_by_a_thousand_changes_nothing():
    s, t = (x.round(3) for x in logits())
    plain = divergence(s, t, temperature=2.0)
    np.testing.assert_allclose(divergence(s + 1024, t - 2048, temperature=2.0), plain, atol=3e-4)


@pytest.mark.parametrize("implementation", [None, *also("reference")])
@pytest.mark.parametrize("kind", KINDS)
def test_hard_rows_are_never_nan(kind, implementation):
    """Columns impossible for both, masked rows that hold anything, a vocabulary of one."""
    s, t = logits((6, 20))
    s, t = (x.at[:, -3:].set(-jnp.inf) for x in (s, t))
    s, t = s.at[4].set(jnp.nan), t.at[5].set(jnp.inf)
    mask = jnp.array([True] * 4 + [False] * 2)
    got = ours(kind, s, t, jnp.ones(6), 2.0, mask=mask, implementation=implementation)
    assert all(np.isfinite(np.asarray(x)).all() for x in got)
    np.testing.assert_array_equal(got[0][4:], 0)
    np.testing.assert_array_equal(got[1][4:], 0)
    np.testing.assert_array_equal(got[1][:, -3:], 0)
    clean = exact(kind, s[:4, :-3], t[:4, :-3], jnp.ones(4), 2.0)
    check((got[0][:4], got[1][:4, :-3], clean[2]), clean, value=2e-6)
    single = ours(kind, s[:2, :1], t[:2, :1], jnp.ones(2))
    np.testing.assert_allclose(single[0], 0, atol=1e-6)
    np.testing.assert_allclose(single[1], 0, atol=1e-6)


@pytest.mark.floor
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_read_exactly(dtype):
    s, t = logits((16, 1000), dtype=dtype)
    w = jnp.ones(16)
    got, want = ours("forward_kl", s, t, w, 2.0), exact("forward_kl", s, t, w, 2.0)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    assert got[1].dtype == dtype
    step = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float64(got[1]), want[1], rtol=step, atol=1e-7)


def test_leading_dims_and_a_temperature_for_each_row():
    s, t = logits((2, 20, 53))
    temperature = jnp.linspace(0.7, 3.0, 40).reshape(2, 20)
    total = lambda s, temperature: divergence(s, t, temperature=temperature).sum()
    values = divergence(s, t, temperature=temperature)
    assert values.shape == (2, 20)
    slope = jax.grad(total, argnums=1)(s, temperature)
    for place in ((0, 3), (1, 11)):
        want = exact("forward_kl", s[place][None], t[place][None], np.ones(1), temperature[place])
        np.testing.assert_allclose(values[place], want[0][0], rtol=2e-6)
        np.testing.assert_allclose(slope[place], want[2], rtol=1e-4, atol=1e-5)


def test_one_pass_and_many_agree(monkeypatch):
    """The accelerators' XLA form, on the CPU."""
    s, t = logits((24, 77))
    w, y = weights_of(24), jnp.zeros(24, jnp.int32)
    monkeypatch.setattr(choice, "reads_in_passes", lambda device: False)
    for kind in ("forward_kl", "reverse_kl", "symmetric_kl", "skew_reverse_kl"):
        check(ours(kind, s, t, w, 2.0), exact(kind, s, t, w, 2.0), value=3e-6, slope=4e-6)
    got = ours("forward_kl", s, t, w, 2.0, alpha=0.3, labels=y, taid_t=0.4)
    check(got, exact("forward_kl", s, t, w, 2.0, 0.4, 0.3, y), value=3e-6, slope=4e-6)


@pytest.mark.floor
@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 1, 8, 1), (8, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "total_variation"])
def test_a_mesh_changes_nothing_and_gathers_nothing(sizes, kind):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    mesh = sharding.make_mesh(*sizes)
    s, t = logits((16, 4096))
    w, y = weights_of(16), jnp.arange(16) * 250
    options = {"alpha": 0.3, "labels": y}
    got = ours(kind, s, t, w, 2.0, mesh=mesh, **options)
    check(got, exact(kind, s, t, w, 2.0, None, 0.3, y))
    spec = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "tensor"))
    array = jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=spec)
    loss = lambda s, t: divergence(s, t, kind=kind, mesh=mesh, **options).sum()
    text = jax.jit(jax.grad(loss), out_shardings=spec).lower(array, array).compile().as_text()
    assert "all-gather" not in text


@pytest.mark.floor
def test_inside_a_shard_map_of_ones_own():
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    mesh = jax.make_mesh((2, 4), ("rows", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    s, t = logits((16, 64))
    y = jnp.arange(16) * 4
    place, per_row = jax.P("rows", "model"), jax.P("rows")

    def local(s, t, y):
        return jax.grad(
            lambda s: divergence(
                s, t, labels=y, alpha=0.3, temperature=2.0, vocab_axes="model"
            ).sum()
        )(s)

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(place, place, per_row), out_specs=place, check_vma=False
    )
    want = exact("forward_kl", s, t, jnp.ones(16), 2.0, None, 0.3, y)[1]
    np.testing.assert_allclose(jax.jit(run)(s, t, y), want, atol=3e-6)


@pytest.mark.floor
def test_a_shard_map_that_checks_what_varies_is_refused():
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(divergence, mesh=mesh, in_specs=jax.P("rows"), out_specs=jax.P("rows"))
    with pytest.raises(ValueError, match="check_vma=False"):
        jax.jit(run)(*logits())


@pytest.mark.floor
def test_transformations_keep_the_gradient():
    s, t = logits()
    loss = lambda s: divergence(s, t, temperature=2.0).sum()
    plain = jax.grad(loss)(s)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(loss))(s), plain, atol=1e-7)
    mapped = jax.vmap(jax.grad(loss))(jnp.stack([s, s]))
    np.testing.assert_allclose(mapped[1], plain, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "kl"}, "must be one of"),
        ({"alpha": 0.5}, "needs labels"),
        ({"labels": jnp.zeros(3, jnp.int32)}, "labels"),
        ({"implementation": "mosaic_gpu"}, "cannot run"),
        ({"implementation": "cuda"}, "must be one of"),
        ({"teacher_logits": jnp.zeros((40, 54))}, "one shape"),
        ({"implementation": "reference", "vocab_axes": "model"}, "whole rows"),
    ],
)
def test_bad_input_is_named(change, words):
    s, t = logits()
    with pytest.raises(ValueError, match=words):
        divergence(**({"student_logits": s, "teacher_logits": t} | change))


@pytest.mark.floor
@pytest.mark.parametrize("wrong", [(0, "float32"), (64, "float99")])
def test_support_names_what_is_no_vocabulary_or_dtype(wrong):
    with pytest.raises(ValueError, match=r"vocab = 0|dtype = 'float99'"):
        choice.support(*wrong)


def test_support_says_why():
    found = choice.support(50_257, jnp.bfloat16, device=choice.Device("gpu", "NVIDIA H100"))
    assert found["xla"].runs
    assert not found["mosaic_gpu"].runs
    reason = found["mosaic_gpu"].reason
    assert "multiple of 64" in reason or "jax 0.11" in reason
    for device, dtype in (
        (choice.Device("cpu", "cpu"), jnp.bfloat16),
        (choice.Device("gpu", "NVIDIA L4"), jnp.bfloat16),
        (choice.Device("gpu", "NVIDIA H100"), jnp.float8_e4m3fn),
    ):
        state = choice.support(128_256, dtype, device=device)["mosaic_gpu"]
        assert not state.runs
        assert state.reason


def test_the_self_check_passes_and_notices_a_wrong_kernel():
    """Each variant of the kernel by itself: wrong in one, only that one is reported."""
    from jaxdistill.kernels import logprob_rows
    from jaxdistill.kernels.self_check import self_check
    from jaxdistill.kernels.token_loss import TokenRows

    assert self_check() == self_check("float32") == "xla"
    for owner, name, reported in (
        (TokenRows, "divergence_slope", "Of the divergence the"),
        (TokenRows, "cross_entropy_slope", "Of the divergence and cross-entropy the"),
        (logprob_rows, "slopes", "Of the log-probabilities of one model the"),
    ):
        right = getattr(owner, name)
        wrong = lambda *x, right=right, **more: right(*x, **more) * 1.05
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, wrong)
            with pytest.raises(ValueError, match=reported):
                self_check("float32")


# ------------------------------------------------------------------------ nearly equal models


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "skew" not in kind and "jsd" not in kind]
)
@pytest.mark.parametrize("gap", [1.0, 0.1])
def test_the_slope_by_a_high_temperature_is_no_rounding_noise(kind, gap):
    """At T = 20 its leading terms cancel to a part in 10^5, against the definition in float64."""
    rng = np.random.default_rng(3)
    t = jnp.asarray(rng.normal(size=(128, 700)) * 3, jnp.float32)
    s = t + jnp.asarray(gap * rng.normal(size=t.shape), jnp.float32)
    parameters = PARAMETERS.get(kind, ())
    named = dict(zip(NAMES.get(kind, ()), parameters, strict=True))
    dense = lambda s, t, T, **options: divergence(
        s, t, kind=kind, parameters=parameters, temperature=T, **options
    ).mean()
    plain = lambda s, t, T: getattr(divergences, kind)(s, t, temperature=T, **named).mean()
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.float64(x)) for x in (s, t))
        definition = functools.partial(dense, implementation="reference")
        want = np.asarray(jax.jit(jax.grad(definition, 2))(*wide, jnp.float64(20.0)))
    for loss in (dense, plain):
        got = jax.jit(jax.grad(loss, 2))(s, t, jnp.float32(20.0))
        np.testing.assert_allclose(got, want, rtol=0.002)


@pytest.mark.parametrize("scale_by_t2", [True, False])
def test_the_slope_by_temperature_with_impossible_entries(scale_by_t2):
    s, t = logits((6, 40))
    s, t = (x.at[:, -5:].set(-jnp.inf) for x in (s, t))
    t = t.at[2, 3].set(-jnp.inf)  # what the teacher alone excludes costs the forward KL nothing
    f = lambda T, s, t: divergence(s, t, temperature=T, scale_by_t2=scale_by_t2)
    got = jax.grad(lambda T: f(T, s, t).sum())(1.5)
    again = jax.grad(
        lambda T: divergences.forward_kl(s, t, temperature=T, scale_by_t2=scale_by_t2).sum()
    )(1.5)
    z = [np.maximum(np.float64(x), -1e9) for x in (s, t)]

    def value(T):
        log_q, log_p = (x / T - np.log(np.exp(x / T).sum(1, keepdims=True)) for x in z)
        return (np.exp(log_p) * (log_p - log_q)).sum() * (T**2 if scale_by_t2 else 1)

    want = (value(1.5 + 1e-5) - value(1.5 - 1e-5)) / 2e-5
    np.testing.assert_allclose([got, again], want, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_divergence_is_below_zero(kind):
    rng = np.random.default_rng(5)
    s = jnp.asarray(rng.normal(size=(64, 500)) * 3, jnp.float32)
    near = s + jnp.asarray(1e-3 * rng.normal(size=s.shape), jnp.float32)
    parameters = PARAMETERS.get(kind, ())
    named = dict(zip(NAMES.get(kind, ()), parameters, strict=True))
    for other in (s, near):
        values = divergence(other, s, kind=kind, parameters=parameters, temperature=2.0)
        assert values.min() >= 0
        assert getattr(divergences, kind)(other, s, temperature=2.0, **named).min() >= 0
    assert values.max() < 1e-2
