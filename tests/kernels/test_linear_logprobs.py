"""linear_logprobs against float64 NumPy: every number, every gradient, masks, meshes, memory."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdistill.kernels import choice, linear_divergence, linear_logprobs, logprob_rows
from jaxdistill.kernels import statistics as stats
from jaxdistill.kernels.linear_logprobs.sets import columns_of
from jaxdistill.kernels.operands import VocabularyShard

N, V, D, K, TOP = 24, 53, 8, 3, 2
SETS = ([0, 5, 9, 52], [1, 2, 3], [5])
NUMBERS = ("logprobs", "entropy", "log_sum_exp", "log_masses", "top_logprobs")


def make(seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, V, (N, K))
    ids[3, 1] = -1
    ids[4, 0] = ids[4, 1]  # a token may be asked for twice
    return {
        "hidden": rng.normal(size=(N, D)),
        "head": rng.normal(size=(V, D)),
        "bias": rng.normal(size=V),
        "temperature": np.array(1.7),
        "ids": ids,
        "mask": rng.random(N) < 0.7,
        "by": {
            name: rng.normal(size=(N, n))
            for name, n in zip(NUMBERS, (K, 1, 1, 3, TOP), strict=True)
        },
    }


def said64(x, softcap=None):
    """Every number in float64, from [N, V] in full."""
    s = x["hidden"] @ x["head"].T + x["bias"]
    if softcap:
        s = softcap * np.tanh(s / softcap)
    z = s / (x["temperature"][:, None] if x["temperature"].ndim else x["temperature"])
    top = z.max(1, keepdims=True)
    lse = top[:, 0] + np.log(np.exp(z - top).sum(1))
    log_q = z - lse[:, None]
    order = np.argsort(-s, axis=1, kind="stable")[:, :TOP]
    rows = np.arange(len(s))[:, None]
    return {
        "logprobs": np.where(x["ids"] < 0, 0.0, log_q[rows, x["ids"]]),
        "entropy": -(np.exp(log_q) * log_q).sum(1),
        "log_sum_exp": lse,
        "log_masses": np.stack([np.log(np.exp(log_q[:, c]).sum(1)) for c in SETS], 1),
        "top_logprobs": log_q[rows, order],
        "argmax": order[:, 0],
        "top_ids": order,
    }


def total64(x, numbers=NUMBERS, softcap=None):
    said = said64(x, softcap)
    return sum(
        (x["by"][n] * said[n].reshape(len(said[n]), -1) * x["mask"][:, None]).sum() for n in numbers
    )


def slopes64(x, numbers=NUMBERS, softcap=None, step=1e-6):
    """By name: the derivative of the total along one random direction, and the direction."""
    rng, found = np.random.default_rng(7), {}
    for name in ("hidden", "head", "bias", "temperature"):
        along = rng.normal(size=x[name].shape)
        ends = [total64(x | {name: x[name] + e * along}, numbers, softcap) for e in (step, -step)]
        found[name] = (along, (ends[0] - ends[1]) / (2 * step))
    return found


def ours(x, numbers=NUMBERS, dtype=jnp.float32, shape=(N,), **options):
    """(the numbers, gradients of their weighted sum by name)."""
    whole = lambda a: a.reshape(*shape, *a.shape[1:])

    def total(hidden, head, bias, temperature):
        said = linear_logprobs(
            whole(hidden), head, whole(jnp.asarray(x["ids"])), mask=whole(jnp.asarray(x["mask"])),
            sets=SETS, top_k=TOP, bias=bias, **options,
            temperature=whole(temperature) if temperature.ndim else temperature,
        )  # fmt: skip
        flat = {n: getattr(said, n).reshape(N, -1) for n in NUMBERS}
        return sum(jnp.sum(jnp.float32(x["by"][n]) * flat[n]) for n in numbers), said

    names = ("hidden", "head", "bias", "temperature")
    arrays = [jnp.asarray(x[n], jnp.float32 if n == "temperature" else dtype) for n in names]
    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))
    (_, said), slopes = run(*arrays)
    said = jax.tree.map(lambda a: np.asarray(a).reshape(N, *a.shape[len(shape) :]), said)
    return said, dict(zip(names, map(np.asarray, slopes), strict=True))


def compare(got, x, numbers=NUMBERS, softcap=None, tolerance=2e-5):
    said, slopes = got
    on = x["mask"]
    for name, want in said64(x, softcap).items():
        np.testing.assert_allclose(getattr(said, name)[on], want[on], rtol=2e-6, atol=2e-6)
        assert (getattr(said, name)[~on] == (-1 if name in ("argmax", "top_ids") else 0)).all()
    for name, (along, want) in slopes64(x, numbers, softcap).items():
        got = (slopes[name].astype(np.float64) * along).sum()
        scale = max(1.0, np.abs(slopes[name] * along).sum())
        np.testing.assert_allclose(got, want, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_numbers_and_gradients_equal_float64(implementation):
    x = make()
    compare(ours(x, softcap=3.0, implementation=implementation), x, softcap=3.0)


def test_a_temperature_per_token_and_a_chunk_that_divides_nothing():
    x = make() | {"temperature": np.linspace(0.6, 3.0, N)}
    spoiled = x | {"hidden": np.where(x["mask"][:, None], x["hidden"], np.nan)}
    said, slopes = ours(spoiled, chunk=7)
    compare((said, slopes), x)
    assert not slopes["hidden"][~x["mask"]].any()
    assert not slopes["temperature"][~x["mask"]].any()


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_a_temperature_under_the_mask_may_be_anything(implementation):
    x = make() | {"temperature": np.linspace(0.6, 3.0, N)}
    off = np.flatnonzero(~x["mask"])
    spoiled = x | {"temperature": x["temperature"].copy()}
    spoiled["temperature"][off] = np.resize([0.0, np.nan, -1.0, np.inf], len(off))
    assert len(off) > 3
    options = {"implementation": implementation}
    got, want = (ours(y, **options) for y in (spoiled, x))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert not got[1]["hidden"][off].any() and not got[1]["temperature"][off].any()


@pytest.mark.parametrize("name", NUMBERS)
def test_each_number_has_a_gradient_of_its_own(name):
    x = make(1)
    compare(ours(x, numbers=(name,)), x, numbers=(name,))


def test_one_pass_of_an_accelerator_equals_float64(monkeypatch):
    monkeypatch.setattr(choice, "reads_in_passes", lambda device: False)
    x = make()
    compare(ours(x, chunk=5), x)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gpus_kernel_equals_float64(interpreted_gpu, softcap):
    """The whole way, value and gradient: what a GPU would be given, run on a CPU."""
    x = make()
    compare(ours(x, softcap=softcap), x, softcap=softcap)


@pytest.mark.floor
def test_a_mesh_with_the_vocabulary_split_changes_nothing(mesh8):
    x = make()
    compare(ours(x, chunk=4, mesh=mesh8, softcap=3.0, shape=(8, 3)), x, softcap=3.0)


@pytest.mark.floor
def test_inside_a_shard_map_of_ones_own():
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    mesh = jax.make_mesh((2, 4), ("rows", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = make()
    x |= {"head": x["head"][:52], "ids": np.minimum(x["ids"], 51)}
    hidden, head, ids = jnp.float32(x["hidden"]), jnp.float32(x["head"]), jnp.asarray(x["ids"])
    masks = np.zeros((2, 52), bool)
    masks[0, [0, 5, 9]] = masks[1, 40:] = True

    def total(hidden, head, ids, masks, **options):
        said = linear_logprobs(hidden, head, ids, sets=masks, chunk=5, temperature=0.7, **options)
        return jnp.sum(said.logprobs) + jnp.sum(said.entropy * said.log_masses[:, 1]), said.argmax

    def local(hidden, head, ids, masks):
        grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
        (value, top), (by_hidden, by_head) = grad(hidden, head, ids, masks, vocab_axes="model")
        return jax.lax.psum(value, "rows"), top, by_hidden, jax.lax.psum(by_head, "rows")

    tokens, vocab = jax.P("rows"), jax.P("model")
    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(tokens, vocab, tokens, jax.P(None, "model")),
        out_specs=(jax.P(), tokens, tokens, vocab), check_vma=False,
    )  # fmt: skip
    got = jax.jit(spread)(hidden, head, ids, jnp.asarray(masks))
    plain = functools.partial(total, implementation="reference")
    plain = jax.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))
    (value, top), slopes = plain(hidden, head, ids, jnp.asarray(masks))
    np.testing.assert_allclose(got[0], value, rtol=2e-6)
    np.testing.assert_array_equal(got[1], top)
    for ours, want in zip(got[2:], slopes, strict=True):
        np.testing.assert_allclose(ours, want, atol=2e-5)


@pytest.mark.floor
def test_bfloat16_keeps_float32_arithmetic():
    x = make()
    rounded = {
        n: np.asarray(jnp.asarray(x[n], jnp.bfloat16), np.float64)
        for n in ("hidden", "head", "bias")
    }
    said, slopes = ours(x, dtype=jnp.bfloat16)  # logits are float32 unless told
    compare((said, slopes), x | rounded, tolerance=1e-2)
    assert slopes["hidden"].dtype == slopes["head"].dtype == jnp.bfloat16


def test_float16_keeps_gradients_of_any_size():
    """At a cotangent of 1e-6 the slopes lie below the least float16, at 1e6 beyond the most."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float16) for s in ((8, D), (203, D)))
    ids, by = rng.integers(0, 203, 8), 1 + rng.random(8)
    h, w = np.float64(hidden), np.float64(head)
    q = np.exp(h @ w.T)
    slope = by[:, None] * (np.eye(203)[ids] - q / q.sum(1, keepdims=True))
    slopes = jax.jit(
        jax.grad(lambda head, by: jnp.sum(by * linear_logprobs(hidden, head, ids).logprobs))
    )
    for size in (1e-6, 1.0, 1e6):
        got = slopes(jnp.float32(head), jnp.float32(by * size)) / size
        np.testing.assert_allclose(got, slope.T @ h, atol=2e-3 * np.abs(slope.T @ h).max())


def test_masses_too_small_for_a_float_and_logits_of_300():
    head = jnp.float32([[300.0], [100.0], [99.0], [-300.0]])
    said = linear_logprobs(jnp.ones((1, 1)), head, jnp.array([3]), sets=[[1, 2], [3]])
    np.testing.assert_allclose(said.log_masses[0], [-200 + np.log1p(np.exp(-1)), -600], rtol=1e-6)
    by_head = jax.grad(
        lambda head: linear_logprobs(jnp.ones((1, 1)), head, sets=[[1, 2]]).log_masses.sum()
    )(head)
    np.testing.assert_allclose(by_head[:, 0], [-1, 0.7310586, 0.2689414, 0], rtol=2e-5)


def test_what_a_sampler_kept_is_asked_for_by_ids():
    """log q of a token among the kept ones alone, and its slope, as the README's example has it."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(4, D)), rng.normal(size=(V, D))
    kept, T = np.array([[3, 7, 1], [9, 3, -1], [5, -1, -1], [0, 52, 4]]), 0.7

    def plain(head):
        z = np.where([[v in row for v in range(V)] for row in kept], hidden @ head.T / T, -np.inf)
        return (z[range(4), kept[:, 0]] - np.log(np.exp(z).sum(1))).sum()

    def chunked(head):
        ids = jnp.concatenate([kept[:, :1], kept], axis=1)
        log_q = linear_logprobs(jnp.float32(hidden), head, ids, temperature=T).logprobs
        return (log_q[:, 0] - jax.nn.logsumexp(log_q[:, 1:], axis=1, where=kept >= 0)).sum()

    value, slope = jax.jit(jax.value_and_grad(chunked))(jnp.float32(head))
    np.testing.assert_allclose(value, plain(head), rtol=1e-6)
    along, step = rng.normal(size=(V, D)), 1e-6
    want = (plain(head + step * along) - plain(head - step * along)) / (2 * step)
    np.testing.assert_allclose((slope * along).sum(), want, rtol=1e-5)


def test_ids_that_are_no_tokens_where_they_are_traced():
    hidden, head = jnp.ones((2, 1)), jnp.ones((4, 1))
    said = jax.jit(lambda ids: linear_logprobs(hidden, head, ids))(jnp.array([-100, 4]))
    np.testing.assert_array_equal(said.logprobs, [0.0, np.nan])
    masses = jax.jit(lambda c: linear_logprobs(hidden, head, sets=[c]).log_masses)
    assert (masses(jnp.array([9])) == -np.inf).all()
    np.testing.assert_allclose(masses(jnp.array([2, 9, -1, 2])), np.log(1 / 4), rtol=1e-6)


@pytest.mark.floor
def test_vmap_remat_and_scan_keep_the_gradient():
    x = make()
    head, ids = jnp.float32(x["head"]), jnp.asarray(x["ids"][:, 0])
    loss = lambda hidden: jnp.sum(linear_logprobs(hidden, head, ids, chunk=8).logprobs ** 2)
    hidden = jnp.float32(x["hidden"])
    plain = jax.jit(jax.grad(loss))(hidden)
    both, near = jnp.stack([hidden, hidden]), {"atol": 1e-6 * float(jnp.abs(plain).max())}
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(loss)))(both)[1], plain, **near)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.checkpoint(loss)))(hidden), plain, **near)
    total = lambda both: jax.vmap(loss)(both).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(total))(both)[1], plain, **near)


@pytest.mark.floor
def test_no_buffer_of_tokens_times_vocabulary():
    tokens, vocab = 512, 2048
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)

    def loss(hidden, head, ids):
        said = linear_logprobs(hidden, head, ids, sets=[[1, 2]], top_k=4, chunk=32)
        return sum(jnp.sum(a) for a in said if jnp.issubdtype(a.dtype, jnp.floating))

    ids = jax.ShapeDtypeStruct((tokens, 2), jnp.int32)
    compiled = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        .lower(shape(tokens, 16), shape(vocab, 16), ids)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 2
    assert f"[{tokens},{vocab}]" not in compiled.as_text()


@pytest.mark.floor
def test_no_head_crosses_the_mesh(mesh8):
    """Tokens are brought together; the heads' rows and what is of their number stay."""
    vocab = 648
    place = lambda *axes: jax.NamedSharding(mesh8, jax.P(*axes))
    shape = lambda spec, dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=place(*spec))
    whole = (("data", "fsdp"), None, None)
    hidden = shape(whole, jnp.float32, 8, 8, 16)
    head = shape((("tensor", "fsdp"), None), jnp.float32, vocab, 16)
    ids, logprobs = shape(whole, jnp.int32, 8, 8, 4), shape(whole, jnp.float32, 8, 8, 4)

    taught, width = 712, 24
    states = shape(whole, jnp.float32, 8, 8, width)
    teacher = shape((("tensor", "fsdp"), None), jnp.float32, taught, width)
    shared = np.arange(0, 500, 5)

    def loss(hidden, head, ids, logprobs, states, teacher):
        said = linear_logprobs(hidden, head, ids, sets=[[1, 2]], chunk=8, mesh=mesh8)
        known = linear_divergence(
            hidden, head, teacher_ids=ids, teacher_logprobs=logprobs, chunk=8, mesh=mesh8
        )[0]
        mapped = linear_divergence(
            hidden, head, states, teacher, student_columns=shared, teacher_columns=shared,
            other_columns="bucket", chunk=8, mesh=mesh8,
        )[0]  # fmt: skip
        said = jnp.mean(said.logprobs) + jnp.mean(said.log_masses * said.entropy[..., None])
        return known + mapped + said

    compiled = jax.jit(
        jax.grad(loss, argnums=(0, 1)), out_shardings=(hidden.sharding, head.sharding)
    )
    text = compiled.lower(hidden, head, ids, logprobs, states, teacher).compile().as_text()
    gathered = [
        line.split(" all-gather(")[0] for line in text.splitlines() if " all-gather(" in line
    ]
    assert gathered, "tokens are brought together"
    rows = [str(whole // parts) for whole in (vocab, taught) for parts in (1, 2, 4)]
    assert not [
        line for line in gathered for count in rows if f"[{count}," in line or f",{count}" in line
    ]
    assert f"[64,{vocab}]" not in text and f"[64,{taught}]" not in text


def test_padding_between_devices_is_none_of_the_most_likely():
    """As on a GPU, where each device's rows end in columns that no token has."""
    low = stats.LOWEST
    logits = jnp.array([[1.0, 2.0, 3.0, low, low, low], [4.0, low, low, low, low, low]])

    def largest(mine):
        offset = jax.lax.axis_index("model") * 3
        return logprob_rows.largest(mine, 6, VocabularyShard(("model",), offset, 3, padded=True))[1]

    mesh = jax.sharding.Mesh(jax.devices()[:2], ("model",))
    split = jax.shard_map(
        largest, mesh=mesh, in_specs=(P("model"),), out_specs=P(), check_vma=False
    )
    assert jax.jit(split)(logits).tolist() == [[3, 2, 1, 0, 4, 5]]


@pytest.mark.parametrize("chunk", [None, 3])
def test_no_tokens_at_all_are_no_fault(chunk):
    hidden, head, ids = jnp.ones((0, 4, D)), jnp.ones((V, D)), jnp.zeros((0, 4, K), int)

    def loss(hidden, head):
        said = linear_logprobs(hidden, head, ids, sets=SETS, top_k=TOP, chunk=chunk)
        known = {"teacher_ids": ids, "teacher_logprobs": jnp.zeros(ids.shape)}
        return said.logprobs.sum() + linear_divergence(hidden, head, **known, chunk=chunk)[0], said

    (value, said), slopes = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)
    assert value == 0 and said.entropy.shape == (0, 4) and said.log_masses.shape == (0, 4, 3)
    assert slopes[0].shape == hidden.shape
    np.testing.assert_array_equal(slopes[1], np.zeros((V, D)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": jnp.array([0, 53])}, "53 is no token of a vocabulary of 53"),
        ({"ids": jnp.array([0.0, 1.0])}, "must be integers"),
        ({"ids": jnp.zeros((3,), int)}, "ids"),
        ({"sets": []}, "at least one set"),
        ({"sets": [[]]}, "one or more"),
        ({"sets": [[3, 1]]}, "3 is followed by 1"),
        ({"sets": [[1, 1]]}, "1 is followed by 1"),
        ({"sets": [[1, 53]]}, "within 0 to V - 1 = 52"),
        ({"sets": [np.zeros(V, bool)]}, "empty"),
        ({"sets": np.zeros((1, V - 1), bool)}, "a mask must be"),
        ({"head": jnp.ones((0, D)), "ids": None}, r"head \[0, 8\]: V and D must be at least 1"),
        ({"vocab_axes": "model"}, "no shard_map around this call has an axis 'model'"),
        ({"mesh": jax.make_mesh((1,), ("x",))}, "mesh has the axes x: it must have data, fsdp"),
        ({"top_k": 54}, "top_k = 54: must be a whole number, from 0 to 53"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": jnp.float32(-1)}, "temperature"),
        ({"temperature": jnp.ones(2, bool)}, "temperature"),
        ({"temperature": jnp.ones(3)}, "temperature"),
        ({"temperature": np.array([1.0, 0.0])}, "temperature holds 0.0: must be positive"),
        ({"mask": jnp.ones(3)}, "mask"),
        ({"mask": np.array(["a", "b"])}, "mask is no array"),
        ({"chunk": 0}, "chunk = 0: must be a whole number"),
        ({"logits_dtype": "int32"}, "logits_dtype = int32"),
        ({"logits_dtype": "float99"}, "logits_dtype = float99"),
        ({"hidden": jnp.ones((2, D), int)}, "hidden is int32: must be of a float type"),
        ({"bias": jnp.ones(3)}, "bias"),
        ({"softcap": -1.0}, "softcap = -1.0: must be positive"),
        ({"head": jnp.ones((V, D + 1))}, "head"),
        ({"implementation": "mosaic_gpu"}, "mosaic_gpu' cannot run"),
        ({"implementation": "reference", "vocab_axes": "model"}, "a whole head"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, words):
    arguments = {"hidden": jnp.ones((2, D)), "head": jnp.ones((V, D)), "ids": jnp.array([0, 1])}
    with pytest.raises(ValueError, match=words):
        linear_logprobs(**(arguments | change))


@pytest.mark.parametrize("sets", [3, [[[1], [2, 3]]]])
def test_what_is_no_list_of_sets_is_named(sets):
    """Under test every public function checks its annotations first."""
    with pytest.raises(ValueError, match="must be a list of sets"):
        inspect.unwrap(columns_of)(sets, V, shared=False)


def test_axes_of_type_explicit_are_named():
    """JAX's default for a mesh: the kernels leave to the compiler how results are split."""
    axes = ("data", "fsdp", "tensor", "context")
    mesh = jax.make_mesh((1, 2, 1, 1), axes, axis_types=(jax.sharding.AxisType.Explicit,) * 4)
    plain = jax.make_mesh((1, 2, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    hidden, head, ids = jnp.ones((4, 3)), jnp.ones((6, 3)), jnp.zeros(4, int)
    split = lambda mesh: jax.device_put(head, NamedSharding(mesh, P("fsdp")))
    with pytest.raises(ValueError, match="head is split over 'fsdp', whose type is Explicit"):
        linear_logprobs(hidden, split(mesh), ids)
    with pytest.raises(ValueError, match="teacher_head is split over 'fsdp'"):
        linear_divergence(hidden, head, hidden, split(mesh))
    with pytest.raises(ValueError, match="mesh has axes whose type is Explicit: give every axis"):
        linear_logprobs(hidden, head, ids, mesh=mesh)
    np.testing.assert_allclose(linear_logprobs(hidden, split(plain), ids).logprobs, -np.log(6))
