"""Divergences of whole rows: loops in float64, identities, hard logits, and the fused head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.kernels import choice, linear_divergence
from jaxdistill.losses import whole_rows


def logits(shape=(6, 23), seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape) * scale, jnp.float32) for _ in range(2))


def softmax(x):
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(a, b):
    return (a * np.log(a / b)).sum(-1)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, 1.0])
def test_adaptive_kl_is_the_loop_over_tokens(mu):
    student, teacher = logits()
    for row, value in enumerate(losses.adaptive_kl(student, teacher, mu=mu)):
        p, q = softmax(teacher[row]), softmax(student[row])
        head, mass = [], 0.0
        for place, token in enumerate(np.argsort(-p)):
            mass = min(mass + p[token], 1.0)
            if mass <= mu or place == 0:
                head.append(token)
        gap = np.abs(p - q)
        weight = gap[head].sum() / gap.sum()
        np.testing.assert_allclose(value, weight * kl(p, q) + (1 - weight) * kl(q, p), rtol=1e-5)


@pytest.mark.parametrize("mu", [0.0, 0.125, 0.3, 0.5, 0.75, 1.0])
def test_the_head_of_adaptive_kl_takes_ties_in_order(mu):
    # Powers of two: every sum is exact, and so is where the head ends.
    p = np.asarray([1, 8, 2, 8, 2, 0, 1, 8, 1, 1, 0, 0], np.float32) / 32
    head, mass = np.zeros(p.shape, bool), 0.0
    for place, token in enumerate(np.argsort(-p, kind="stable")):
        mass += p[token]
        head[token] = mass <= mu or place == 0
    np.testing.assert_array_equal(whole_rows._most_likely(jnp.asarray(p), mu), head)


def test_the_weights_of_adaptive_kl_carry_no_gradient():
    student, teacher = logits()
    p, q = softmax(teacher), softmax(student)
    order = np.argsort(-p, -1)
    tail = np.take_along_axis(p, order, -1).cumsum(-1) > 0.5
    tail[:, 0] = False
    gap = np.take_along_axis(np.abs(p - q), order, -1)
    weight = jnp.asarray((gap * tail).sum(-1) / gap.sum(-1), jnp.float32)

    def fixed(student):
        forward, reverse = losses.forward_kl(student, teacher), losses.reverse_kl(student, teacher)
        return ((1 - weight) * forward + weight * reverse).sum()

    ours = jax.jit(jax.grad(lambda s: losses.adaptive_kl(s, teacher).sum()))(student)
    np.testing.assert_allclose(ours, jax.jit(jax.grad(fixed))(student), atol=2e-6)


def test_decoupled_kl_adds_up_to_the_whole():
    """KL(p || q) = TCKD + (1 - p_y) NCKD."""
    student, teacher = logits()
    labels = jnp.arange(6) * 3
    rest = 1 - softmax(teacher)[np.arange(6), np.asarray(labels)]
    part = lambda **w: losses.decoupled_kl(student, teacher, labels, **w)
    tckd = part(target_weight=1.0, rest_weight=0.0)
    nckd = part(target_weight=0.0, rest_weight=1.0)
    np.testing.assert_allclose(tckd + rest * nckd, losses.forward_kl(student, teacher), rtol=2e-5)
    np.testing.assert_allclose(part(), tckd + 0.5 * nckd, rtol=1e-6)
    none = losses.decoupled_kl(student, teacher, jnp.full(6, -100))
    np.testing.assert_array_equal(none, 0)


def test_smoothing_the_target_is_the_definition():
    student, teacher = logits()
    p = 0.9 * softmax(teacher) + 0.1 / 23
    ours = losses.smoothed_forward_kl(student, teacher, target_smoothing=0.1)
    np.testing.assert_allclose(ours, kl(p, softmax(student)), rtol=1e-5)
    plain = losses.smoothed_forward_kl(student, teacher, target_smoothing=0.0)
    np.testing.assert_allclose(plain, losses.forward_kl(student, teacher), rtol=1e-6)


def test_alphanet_takes_the_larger_of_two_clipped_divergences():
    student, teacher = logits(scale=1.0)
    p, q = softmax(teacher), softmax(student)
    clipped = np.minimum((p / q) ** -1.0, 5.0)
    low = (q * (clipped - 1)).sum(-1) / 2
    value = losses.alphanet_value(student, teacher)
    np.testing.assert_allclose(value, np.maximum(low, kl(p, q)), rtol=1e-5)


@pytest.mark.parametrize("taid_t", [0.0, 0.4, 1.0])
def test_taid_mixes_logits_and_holds_the_student_still(taid_t):
    student, teacher = logits()
    s, t = (np.asarray(x, np.float64) for x in (student, teacher))
    p, q = softmax((1 - taid_t) * s + taid_t * t), softmax(s)
    value, slope = jax.value_and_grad(lambda x: losses.taid(x, teacher, taid_t).sum())(student)
    np.testing.assert_allclose(value, kl(p, q).sum(), rtol=1e-5, atol=2e-5)
    # With a leak through the target the slope would be another one, at 0.4 by a third.
    np.testing.assert_allclose(slope, q - p, atol=1e-6)


def test_logits_are_compared_as_they_are():
    student, teacher = logits()
    s, t = (np.asarray(x, np.float64) for x in (student, teacher))
    want = ((s - t) ** 2).mean(1)
    np.testing.assert_allclose(losses.logit_mse(student, teacher), want, rtol=1e-6)
    np.testing.assert_allclose(losses.logit_mse(student, teacher, temperature=3.0), want, rtol=1e-6)
    plain = losses.logit_mse(student, teacher, temperature=3.0, scale_by_t2=False)
    np.testing.assert_allclose(plain, want / 9, rtol=1e-6)
    spoiled = losses.logit_mse(student.at[0, 1].set(-jnp.inf), teacher.at[1, 2].set(-jnp.inf))
    for row, column in enumerate((1, 2)):
        left = np.delete((s - t)[row] ** 2, column).mean()
        np.testing.assert_allclose(spoiled[row], left, rtol=1e-6)


@pytest.mark.parametrize("gpu", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("name", ["logit_mse", "smoothed_forward_kl"])
def test_impossible_and_padded_columns_stay_so_at_any_temperature(name, gpu, monkeypatch):
    """By themselves and in the head loss, which divides by T first: 2 of 23 are impossible."""
    if gpu:  # whose heads are padded to tiles of 64 columns
        device = choice.Device("gpu", "NVIDIA H100 80GB HBM3")
        monkeypatch.setattr(choice, "current_device", lambda: device)
    student, teacher = logits()
    s, t = (np.asarray(x, np.float64)[:, :21] for x in (student, teacher))
    temperature = 8.0
    q, p = softmax(s / temperature), 0.9 * softmax(t / temperature) + 0.1 / 21
    of_mse = ((s - t) ** 2).mean(1)
    want = of_mse if name == "logit_mse" else temperature**2 * kl(p, q)
    for lowest in (-jnp.inf, -1e30):
        given = [x.at[:, 21:].set(lowest) for x in (student, teacher)]
        plain = getattr(losses, name)(*given, temperature=temperature)
        np.testing.assert_allclose(plain, want, rtol=1e-5)
        bias = jnp.where(jnp.arange(23) < 21, 0.0, lowest)
        value = lambda head, bias=bias: linear_divergence(
            jnp.eye(6), head, jnp.eye(6), teacher.T, kind=whole_rows.bound(name),
            temperature=temperature, implementation="xla", student_bias=bias, teacher_bias=bias,
        )[0]  # fmt: skip
        found, slope = jax.jit(jax.value_and_grad(value))(student.T)
        np.testing.assert_allclose(found, want.mean(), rtol=1e-5)
        by_s = temperature * (q - p) if name == "smoothed_forward_kl" else 2 * (s - t) / 21
        np.testing.assert_allclose(slope[:21].T, by_s / 6, atol=2e-6)
        np.testing.assert_array_equal(slope[21:], 0)


CASES = {
    "adaptive_kl": lambda s, t, y, **o: losses.adaptive_kl(s, t, **o),
    "alphanet": lambda s, t, y, **o: losses.alphanet(s, t, **o),
    "decoupled_kl": lambda s, t, y, **o: losses.decoupled_kl(s, t, y, **o),
    "detached_skew_reverse_kl": lambda s, t, y, **o: losses.detached_skew_reverse_kl(s, t, **o),
    "smoothed_forward_kl": lambda s, t, y, **o: losses.smoothed_forward_kl(s, t, **o),
    "logit_mse": lambda s, t, y, **o: losses.logit_mse(s, t, **o),
}


@pytest.mark.parametrize("name", CASES)
def test_the_teacher_itself_has_no_gradient_and_order_does_not_matter(name):
    student, teacher = logits()
    labels = jnp.arange(6)
    slope = jax.grad(lambda s: CASES[name](s, teacher, labels).sum())
    if name == "smoothed_forward_kl":
        p, q = 0.9 * softmax(teacher) + 0.1 / 23, softmax(teacher)
        np.testing.assert_allclose(slope(teacher), q - p, atol=1e-6)
    else:
        np.testing.assert_allclose(slope(teacher), 0, atol=2e-6)
    order = np.random.default_rng(1).permutation(23)
    moved = jnp.asarray(np.argsort(order))[labels]
    value = CASES[name](student, teacher, labels)
    shift = 0 if name == "logit_mse" else 7  # which counts what no distribution shows
    again = CASES[name](student[:, order] + shift, teacher[:, order] - shift, moved)
    np.testing.assert_allclose(again, value, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hard_logits_are_finite(name, dtype):
    student, teacher = (x.astype(dtype) for x in logits(scale=100.0))
    student = student.at[0, 0].set(300).at[1, 1].set(-300)
    student, teacher = (x.at[:, -2:].set(-jnp.inf) for x in (student, teacher))
    teacher = teacher.at[2].set(student[2])
    labels = jnp.arange(6)
    run = jax.value_and_grad(lambda s: CASES[name](s, teacher, labels, temperature=2.0).sum())
    value, slope = run(student)
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(slope, np.float32)).all()
    np.testing.assert_array_equal(np.asarray(slope, np.float32)[:, -2:], 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_nan_of_either_model_is_not_hidden(name, side):
    """A finite loss of a teacher that says NaN would train the student on nothing, unseen."""
    sides = dict(zip(("student", "teacher"), logits(), strict=True))
    sides[side] = sides[side].at[2, 5].set(jnp.nan)
    value = CASES[name](sides["student"], sides["teacher"], jnp.arange(6))
    assert np.isnan(value[2]) and np.isfinite(np.delete(np.asarray(value), 2)).all()


@pytest.mark.parametrize("name", ["decoupled_kl", "smoothed_forward_kl", "alphanet", "logit_mse"])
def test_gradients_are_finite_differences_in_float64(name):
    rng, step = np.random.default_rng(0), 1e-6
    labels = jnp.arange(4)
    with jax.enable_x64(True):
        at = tuple(jnp.asarray(2 * rng.normal(size=(4, 9))) for _ in range(2)) + (jnp.asarray(1.7),)
        more = {"scale_by_t2": False} if name == "logit_mse" else {}  # else T cancels out
        loss = lambda s, t, temperature: CASES[name](
            s, t, labels, temperature=temperature, **more
        ).sum()
        value = jax.jit(loss)
        if name == "alphanet":  # a surrogate: its slope is that of the unclipped divergence
            loss = lambda s, t, _: losses.alphanet(s, t, alphas=(-0.5, -0.5), clip=1e30).sum()
            value = jax.jit(
                lambda s, t, _: losses.alphanet_value(s, t, alphas=(-0.5, -0.5), clip=1e30).sum()
            )
        for argument in range(1 if name == "alphanet" else 3):
            slope = jax.jit(jax.grad(loss, argnums=argument))(*at)
            along = jnp.asarray(rng.normal(size=slope.shape))
            moved = lambda h, a=argument, d=along: value(
                *(x + h * d if i == a else x for i, x in enumerate(at))
            )
            numeric = (moved(step) - moved(-step)) / (2 * step)
            np.testing.assert_allclose((slope * along).sum(), numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_logits_of_a_large_vocabulary(name):
    rng = np.random.default_rng(0)
    student, teacher = (
        jnp.asarray(2.5 * rng.normal(size=(2, 151_936)), jnp.bfloat16) for _ in "st"
    )
    labels = jnp.array([5, 151_935])
    run = jax.jit(jax.value_and_grad(lambda s, t: CASES[name](s, t, labels).sum()))
    value, slope = run(student, teacher)
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(x, np.float64)) for x in (student, teacher))
        exact, exact_slope = run(*wide)
    np.testing.assert_allclose(value, exact, rtol=2e-5)
    largest = np.abs(exact_slope).max()
    np.testing.assert_allclose(
        np.asarray(slope, np.float64), exact_slope, rtol=2**-8, atol=2e-5 * largest
    )


@pytest.mark.parametrize("name", CASES)
def test_it_runs_in_the_fused_head_loss(name):
    rng = np.random.default_rng(0)
    hs, ws, ht, wt = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((20, 8), (31, 8), (20, 12), (31, 12))
    )
    labels, mask = jnp.arange(20), jnp.arange(20) % 3 > 0

    def fused(hs, ws):
        return linear_divergence(
            hs, ws, ht, wt, labels=labels, mask=mask, temperature=2.0, chunk=8,
            kind=whole_rows.bound(name),
        )[0]  # fmt: skip

    def plain(hs, ws):
        values = CASES[name](hs @ ws.T, ht @ wt.T, labels, temperature=2.0)
        return losses.masked_mean(values, mask).value

    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hs, ws) for f in (fused, plain))
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)
    assert whole_rows.bound(name) == whole_rows.bound(name)


@pytest.mark.parametrize(
    "call",
    [
        lambda s, t: losses.adaptive_kl(s, t, mu=1.5),
        lambda s, t: losses.alphanet(s, t, clip=0.0),
        lambda s, t: losses.smoothed_forward_kl(s, t, target_smoothing=-0.1),
        lambda s, t: losses.taid(s, t, 1.5),
        lambda s, t: losses.taid(s, t[:, :-1], 0.5),
        lambda s, t: losses.adaptive_kl(s, t, temperature=0.0),
        lambda s, t: losses.alpha_beta_divergence(s, t, alpha=0.0, beta=0.0),
        lambda s, t: losses.alpha_divergence(s, t, alpha=1.5),
        lambda s, t: whole_rows.bound("akl"),
        lambda s, t: whole_rows.bound("decoupled_kl")(s, t, None),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError):
        call(*logits())


@pytest.mark.parametrize("alphas", [(-1.0, 1.0), (0.0, 1.0), (-1.0, 0.5)])
def test_alphanet_pulls_across_gaps_that_float32_cannot_hold(alphas):
    s, t = jnp.array([[0.0, -90.0, -120.0]]), jnp.array([[-90.0, 0.0, -1.0]])
    run = jax.jit(jax.value_and_grad(lambda s, t: losses.alphanet(s, t, alphas=alphas).sum()))
    value, slope = run(s, t)
    with jax.enable_x64(True):
        want, wide = run(*(jnp.asarray(np.float64(x)) for x in (s, t)))
        want, wide = np.asarray(want), np.asarray(wide)
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(slope, wide, atol=1e-6)
    if 1.0 in alphas:
        np.testing.assert_allclose(slope, [[1.0, -0.7310586, -0.2689414]], rtol=1e-5)
