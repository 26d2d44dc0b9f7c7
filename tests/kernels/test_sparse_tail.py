"""The drawn token and a rest that is given, against float64 NumPy: value and every gradient.

By the shapes and devices that meet in a run: masks over NaN, chunks and a mesh that divide nothing,
bfloat16, a temperature of each token, a shard_map of one's own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.kernels import linear_divergence, linear_logprobs

N, V, D = 24, 52, 8
KINDS = ("forward_kl", "generalized_reverse_kl")
NAMES = ("hidden", "head", "bias", "temperature")


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def make(vocab=V):
    """Of the drawn tokens some are among the known ones, and some are none."""
    rng = np.random.default_rng(3)
    log_p = log_softmax(2 * rng.normal(size=(N, vocab)))
    ids = np.argsort(-log_p, axis=1)[:, [3, 0, 4, 2, 1]]
    drawn = rng.integers(0, vocab, N)
    drawn[:4], drawn[4:7] = ids[:4, 2], -1
    known = np.take_along_axis(log_p, ids, 1)
    return {
        "hidden": rng.normal(size=(N, D)),
        "head": rng.normal(size=(vocab, D)),
        "bias": rng.normal(size=vocab),
        "temperature": np.array(1.7),
        "ids": ids,
        "logprobs": known,
        "rest": 0.97 * (1 - np.exp(known).sum(1)),  # not what the known ones leave
        "drawn": drawn,
        "drawn_logprobs": log_p[np.arange(N), drawn],
        "mask": (rng.random(N) < 0.7) * rng.choice([1.0, 0.5], N),
    }


def loss64(x, kind, at=None, softcap=None):
    """The definition in float64, from [N, V] in full; `at` holds the constants of another point."""
    T = np.broadcast_to(x["temperature"], N)
    s = x["hidden"] @ x["head"].T + x["bias"]
    if softcap:
        s = softcap * np.tanh(s / softcap)
    log_q = log_softmax(s / T[:, None])
    lq, lp = np.take_along_axis(log_q, x["ids"], 1), x["logprobs"]
    q, p = np.exp(lq), np.exp(lp)
    if kind == "forward_kl":
        others = np.ones(log_q.shape, bool)
        np.put_along_axis(others, x["ids"], False, 1)
        rest_q = (np.exp(log_q) * others).sum(1)
        value = (p * (lp - lq)).sum(1) + x["rest"] * np.log(x["rest"] / rest_q)
        assert (value > 0).all(), (
            "a KL of less than a whole row may be below 0, and is then cut off"
        )
    else:
        last = log_q[np.arange(N), x["drawn"]]
        held = last - x["drawn_logprobs"], last, q.sum(1)
        gap, start, mass = at or held
        some = x["drawn"] >= 0
        counts = some & ~(x["ids"] == x["drawn"][:, None]).any(1)
        value = (q * (lq - lp) - q + p).sum(1) + counts * gap * (1 + last - start)
        value += some * (mass - p.sum(1))
        at = held
    return (T**2 * value * x["mask"]).sum() / x["mask"].sum(), at


def ours(x, kind, dtype=jnp.float32, shape=(N,), call=linear_divergence, **options):
    """(loss, gradients by name); where the mask is 0, all that is per token is NaN or no token."""
    off = x["mask"] == 0
    assert off.sum() > 3
    spoiled = {
        n: np.array(x[n], np.float32) for n in ("hidden", "logprobs", "rest", "drawn_logprobs")
    }
    for array in spoiled.values():
        array[off] = np.nan
    spoiled["drawn_logprobs"][x["drawn"] < 0] = np.nan  # of none
    temperature = np.float32(x["temperature"])
    if temperature.ndim:
        temperature = np.where(off, np.nan, temperature)
    ids, drawn = np.where(off[:, None], vocab_of(x) + 9, x["ids"]), np.where(off, 10**6, x["drawn"])
    whole = lambda a: jnp.asarray(a).reshape(*shape, *np.shape(a)[1:])
    known = {
        "teacher_ids": ids,
        "teacher_logprobs": spoiled["logprobs"],
        "mask": np.float32(x["mask"]),
    }
    if kind == "forward_kl":
        known["teacher_rest"] = spoiled["rest"]
    else:
        known |= {"sampled_ids": drawn, "sampled_logprobs": spoiled["drawn_logprobs"]}

    def loss(hidden, head, bias, temperature, known):
        return call(
            whole(hidden), head, student_bias=bias, kind=kind,
            temperature=whole(temperature) if temperature.ndim else temperature,
            **{n: whole(a) for n, a in known.items()}, **options,
        )[0]  # fmt: skip

    arrays = [jnp.asarray(a, dtype) for a in (spoiled["hidden"], x["head"], x["bias"])]
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    value, slopes = run(*arrays, jnp.asarray(temperature), known)
    return value, dict(zip(NAMES, map(np.asarray, slopes), strict=True))


def vocab_of(x):
    return len(x["head"])


def compare(got, x, kind, tolerance=1e-5, softcap=None):
    value, slopes = got
    want, at = loss64(x, kind, softcap=softcap)
    np.testing.assert_allclose(value, want, rtol=2e-6)
    assert not slopes["hidden"][x["mask"] == 0].any()
    rng, step = np.random.default_rng(7), 1e-6
    for name in NAMES:
        along = rng.normal(size=x[name].shape)
        ends = [
            loss64(x | {name: x[name] + e * along}, kind, at, softcap)[0] for e in (step, -step)
        ]
        slope = slopes[name].astype(np.float64) * along
        np.testing.assert_allclose(
            slope.sum(), (ends[0] - ends[1]) / (2 * step), err_msg=name,
            atol=tolerance * max(1, abs(slope).sum()),
        )  # fmt: skip


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_equal_float64(kind, implementation):
    """Of an odd vocabulary and capped logits, in chunks that divide nothing."""
    x = make(53)
    options = {"implementation": implementation} if implementation else {"chunk": 7}
    compare(ours(x, kind, student_softcap=3.0, **options), x, kind, softcap=3.0)


@pytest.mark.floor
def test_bfloat16_keeps_float32_arithmetic():
    x = make(53)
    rounded = {n: np.asarray(jnp.asarray(x[n], jnp.bfloat16), np.float64) for n in NAMES[:3]}
    got = ours(x, KINDS[1], dtype=jnp.bfloat16, logits_dtype=jnp.float32)
    compare(got, x | rounded, KINDS[1], tolerance=1e-2)


@pytest.mark.floor
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_with_the_vocabulary_split_and_a_temperature_per_token(mesh8, kind):
    """53 columns over devices that do not divide them."""
    x = make(53) | {"temperature": np.linspace(0.7, 2.5, N)}
    compare(ours(x, kind, chunk=2, mesh=mesh8, shape=(8, 3)), x, kind)


@pytest.mark.floor
@pytest.mark.parametrize("kind", KINDS)
def test_inside_a_shard_map_of_ones_own_with_a_temperature_per_token(kind):
    """vocab_axes: each device brings its rows of the head, ids count over all of them."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    mesh = jax.make_mesh((2, 4), ("rows", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = make() | {"temperature": np.linspace(0.7, 2.5, N)}
    tokens, vocab = jax.P("rows"), jax.P("model")

    @jax.custom_vjp
    def call(hidden, head, bias, temperature, known):
        return forward(hidden, head, bias, temperature, known)[0]

    def forward(hidden, head, bias, temperature, known):
        def local(hidden, head, bias, temperature, known):
            loss = lambda hidden, head, bias, temperature: linear_divergence(
                hidden, head, student_bias=bias, temperature=temperature, kind=kind, chunk=5,
                reduction="sum", vocab_axes="model", **known,
            )[0]  # fmt: skip
            arrays = hidden, head, bias, temperature
            value, slopes = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*arrays)
            of_rows = lambda a: jax.lax.psum(a, "rows")
            return of_rows(value), (slopes[0], *map(of_rows, slopes[1:3]), slopes[3])

        spread = jax.shard_map(
            local, mesh=mesh, in_specs=(tokens, vocab, vocab, tokens, tokens),
            out_specs=(jax.P(), (tokens, vocab, vocab, tokens)), check_vma=False,
        )  # fmt: skip
        value, slopes = spread(hidden, head, bias, temperature, known)
        count = jnp.sum(known["mask"])
        return value / count, jax.tree.map(lambda a: a / count, slopes)

    call.defvjp(forward, lambda slopes, by: (*(by * a for a in slopes), None))

    def as_ours(hidden, head, *, student_bias, temperature, kind, **known):
        return call(hidden, head, student_bias, temperature, known), None

    compare(ours(x, kind, call=as_ours), x, kind)


def test_bfloat16_logits_are_off_by_what_their_rounding_can_move():
    """Each moves by 2^-8 of itself at most, and log q by the most that two of them can: 2^-7."""
    x = make()
    s = 5 * (x["hidden"] @ x["head"].T)
    most = np.abs(s).max(1) * 2.0**-7
    narrow = {"logits_dtype": jnp.bfloat16}
    arrays = jnp.float32(5 * x["hidden"]), jnp.float32(x["head"])
    said = linear_logprobs(*arrays, x["ids"], **narrow).logprobs
    want = np.take_along_axis(log_softmax(s), x["ids"], 1)
    error = np.abs(said - want)
    assert (error <= most[:, None] + 1e-4).all() and error.max() > most.max() / 8
    known = {"teacher_ids": x["ids"], "teacher_logprobs": np.float32(x["logprobs"])}
    value, _ = linear_divergence(*arrays, **known, **narrow)
    whole, _ = linear_divergence(*arrays, **known)
    assert 0 < abs(value - whole) <= most.mean() + 1e-4
    # The example of the docstring: logits of 20, of which one rounds down and one up.
    head = jnp.float32([[16.0624], [24.0626]])
    one = lambda **how: float(
        linear_logprobs(jnp.ones((1, 1)), head, np.array([0]), **how).logprobs[0]
    )
    assert 0.12 < abs(one(**narrow) - one()) <= 0.125
