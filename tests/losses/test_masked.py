"""What a mask takes out has a slope of exactly 0, whatever it holds; what counts is not hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.errors import ConfigError

LABELS = jnp.array([0, 1, 2])
IDS = jnp.array([[0, 1], [1, 2], [2, 0]])
LOGPROBS = jnp.log(jnp.array([[0.5, 0.3], [0.6, 0.2], [0.4, 0.4]]))
OF_LOGITS = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "symmetric_kl": losses.symmetric_kl,
    "generalized_jsd": losses.generalized_jsd,
    "skew_forward_kl": losses.skew_forward_kl,
    "skew_reverse_kl": losses.skew_reverse_kl,
    "total_variation": losses.total_variation,
    "alpha_divergence": losses.alpha_divergence,
    "alpha_beta_divergence": losses.alpha_beta_divergence,
    "adaptive_kl": losses.adaptive_kl,
    "alphanet": losses.alphanet,
    "decoupled_kl": lambda s, t: losses.decoupled_kl(s, t, LABELS),
    "smoothed_forward_kl": losses.smoothed_forward_kl,
    "logit_mse": losses.logit_mse,
    "detached_skew_reverse_kl": losses.detached_skew_reverse_kl,
    "taid": lambda s, t: losses.taid(s, t, 0.5),
    "cross_entropy": lambda s, t: losses.cross_entropy(s, LABELS, label_smoothing=0.1),
    "topk_kl": lambda s, t: losses.topk_kl(s, IDS, LOGPROBS + 0 * t[:, :2]),
    "topk_generalized_kl": lambda s, t: losses.topk_generalized_kl(s, IDS, LOGPROBS + 0 * t[:, :2]),
    "entropy": lambda s, t: losses.entropy(s),
    "log_mass": lambda s, t: losses.log_mass(s, [[0, 3], [1]]).sum(-1),
    "hidden_mse": losses.hidden_mse,
    "hidden_cosine": losses.hidden_cosine,
}
MASK = jnp.array([True, False, True])
FILLS = {
    "nan": [jnp.nan] * 4,
    "none": [-jnp.inf] * 4,
    "inf": [0.0, jnp.inf, 1.0, 0.0],
    "one": [0.0, -jnp.inf, 1.0, 0.0],
}


def states(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(3, 4)), jnp.float32)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_masked_row_has_no_slope(name):
    """Of all fills of either side at once, so that one program serves them."""

    @jax.jit
    @jax.vmap
    def slopes(student, teacher):
        value = lambda s, t: losses.masked_mean(OF_LOGITS[name](s, t), MASK).value
        return jax.value_and_grad(value, argnums=(0, 1))(student, teacher)

    s, t = states(0), states(1)
    pairs = [(s, t)]
    for fill in FILLS.values():
        row = jnp.array(fill)
        pairs += [
            (s.at[1].set(row), t),
            (s, t.at[1].set(row)),
            (s.at[1].set(row), t.at[1].set(row)),
        ]
    values, found = slopes(*(jnp.stack(x) for x in zip(*pairs, strict=True)))
    np.testing.assert_array_equal(values, values[0])
    for slope in found:
        np.testing.assert_array_equal(slope[:, 1], 0)
        np.testing.assert_array_equal(slope, jnp.broadcast_to(slope[0], slope.shape))


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_counted_row_of_nan_is_not_hidden(name):
    s = states(0).at[1].set(jnp.nan)
    value, slope = jax.value_and_grad(lambda s: OF_LOGITS[name](s, states(1)).sum())(s)
    assert np.isnan(value)
    assert not np.isfinite(slope[1]).any()
    assert np.isfinite(slope[0]).all()
    moved = jax.jvp(lambda s: OF_LOGITS[name](s, states(1)), (s,), (jnp.ones((3, 4)),))[1]
    assert not np.isfinite(moved[1])
    assert np.isfinite(moved[0])


def test_an_infinite_slope_stays_infinite_where_it_counts():
    teacher = states(1).at[1, 0].set(-jnp.inf)  # the student says what the teacher cannot
    slope = jax.grad(lambda s: losses.reverse_kl(s, teacher).sum())(states(0))
    assert not np.isfinite(slope[1]).all()
    assert np.isfinite(slope[0]).all()


def test_a_masked_temperature_may_be_zero():
    def value(s, T):
        return losses.masked_mean(losses.forward_kl(s, states(1), temperature=T), MASK).value

    T = jnp.array([1.0, 0.0, 2.0])
    found, slopes = jax.value_and_grad(value, argnums=(0, 1))(states(0), T)
    clean, want = jax.value_and_grad(value, argnums=(0, 1))(states(0), T.at[1].set(1.0))
    assert found == clean
    for slope, expected in zip(slopes, want, strict=True):
        np.testing.assert_array_equal(slope, expected)
        np.testing.assert_array_equal(slope[1], 0)
    assert np.isnan(losses.forward_kl(states(0), states(1), temperature=T)[1])


def test_entropy_and_mass_take_a_temperature_for_each_row():
    T, sets = jnp.array([0.5, 1.0, 3.0]), [[0, 3], [1]]
    square = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
    for given in (T, T[:, None]):
        want = [losses.entropy(row, temperature=t) for row, t in zip(square, T, strict=True)]
        np.testing.assert_allclose(losses.entropy(square, temperature=given), want, rtol=1e-6)
        want = [
            losses.log_mass(row, sets, temperature=t) for row, t in zip(states(0), T, strict=True)
        ]
        found = losses.log_mass(states(0), sets, temperature=given)
        np.testing.assert_allclose(found, want, rtol=1e-6)


def test_a_traced_set_of_no_token_has_no_mass_and_no_slope():
    mass = lambda s, one: losses.log_mass(s, [one])[..., 0]
    empty = jnp.zeros(4, bool)
    np.testing.assert_array_equal(jax.jit(mass)(states(0), empty), -np.inf)
    total = jax.jit(jax.grad(lambda s, one: mass(s, one).sum()))
    np.testing.assert_array_equal(total(states(0), empty), 0)


def test_relations_and_routing_pass_by_padding():
    segments = jnp.array([[1, 1, 1, 0]])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4)), jnp.float32)
    spoiled = x.at[0, 3].set(jnp.nan)

    def relations(x):
        return losses.relation_kl(x, 2 * x[..., ::-1], segments, heads=2).sum()

    want, found = jax.grad(relations)(x), jax.grad(relations)(spoiled)
    np.testing.assert_array_equal(found, want)
    mask = segments == 1
    balance = lambda x: losses.load_balancing(x[None], 2, mask)
    np.testing.assert_array_equal(balance(spoiled), balance(x))
    np.testing.assert_array_equal(jax.grad(balance)(spoiled), jax.grad(balance)(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, t: losses.forward_kl(s, t, temperature=jnp.ones(4)), "temperature"),
        (lambda s, t: losses.entropy(s, temperature=jnp.ones(4)), r"temperature \[4\]: must be"),
        (lambda s, t: losses.entropy(s, temperature=jnp.float32(0)), "temperature = 0"),
        (lambda s, t: losses.log_mass(s, [[0]], temperature=np.float32(-1)), "temperature = -1"),
        (lambda s, t: losses.log_mass(s, [[0]], temperature=jnp.ones(4)), "temperature"),
        (lambda s, t: losses.taid(s, t, jnp.ones(4)), "taid_t"),
        (lambda s, t: losses.taid(s, t, np.float32(2)), "taid_t = 2"),
        (lambda s, t: losses.skew_forward_kl(s, t, skew=jnp.ones(4)), "skew"),
        (lambda s, t: losses.generalized_jsd(s, t, beta=np.float32(3)), "beta = 3"),
        (lambda s, t: losses.adaptive_kl(s, t, mu=3.0), "mu = 3"),
        (lambda s, t: losses.adaptive_kl(s, t, temperature=np.float32(0)), "temperature = 0"),
        (lambda s, t: losses.alphanet(s, t, clip=float("nan")), "clip"),
        (lambda s, t: losses.decoupled_kl(s, t, LABELS, rest_weight=-1.0), "rest_weight = -1"),
        (lambda s, t: losses.decoupled_kl(s, t, LABELS * 1.0), "labels are float32"),
        (lambda s, t: losses.decoupled_kl(s, t, LABELS[:2]), "labels"),
        (lambda s, t: losses.cross_entropy(s, LABELS, label_smoothing=np.float32(2)), "smoothing"),
        (lambda s, t: losses.cross_entropy(s, LABELS, label_smoothing=jnp.ones(3)), "smoothing"),
    ],
)
def test_numbers_and_shapes_that_do_not_fit_are_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call(states(0), states(1))
