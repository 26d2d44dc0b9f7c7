"""The family of divergences against float64 closed forms, limits and identities."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.errors import ConfigError

# Every divergence with its parameters, and its closed form of the probabilities in float64 numpy.
FAMILY = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {"weight": 0.9},
    "generalized_jsd": {"beta": 0.1},
    "skew_forward_kl": {"skew": 0.1},
    "skew_reverse_kl": {"skew": 0.1},
    "total_variation": {},
    "alpha_divergence": {"alpha": 0.4},
    "alpha_beta_divergence": {"alpha": 0.2, "beta": 0.7},
}


def _kl(a, b):
    terms = np.zeros_like(a)
    some = a > 0
    terms[some] = a[some] * np.log(a[some] / b[some])
    return terms.sum(-1)


def _oracle(name, q, p, parameter=None, second=None):
    """The definition of each divergence, written with probabilities."""
    if name == "forward_kl":
        return _kl(p, q)
    if name == "reverse_kl":
        return _kl(q, p)
    if name == "symmetric_kl":
        return (1 - parameter) * _kl(p, q) + parameter * _kl(q, p)
    if name == "generalized_jsd":
        mixture = parameter * p + (1 - parameter) * q
        return parameter * _kl(p, mixture) + (1 - parameter) * _kl(q, mixture)
    if name == "skew_forward_kl":
        return _kl(p, parameter * p + (1 - parameter) * q)
    if name == "skew_reverse_kl":
        return _kl(q, (1 - parameter) * p + parameter * q)
    if name == "alpha_divergence":
        return ((p**parameter * q ** (1 - parameter)).sum(-1) - 1) / (parameter * (parameter - 1))
    if name == "alpha_beta_divergence":
        a, b = parameter, second
        terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        return -terms.sum(-1) / (a * b)
    assert name == "total_variation"
    return 0.5 * np.abs(p - q).sum(-1)


def _softmax(logits, temperature=1.0):
    logits = np.asarray(logits, np.float64) / temperature
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def _logits(*shape, scale=3.0, seed=0):
    return scale * np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("name", FAMILY)
def test_the_order_of_the_vocabulary_does_not_matter(name):
    student, teacher = _logits(4, 23).astype(np.float32), _logits(4, 23, seed=1).astype(np.float32)
    order = np.random.default_rng(2).permutation(23)
    loss = lambda s, t: getattr(losses, name)(s, t, **FAMILY[name])
    slope = jax.grad(lambda s, t: loss(s, t).sum())
    np.testing.assert_allclose(
        loss(student[:, order], teacher[:, order]), loss(student, teacher), rtol=2e-6
    )
    np.testing.assert_allclose(
        slope(student[:, order], teacher[:, order]), slope(student, teacher)[:, order], atol=1e-6
    )


@pytest.mark.parametrize("name", FAMILY)
def test_at_high_temperature_every_divergence_is_a_squared_distance_of_logits(name):
    """T^2 D tends to c / (2 V) sum_v d_v^2 with d the centred difference; total variation to T."""
    vocab, temperature = 23, 1e4
    factor = {
        "generalized_jsd": 0.1 * 0.9,
        "skew_forward_kl": 0.9**2,
        "skew_reverse_kl": 0.9**2,
        "alpha_beta_divergence": vocab ** (1 - 0.9),
    }.get(name, 1.0)
    with jax.enable_x64(True):
        student, teacher = jnp.asarray(_logits(4, vocab)), jnp.asarray(_logits(4, vocab, seed=1))
        loss = lambda s: getattr(losses, name)(s, teacher, temperature=temperature, **FAMILY[name])
        value, slope = (
            np.asarray(loss(student)),
            np.asarray(jax.grad(lambda s: loss(s).sum())(student)),
        )
    difference = np.asarray(student) - np.asarray(teacher)
    difference -= difference.mean(-1, keepdims=True)
    if name == "total_variation":
        wanted = np.abs(difference).sum(-1) / (2 * vocab)
        np.testing.assert_allclose(value / temperature, wanted, rtol=1e-2)
        return
    np.testing.assert_allclose(
        value, factor * np.square(difference).sum(-1) / (2 * vocab), rtol=1e-2
    )
    np.testing.assert_allclose(slope, factor * difference / vocab, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", FAMILY)
def test_bfloat16_logits_of_a_large_vocabulary(name):
    """Float32 inside costs nothing beside the rounding of the logits, which is the bound."""
    vocab = 151_936
    student, teacher = _logits(2, vocab, scale=2.5), _logits(2, vocab, scale=2.5, seed=1)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)]
    loss = lambda s, t: getattr(losses, name)(s, t, **FAMILY[name])
    value, slope = jax.jit(lambda s, t: (loss(s, t), jax.grad(lambda s: loss(s, t).sum())(s)))(
        *rounded
    )
    of = lambda pair: [_softmax(np.asarray(x, np.float64)) for x in pair]
    same, exact = of(rounded), of((student, teacher))
    parameters = FAMILY[name].values()
    np.testing.assert_allclose(value, _oracle(name, *same, *parameters), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(value, _oracle(name, *exact, *parameters), rtol=4e-3, atol=4e-3)
    assert value.dtype == jnp.float32 and slope.dtype == jnp.bfloat16
    # A row of the gradient adds up to 0; bfloat16 keeps 8 bits of each of its entries.
    slope = np.asarray(slope, np.float64)
    np.testing.assert_array_less(np.abs(slope.sum(-1)), 2**-8 * np.abs(slope).sum(-1) + 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", FAMILY)
def test_value_is_the_float64_definition(name, temperature):
    student, teacher = _logits(4, 3, 11), _logits(4, 3, 11, seed=1)
    values = getattr(losses, name)(
        student.astype(np.float32),
        teacher.astype(np.float32),
        temperature=temperature,
        **FAMILY[name],
    )
    q, p = _softmax(student, temperature), _softmax(teacher, temperature)
    wanted = temperature**2 * _oracle(name, q, p, *FAMILY[name].values())
    assert values.shape == (4, 3) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILY)
def test_gradients_of_both_sides_are_finite_differences_of_the_definition(name):
    student, teacher, temperature, step = _logits(9), _logits(9, seed=1), 1.7, 1e-6

    def oracle(student, teacher, temperature):
        q, p = _softmax(student, temperature), _softmax(teacher, temperature)
        return temperature**2 * _oracle(name, q, p, *FAMILY[name].values())

    def difference(argument, index):
        def at(shift):
            values = [student.copy(), teacher.copy(), np.array([temperature])]
            values[argument][index] += shift
            return oracle(values[0], values[1], values[2][0])

        return (at(step) - at(-step)) / (2 * step)

    with jax.enable_x64(True):

        def ours(student, teacher, temperature):
            return getattr(losses, name)(student, teacher, temperature=temperature, **FAMILY[name])

        gradients = jax.grad(ours, argnums=(0, 1, 2))(
            jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(temperature)
        )
    for argument, gradient in enumerate(gradients):
        wanted = [difference(argument, i) for i in range(gradient.size)]
        np.testing.assert_allclose(np.ravel(gradient), wanted, rtol=1e-6, atol=1e-8)


def test_forward_is_teacher_first():
    # The teacher gives the second entry nothing; only KL(student || teacher) minds.
    student, teacher = jnp.zeros(2), jnp.array([0.0, -jnp.inf])
    np.testing.assert_allclose(losses.forward_kl(student, teacher), np.log(2), rtol=1e-6)
    assert losses.reverse_kl(student, teacher) == jnp.inf


@pytest.mark.parametrize("name", FAMILY)
def test_equal_logits_give_zero_and_no_gradient(name):
    logits = jnp.asarray(_logits(5, 13), jnp.float32)
    value, gradient = jax.value_and_grad(
        lambda student: getattr(losses, name)(student, logits, **FAMILY[name]).sum()
    )(logits)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILY)
@hypothesis.given(
    shift=st.floats(-50, 50), seed=st.integers(0, 2**16), temperature=st.floats(0.25, 8.0)
)
@hypothesis.settings(max_examples=15)
def test_shifting_all_logits_changes_nothing_and_no_value_is_negative(
    name, shift, seed, temperature
):
    student, teacher = _logits(6, seed=seed), _logits(6, seed=seed + 1)
    loss = getattr(losses, name)
    plain = loss(student, teacher, temperature=temperature, **FAMILY[name])
    moved = loss(student + shift, teacher - shift, temperature=temperature, **FAMILY[name])
    assert plain >= -1e-6
    np.testing.assert_allclose(plain, moved, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", FAMILY)
def test_a_column_impossible_for_both_is_as_if_absent(name):
    student, teacher = _logits(3, 6).astype(np.float32), _logits(3, 6, seed=1).astype(np.float32)
    column = np.full((3, 1), -np.inf, np.float32)
    padded = [np.concatenate([logits, column], axis=-1) for logits in (student, teacher)]

    def loss(student, teacher, temperature):
        values = getattr(losses, name)(student, teacher, temperature=temperature, **FAMILY[name])
        return values.sum()

    run = jax.value_and_grad(loss, argnums=(0, 1, 2))
    value, gradients = run(jnp.asarray(student), jnp.asarray(teacher), 1.5)
    value_padded, gradients_padded = run(jnp.asarray(padded[0]), jnp.asarray(padded[1]), 1.5)
    np.testing.assert_allclose(value_padded, value, rtol=1e-6)
    for ours, wanted in zip(gradients_padded[:2], gradients[:2], strict=True):
        np.testing.assert_allclose(ours[:, :-1], wanted, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(ours[:, -1], 0.0)
    np.testing.assert_allclose(gradients_padded[2], gradients[2], rtol=1e-4)


@pytest.mark.parametrize("name", FAMILY)
def test_logits_300_apart_stay_finite_and_right(name):
    # exp(-600) is 0 in float32: log(softmax) would meet 0 * log 0.
    student = jnp.array([[300.0, -300.0, 0.0], [-300.0, 300.0, 299.0]])
    teacher = jnp.array([[300.0, -300.0, 1.0], [300.0, -300.0, -299.0]])
    value, gradient = jax.value_and_grad(
        lambda student: getattr(losses, name)(student, teacher, **FAMILY[name]).sum()
    )(student)
    q, p = _softmax(student), _softmax(teacher)
    np.testing.assert_allclose(
        value, _oracle(name, q, p, *FAMILY[name].values()).sum(), rtol=1e-5, atol=1e-6
    )
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", FAMILY)
def test_a_vocabulary_of_one_has_nothing_to_learn(name):
    loss = getattr(losses, name)
    value, gradient = jax.value_and_grad(lambda s: loss(s, jnp.ones((4, 1)), **FAMILY[name]).sum())(
        jnp.full((4, 1), 7.0)
    )
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", FAMILY)
def test_bfloat16_logits_are_raised_to_float32_first(name):
    student = jnp.asarray(_logits(4, 33), jnp.bfloat16)
    teacher = jnp.asarray(_logits(4, 33, seed=1), jnp.bfloat16)
    loss = getattr(losses, name)
    np.testing.assert_array_equal(
        loss(student, teacher, **FAMILY[name]),
        loss(student.astype(jnp.float32), teacher.astype(jnp.float32), **FAMILY[name]),
    )


@pytest.mark.parametrize("name", FAMILY)
def test_the_square_of_the_temperature_is_a_flag(name):
    student, teacher = _logits(4, 7), _logits(4, 7, seed=1)
    loss = getattr(losses, name)
    with_square = loss(student, teacher, temperature=3.0, **FAMILY[name])
    without = loss(student, teacher, temperature=3.0, scale_by_t2=False, **FAMILY[name])
    np.testing.assert_allclose(with_square, 9.0 * without, rtol=1e-6)


def test_the_square_keeps_the_gradient_as_temperature_grows():
    # T (q_T - p_T) tends to the centred difference of the logits over V.
    with jax.enable_x64(True):
        student = jnp.asarray(_logits(64, scale=0.1))
        teacher = jnp.asarray(_logits(64, scale=0.1, seed=1))
        gradient = {
            temperature: np.asarray(
                jax.grad(losses.forward_kl)(student, teacher, temperature=temperature)
            )
            for temperature in (1.0, 8.0, 1000.0)
        }
        difference = np.asarray((student - teacher) - (student - teacher).mean())
    np.testing.assert_allclose(gradient[1000.0], difference / 64, rtol=1e-2, atol=1e-6)
    norms = {temperature: np.linalg.norm(g) for temperature, g in gradient.items()}
    assert abs(norms[8.0] / norms[1.0] - 1) < 0.1


@pytest.mark.parametrize("traced", [False, True])
def test_endpoints_and_limits_of_the_generalized_jsd(traced):
    student, teacher = _logits(5, 9).astype(np.float32), _logits(5, 9, seed=1).astype(np.float32)

    def jsd(beta):
        def run(beta):
            return jax.value_and_grad(
                lambda s: losses.generalized_jsd(s, teacher, beta=beta).sum()
            )(jnp.asarray(student))

        return jax.jit(run)(beta) if traced else run(beta)

    for beta, limit in ((0.0, losses.forward_kl), (1.0, losses.reverse_kl)):
        wanted = jax.value_and_grad(lambda s, limit=limit: limit(s, teacher).sum())(
            jnp.asarray(student)
        )
        for ours, reference in zip(jsd(beta), wanted, strict=True):
            np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-6)
        # Just inside, D is small: only D over its weight comes near.
        inside, weight = jsd(abs(beta - 1e-3))[0], 1e-3
        np.testing.assert_allclose(inside / weight, wanted[0], rtol=0.2)
        assert inside < 0.1 * wanted[0]
    half = losses.generalized_jsd(student, teacher)
    np.testing.assert_allclose(half, losses.generalized_jsd(teacher, student), rtol=1e-6)
    assert half.max() < np.log(2)


@pytest.mark.parametrize(
    "name, parameter, same_as",
    [
        ("symmetric_kl", {"weight": 0.0}, "forward_kl"),
        ("symmetric_kl", {"weight": 1.0}, "reverse_kl"),
        ("skew_forward_kl", {"skew": 0.0}, "forward_kl"),
        ("skew_reverse_kl", {"skew": 0.0}, "reverse_kl"),
    ],
)
def test_parameters_at_their_ends_give_the_plain_directions(name, parameter, same_as):
    student, teacher = _logits(5, 9), _logits(5, 9, seed=1)
    np.testing.assert_allclose(
        getattr(losses, name)(student, teacher, **parameter),
        getattr(losses, same_as)(student, teacher),
        rtol=1e-5,
    )


def test_a_weight_of_zero_switches_off_an_infinite_direction():
    student, teacher = jnp.zeros(2), jnp.array([0.0, -jnp.inf])
    np.testing.assert_allclose(
        losses.symmetric_kl(student, teacher, weight=0.0), np.log(2), rtol=1e-6
    )


@pytest.mark.parametrize("name", FAMILY)
def test_jit_vmap_and_forward_mode_agree_with_the_plain_call(name):
    student = jnp.asarray(_logits(4, 7), jnp.float32)
    teacher = jnp.asarray(_logits(4, 7, seed=1), jnp.float32)
    parameters = {key: jnp.float32(value) for key, value in FAMILY[name].items()}

    def loss(student, teacher):
        return getattr(losses, name)(student, teacher, **parameters)

    plain = loss(student, teacher)
    np.testing.assert_allclose(jax.jit(loss)(student, teacher), plain, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(loss)(student, teacher), plain, rtol=1e-6)
    direction = jnp.asarray(_logits(4, 7, seed=2), jnp.float32)
    _, forward = jax.jvp(lambda s: loss(s, teacher).sum(), (student,), (direction,))
    backward = (jax.grad(lambda s: loss(s, teacher).sum())(student) * direction).sum()
    np.testing.assert_allclose(forward, backward, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"student_logits": np.zeros((2, 3)), "teacher_logits": np.zeros((2, 4))},
            r"\[2, 3\].*\[2, 4\]",
        ),
        ({"student_logits": 1.0, "teacher_logits": 1.0}, r"\[\.\.\., V\]"),
        ({"temperature": 0.0}, "temperature = 0.0: must be positive"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"beta": 1.5}, r"beta = 1.5: must be in \[0, 1\]"),
        ({"beta": -0.1}, r"beta = -0.1: must be in \[0, 1\]"),
    ],
)
def test_arguments_that_cannot_be_meant_raise(arguments, message):
    logits = {"student_logits": np.zeros((2, 3)), "teacher_logits": np.zeros((2, 3))}
    with pytest.raises(ConfigError, match=message):
        losses.generalized_jsd(**(logits | arguments))
