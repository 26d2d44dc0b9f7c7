"""Row statistics against float64 NumPy, in every form, and their merge for any split of a row."""

import importlib.metadata

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice, divergence, linear_divergence, rows
from jaxdistill.kernels import statistics as stats
from jaxdistill.kernels.operands import Coefficients
from jaxdistill.kernels.tiling import Tiling, Work, heuristic, within
from jaxdistill.losses import divergences

A100, H100 = (choice.Device("gpu", f"NVIDIA {name}") for name in ("A100-SXM4-80GB", "H100 80GB"))
NAMES = (*stats.MOMENTS, stats.ECHO, stats.LEAD)
JAX = tuple(map(int, importlib.metadata.version("jax").split(".")[:2]))
mosaic = pytest.mark.skipif(
    JAX < (0, 11), reason=f"Pallas kernels for GPUs need jax 0.11, this is {JAX[0]}.{JAX[1]}"
)


def clamped(student, teacher, taid_t=None):
    logits = {"s": stats.clamp(student), "t": stats.clamp(teacher)}
    if taid_t is not None:
        logits["z"] = logits["s"] + taid_t * (logits["t"] - logits["s"])
    return logits


def exact(logits, temperature):
    """The definitions, in float64."""
    logits = {m: np.asarray(x, np.float64) for m, x in logits.items()}
    logits.setdefault("z", logits["t"])
    s, t = logits["s"], logits["t"]
    found = {stats.ECHO: np.where(s == s.max(1, keepdims=True), t, stats.LOWEST).max(1)}
    found[stats.LEAD] = -np.argmax(s, axis=1)
    for name, moment in stats.MOMENTS.items():
        k = 1 / temperature if moment.tempered else 1.0
        x = {m: (v - v.max(1, keepdims=True)) * k for m, v in logits.items()}
        weight, own = np.exp(x[moment.model]), x[moment.model]
        of = {"one": 1.0, "self": own, "gap": own - x[moment.other]}[moment.of]
        found[name] = (weight * of).sum(1)
    return found


def check(found, want, tolerance, names=NAMES):
    for name in names:
        error = np.abs(np.asarray(found[name], np.float64) - want[name]) / (1 + np.abs(want[name]))
        assert error.max() < tolerance, (name, error.max())


def make(tokens, vocab, dtype=jnp.float32, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(size=(tokens, vocab)) * scale for _ in range(2))
    return jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)


@pytest.mark.parametrize("form", [stats.in_passes, stats.in_one_pass])
@pytest.mark.parametrize("taid_t", [None, 0.4])
def test_xla_forms_equal_the_definitions(form, taid_t):
    logits = clamped(*make(20, 331), taid_t)
    found = form(NAMES, logits, stats.Scales(jnp.float32(1 / 1.7), 1.0))
    check(found, exact(logits, 1.7), 4e-6)


@pytest.mark.parametrize("vocab", [stats._LONG, stats._LONG + 11])  # eight parts, and a rest
def test_long_rows_are_folded_and_equal_the_definitions(vocab):
    logits = clamped(*make(3, vocab))
    last = jnp.asarray([9.0, 20.0, 40.0])  # what stands last counts, too
    logits = {model: x.at[:, -1].set(last) for model, x in logits.items()}
    found = stats.in_passes(NAMES, logits, stats.Scales(jnp.float32(1 / 1.7), 1.0))
    check(found, exact(logits, 1.7), 4e-6)
    entries = jnp.exp(logits["s"] - 40)
    np.testing.assert_allclose(stats.row_sum(entries), np.float64(entries).sum(1), rtol=1e-6)


@hypothesis.given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 1000), st.booleans()
)
@hypothesis.settings(max_examples=30)
def test_parts_of_any_size_merge_to_the_whole(sizes, seed, at_once):
    logits = clamped(*make(4, sum(sizes), scale=20.0, seed=seed))
    scales = stats.Scales(jnp.float32(0.6), 1.0)
    ends = np.cumsum(sizes)
    parts = [
        stats.in_passes(NAMES, {m: x[:, end - size : end] for m, x in logits.items()}, scales)
        for size, end in zip(sizes, ends, strict=True)
    ]
    for part, end, size in zip(parts, ends, sizes, strict=True):
        part[stats.LEAD] -= end - size
    if at_once:
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
        axis0 = (lambda x: jnp.max(x, 0), lambda x: jnp.sum(x, 0))
        merged = stats.combine(stacked, scales, *axis0)
    else:
        merged = parts[0]
        for part in parts[1:]:
            merged = stats.merge(merged, part, scales)
    check(merged, exact(logits, 1 / 0.6), 5e-6)


def test_merging_with_nothing_changes_nothing():
    logits = clamped(*make(4, 9))
    scales = stats.Scales(jnp.float32(1.0), 1.0)
    found = stats.in_passes(NAMES, logits, scales)
    start = lambda name: stats.NOTHING if name.startswith("max_") else 0.0
    nothing = {name: jnp.full(4, start(name)) for name in found}
    nothing |= {name: jnp.full(4, stats.LOWEST) for name in stats.AT_TOP}
    for merged in (stats.merge(found, nothing, scales), stats.merge(nothing, found, scales)):
        for name, value in found.items():
            np.testing.assert_array_equal(merged[name], value)


def test_the_rounding_of_a_product_is_known_exactly():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=1000) * 300, jnp.float32) for _ in range(2))
    error = stats.product_error(a, b, a * b)
    with jax.enable_x64(True):
        want = np.float64(a) * np.float64(b) - np.float64(a * b)
    np.testing.assert_allclose(np.float64(error), want, rtol=1e-5, atol=1e-12)


# --------------------------------------------------------------------- the GPU's kernel on a CPU


def interpreted():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()


@mosaic
@pytest.mark.parametrize(
    ("tokens", "vocab", "dtype", "split", "taid_t", "temperature"),
    [
        (64, 512, "float32", 1, None, 0.7),
        (64, 512, "bfloat16", 2, None, 2.0),
        (100, 250, "bfloat16", 2, None, 0.7),
        (100, 640, "float32", 3, 0.4, 2.0),
        (64, 192, "float16", 1, None, 2.0),
    ],
)
def test_the_gpu_kernel_equals_the_definitions(tokens, vocab, dtype, split, taid_t, temperature):
    from jaxdistill.kernels import mosaic_gpu

    student, teacher = make(tokens, vocab, dtype)
    student, teacher = (x.at[2, -3:].set(-jnp.inf) for x in (student, teacher))
    if taid_t is None:  # a mixture of logits of 300 is rounded before any statistic is measured
        student = student.at[3, 0].set(300.0).at[4, 0].set(-300.0)
    else:
        taid_t = jnp.float32(taid_t)
    coefficients = Coefficients(jnp.float32(0), jnp.float32(temperature), (), taid_t)
    found = mosaic_gpu.statistics(
        NAMES, {"s": student, "t": teacher}, coefficients, Tiling(64, 2, split), interpreted()
    )
    # The mixture itself is float32, fused here and not there: a last digit before any statistic.
    tolerance = 2e-6 if taid_t is None else 1e-5
    check(found, exact(clamped(student, teacher, taid_t), temperature), tolerance)


@mosaic
@pytest.mark.parametrize(
    ("model", "names", "tokens", "vocab", "dtype", "tiling"),
    [
        ("s", ("sum_s", "self_s", stats.LEAD), 100, 250, "bfloat16", Tiling(64, 2, 3)),
        ("s", ("sum_s1", "sum_s", "self_s1"), 64, 192, "float16", Tiling(64, 1, 1)),
        ("s", ("sum_s", "self_s", stats.LEAD), 9, 640, "float32", Tiling(128, 2, 2)),
        ("t", ("sum_t1", "self_t1"), 64, 128, "bfloat16", Tiling(64, 2, 1)),
    ],
)
def test_the_gpu_kernel_measures_one_model_alone(model, names, tokens, vocab, dtype, tiling):
    from jaxdistill.kernels import mosaic_gpu

    logits = make(tokens, vocab, dtype)[0]
    logits = logits.at[2, -3:].set(-jnp.inf).at[4, 0].set(-300.0)
    if stats.LEAD in names:  # which is relative to the maximum itself, not to one beside it
        logits = logits.at[3, 0].set(300.0)
    logits = logits.at[5].set(1.0).at[6, :-1].set(-jnp.inf).at[7, 70:].set(logits[7].max())  # ties
    coefficients = Coefficients(jnp.float32(0), jnp.float32(0.7))
    found = mosaic_gpu.statistics(names, {model: logits}, coefficients, tiling, interpreted())
    want = exact(clamped(logits, logits), 0.7)
    check(found, want, 2e-6, names)


@mosaic
@pytest.mark.parametrize(
    ("kind", "parameters", "named"),
    [
        ("generalized_jsd", (0.3,), {"beta": 0.3}),
        ("generalized_jsd", (1.0,), {"beta": 1.0}),
        ("skew_forward_kl", (0.1,), {"skew": 0.1}),
        ("skew_reverse_kl", (0.1,), {"skew": 0.1}),
        ("total_variation", (), {}),
        ("alpha_divergence", (0.4,), {"alpha": 0.4}),
        ("alpha_beta_divergence", (0.2, 0.7), {"alpha": 0.2, "beta": 0.7}),
        ("alpha_beta_divergence", (0.0, 1.0), {"alpha": 0.0, "beta": 1.0}),
    ],
)
def test_the_second_read_sums_a_divergence(kind, parameters, named):
    from jaxdistill.kernels import mosaic_gpu

    student, teacher = make(100, 250, "bfloat16")
    coefficients = Coefficients(
        jnp.float32(0), jnp.float32(1.5), tuple(map(jnp.float32, parameters))
    )
    found = stats.in_passes(("sum_s", "sum_z"), clamped(student, teacher), coefficients.scales)
    value, slope_sum = mosaic_gpu.row_sums(
        rows.KINDS[kind], {"s": student, "t": teacher}, coefficients, found, Tiling(64, 2, 2),
        interpreted(),
    )  # fmt: skip
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.float64(x)) for x in (student, teacher))
        want = getattr(divergences, kind)(*wide, temperature=1.5, scale_by_t2=False, **named)
    np.testing.assert_allclose(value, want, rtol=2e-6, atol=1e-6)
    log_q, log_p = (jax.nn.log_softmax(x.astype(jnp.float32) / 1.5) for x in (student, teacher))
    slope = rows.make(kind, *parameters).dlogq(log_p, log_q).sum(1)
    np.testing.assert_allclose(slope_sum, slope, rtol=1e-5, atol=1e-5)


@mosaic
@pytest.mark.parametrize(
    "kind",
    ["forward_kl", "symmetric_kl", "generalized_jsd", "skew_forward_kl"],  # the last by default
)
def test_divergence_on_the_gpu_kernel_equals_xla(kind, monkeypatch):
    """The whole way, value and gradient: what a GPU would be given, run on a CPU."""
    student, teacher = make(70, 256, "bfloat16")
    labels, mask = jnp.arange(70) % 256, jnp.arange(70) % 3 > 0
    spoiled = student.at[0].set(jnp.nan)
    parameters = {"symmetric_kl": (0.3,), "generalized_jsd": (0.3,)}.get(kind, ())

    def loss(student, temperature):
        return divergence(
            student, teacher, kind=kind, parameters=parameters, temperature=temperature,
            labels=labels, alpha=0.3, mask=mask,
        ).sum()  # fmt: skip

    # New functions each time, or JAX would hand back the first trace.
    run = lambda: jax.value_and_grad(lambda *x: loss(*x), argnums=(0, 1))(spoiled, 1.7)
    want = run()
    monkeypatch.setattr(
        choice, "current_device", lambda: choice.Device("gpu", "NVIDIA H100 80GB HBM3")
    )
    monkeypatch.setattr(choice, "INTERPRET", interpreted())
    assert choice.choose(None, 256, jnp.bfloat16) == "mosaic_gpu"
    got = run()
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    np.testing.assert_allclose(np.float32(got[1][0]), np.float32(want[1][0]), rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(got[1][1], want[1][1], rtol=2e-5)


KL = ("sum_s", "sum_z", "gap_z")


def kl_of(found, temperature):
    logs = np.log(np.float64(found["sum_s"])) - np.log(np.float64(found["sum_z"]))
    return temperature**2 * (np.float64(found["gap_z"]) / np.float64(found["sum_z"]) + logs)


@mosaic
@pytest.mark.parametrize("taid_t", [None, 0.3])
def test_parts_of_nothing_but_impossible_entries_change_nothing(taid_t):
    """A shard of the vocabulary, a first tile, a whole row; at any temperature, T is traced."""
    from jaxdistill.kernels import mosaic_gpu

    taid_t = None if taid_t is None else jnp.float32(taid_t)

    @jax.jit
    def run(student, teacher, temperature):
        coefficients = Coefficients(jnp.float32(0), temperature, (), taid_t)
        return mosaic_gpu.statistics(
            KL, {"s": student, "t": teacher}, coefficients, Tiling(64, 1, 1), interpreted()
        )

    student, teacher = make(64, 128)
    none = jnp.full((64, 128), -jnp.inf)
    one_tile = [x.at[:, :64].set(-jnp.inf) for x in (student, teacher)]
    if taid_t is not None:
        one_tile[1] = teacher.at[:, 64:].set(
            one_tile[1][:, 64:]
        )  # impossible for the student alone
    one_tile = [x.at[7].set(-jnp.inf) for x in one_tile]
    axis0 = (lambda x: jnp.max(x, 0), lambda x: jnp.sum(x, 0))
    for temperature in (0.3, 0.7, 0.9, 1.0, 1.7, 2.0, 3.3):
        T = jnp.float32(temperature)
        found = run(*one_tile, T)
        want = exact(clamped(*one_tile, taid_t), temperature)
        if taid_t is None:
            np.testing.assert_allclose(kl_of(found, temperature)[7], 0)
        rows_ = np.arange(64) != 7
        for name in KL:
            error = np.abs(found[name] - want[name]) / (1 + np.abs(want[name]))
            assert error[rows_].max() < 1e-5, (temperature, name)
        whole = run(student, teacher, T)
        merged = stats.combine(
            jax.tree.map(lambda *x: jnp.stack(x), run(none, none, T), whole),
            stats.Scales(1 / T, 1.0),
            *axis0,
        )
        np.testing.assert_allclose(kl_of(merged, temperature), kl_of(whole, temperature), rtol=1e-6)


@mosaic
def test_splits_without_a_tile_read_nothing():
    from jaxdistill.kernels import mosaic_gpu

    student, teacher = make(64, 256)
    coefficients = Coefficients(jnp.float32(0), jnp.float32(2))
    found = mosaic_gpu.statistics(  # two tiles each for two splits, none for the third
        KL, {"s": student - 9, "t": teacher - 9}, coefficients, Tiling(64, 1, 3), interpreted()
    )
    want = exact(clamped(student - 9, teacher - 9), 2.0)
    for name in KL:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-5)


@mosaic
def test_tiles_lie_inside_the_array_where_copies_know_no_bounds():
    """And every tile is some block's, however a split divides them."""
    from jaxdistill.kernels.mosaic_stream import _grid

    kl = Work(("sum_s", "sum_z", "gap_z"))
    for tokens, vocab in ((8192, 151_936), (64, 50_304), (1024, 640), (128, 128_256)):
        chosen = heuristic(tokens, vocab, "bfloat16", A100.kind, kl)
        for columns, split in ((64, 1), (128, 7), (256, 3)):
            one = within(Tiling(columns, 4, split), vocab, A100.kind)
            assert within(one, vocab, H100.kind) == one
            assert one.split == split
            for tiling in (one, chosen):
                assert vocab % tiling.columns == 0
                grid = _grid(tokens, vocab, tiling)
                tiles = [
                    min(grid.per_split, grid.blocks - block * grid.per_split)
                    for block in range(grid.split)
                ]
                assert min(tiles) > 0
                assert sum(tiles) * tiling.columns == vocab
                assert not grid.masked


@mosaic
def test_rows_that_an_a100_would_read_past_the_end_are_refused():
    for tokens, runs in ((64, True), (100, False), (824, False)):
        state = choice.support(640, "bfloat16", device=A100, tokens=tokens)["mosaic_gpu"]
        assert state.runs == runs
        assert choice.support(640, "bfloat16", device=H100, tokens=tokens)["mosaic_gpu"].runs
    assert "multiple of 64" in state.reason
    with pytest.raises(ConfigError, match="multiple of 64"):
        choice.choose("mosaic_gpu", 640, "bfloat16", device=A100, tokens=100)


@mosaic
def test_the_kernel_of_the_head_loss_is_given_whole_tiles_of_rows(monkeypatch):
    """In the program lowered for a GPU; TAID's target and float16 take their own ways there."""
    monkeypatch.setattr(choice, "current_device", lambda: A100)
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((100, 8), jnp.float16), shape((100, 8), jnp.float16), shape((650, 8), jnp.float16)
    )  # fmt: skip
    loss = lambda s, t, head: linear_divergence(s, head, t, head, taid_t=0.5, temperature=2.0)[0]
    text = jax.jit(loss).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    given = [line for line in text.splitlines() if "mosaic_gpu_v2" in line]
    assert given
    assert all("(tensor<128x704xf16>, tensor<128x704xf16>, " in line for line in given)
    dense = lambda s, t: divergence(s, t).sum()
    apart = shape((128, 640), jnp.float32), shape((128, 640), jnp.bfloat16)  # read as one type
    text = jax.jit(lambda *x: dense(*x)).trace(*apart).lower(lowering_platforms=("cuda",)).as_text()
    assert "(tensor<128x640xf32>, tensor<128x640xf32>, " in text
    logits = shape((100, 640), jnp.bfloat16)
    with pytest.warns(UserWarning, match="multiple of 64"):
        text = jax.jit(dense).trace(logits, logits).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu_v2" not in text
