"""What the operations refuse by name, and labels and masks that take a token out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import divergence, linear_divergence, rows
from jaxdistill.kernels.linear_divergence import arguments

B, L, V, D = 4, 6, 9, 5
_rng = np.random.default_rng(0)
HIDDEN, HEAD = (jnp.asarray(_rng.normal(size=shape), jnp.float32) for shape in ((B, L, D), (V, D)))
LABELS, MASK = jnp.asarray(_rng.integers(0, V, (B, L))), jnp.asarray(_rng.random((B, L)) > 0.4)
T_TURNED = jnp.linspace(1, 3, B * L).reshape(L, B)

COMMON = [
    ({"labels": LABELS.T}, r"labels \[6, 4\] must be \[4, 6\]"),
    ({"labels": LABELS * 1.0}, "labels are float32: must be integers"),
    ({"labels": LABELS[..., None]}, "labels"),
    ({"mask": MASK.T}, r"mask \[6, 4\]"),
    ({"mask": MASK.reshape(-1)}, r"mask \[24\]"),
    ({"temperature": T_TURNED}, r"temperature \[6, 4\]"),
    ({"temperature": -1.0}, "temperature = -1.0: must be positive"),
    ({"temperature": 0}, "temperature = 0: must be positive"),
    ({"temperature": np.float32(0)}, "temperature"),
    ({"temperature": jnp.float32(-2)}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": np.full((B, L), -1.0)}, "temperature holds -1.0: must be positive"),
    ({"alpha": 7.0}, r"alpha = 7.0: must be in \[0, 1\]"),
    ({"alpha": -0.1}, "alpha"),
    ({"alpha": jnp.ones(V)}, r"alpha \[9\]: must be one number"),
    ({"label_smoothing": 3.0}, "label_smoothing = 3.0"),
    ({"taid_t": 5.0}, "taid_t = 5.0"),
    ({"kind": "generalized_jsd", "parameters": (1.5,)}, "beta = 1.5"),
    ({"kind": "generalized_jsd", "parameters": (np.float32(-0.5),)}, "beta"),
    ({"kind": "generalized_jsd", "parameters": (jnp.ones(3),)}, "parameters"),
    ({"kind": "forward_kl", "parameters": (0.5,)}, "takes 0 parameters"),
]
HEAD_LOSS = [
    ({"chunk": 0}, "chunk = 0: must be a whole number"),
    ({"student_softcap": -1.0}, "student_softcap = -1.0: must be positive"),
    ({"logits_dtype": "int32"}, "logits_dtype = int32"),
    ({"monitor": jnp.ones(3, bool)}, "monitor"),
    ({"labels": None, "teacher_hidden": None, "teacher_head": None, "alpha": 0.0}, "give labels"),
    ({"student_hidden": jnp.ones((B, L, D), jnp.int32)}, "student_hidden is int32"),
    ({"teacher_hidden": None, "teacher_head": None, "taid_t": 0.5}, "taid_t has no effect"),
]


def head_loss(**changes):
    given = {
        "student_hidden": HIDDEN,
        "student_head": HEAD,
        "teacher_hidden": HIDDEN * 1.1,
        "teacher_head": HEAD,
    }
    return linear_divergence(**given | {"labels": LABELS, "mask": MASK, "alpha": 0.5} | changes)


@pytest.mark.parametrize(("changes", "words"), COMMON + HEAD_LOSS)
def test_the_head_loss_names_what_does_not_fit(changes, words):
    with pytest.raises(ConfigError, match=words):
        head_loss(**changes)


def test_what_is_of_no_type_is_named_where_nothing_else_checks_types():
    """Under test every public function checks its annotations first."""
    teacher = (HIDDEN, HEAD, None)
    with pytest.raises(ConfigError, match="kind = 3: must be one of forward_kl, .*, or a function"):
        arguments.check_choices(3, (), "mean", (B, L), V, teacher, (None, None))
    with pytest.raises(ConfigError, match="monitor = 'no': must be a bool"):
        arguments.check_pieces(None, None, "no")


@pytest.mark.parametrize(("changes", "words"), COMMON)
def test_the_dense_loss_names_what_does_not_fit(changes, words):
    s, t = HIDDEN @ HEAD.T, HIDDEN @ HEAD.T * -3
    with pytest.raises(ConfigError, match=words):
        divergence(s, t, **{"labels": LABELS, "mask": MASK, "alpha": 0.5} | changes)


@pytest.mark.parametrize("kind", [kind for kind in rows.KINDS if rows.ENTRIES[kind]])
@pytest.mark.parametrize("wrong", [-0.1, 20.0, np.float32(-1), float("nan")])
def test_every_parameter_of_every_kind_is_checked(kind, wrong):
    count = len(rows.ENTRIES[kind])
    with pytest.raises(ConfigError, match="must"):
        rows.make(kind, *[wrong] * count)


def test_traced_numbers_cannot_be_looked_at_but_shapes_can():
    s, t = (HIDDEN @ HEAD.T)[0], (HIDDEN @ HEAD.T)[1]
    jax.eval_shape(lambda T: divergence(s, t, temperature=T), jnp.float32(-1))
    with pytest.raises(ConfigError, match="temperature"):
        jax.eval_shape(lambda T: divergence(s, t, temperature=T), jnp.ones(V))


IGNORED = jnp.array([1, 2, 3, 4, -100, -100])


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_a_label_of_minus_100_counts_nothing(alpha, implementation):
    def run(hidden, labels):
        given = {"labels": labels, "alpha": alpha, "implementation": implementation}
        return linear_divergence(hidden, HEAD, hidden[::-1] * 0.9, HEAD, **given)

    hidden = HIDDEN.reshape(-1, D)[:6]
    (value, means), slope = jax.value_and_grad(run, has_aux=True)(hidden, IGNORED)
    s, t = np.float64(hidden @ HEAD.T), np.float64(hidden[::-1] * 0.9 @ HEAD.T)
    log = lambda z: z - np.log(np.exp(z).sum(1, keepdims=True))
    kl = (np.exp(log(t)) * (log(t) - log(s))).sum(1)
    ce = -log(s)[range(4), IGNORED[:4]]
    np.testing.assert_allclose(value, (alpha * ce + (1 - alpha) * kl[:4]).mean(), rtol=3e-6)
    np.testing.assert_allclose(means["loss/ce"].value, ce.mean(), rtol=3e-6)
    assert all(mean.count == 4 for mean in means.values())
    # Rows 4 and 5 are a teacher's, a constant, to rows 0 and 1.
    assert slope[:4].any()
    apart = jax.grad(lambda h: run(jnp.concatenate([hidden[:4], h]), IGNORED)[0])(hidden[4:])
    dense = divergence(
        jnp.float32(s), jnp.float32(t), labels=IGNORED, alpha=alpha, implementation=implementation
    )
    np.testing.assert_array_equal(dense[4:], 0)
    assert not apart.any()


@pytest.mark.parametrize("label", [-1, -101, V])
def test_any_other_label_outside_the_vocabulary_is_nan(label):
    labels = IGNORED.at[0].set(label)
    hidden = HIDDEN.reshape(-1, D)[:6]
    assert np.isnan(linear_divergence(hidden, HEAD, hidden, HEAD, labels=labels, alpha=0.5)[0])
    values = divergence(hidden @ HEAD.T, hidden @ HEAD.T, labels=labels, alpha=0.5)
    np.testing.assert_array_equal(np.isnan(values), [True] + [False] * 5)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_a_temperature_under_the_mask_may_be_anything(implementation):
    hidden, mask = HIDDEN.reshape(-1, D)[:6], jnp.arange(6) > 1
    T = jnp.array([0.0, jnp.nan, 1.0, 2.0, 3.0, 1.5])

    def loss(hidden, T):
        return linear_divergence(
            hidden, HEAD, HIDDEN.reshape(-1, D)[6:12], HEAD, mask=mask, temperature=T,
            implementation=implementation,
        )[0]  # fmt: skip

    value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(hidden, T)
    clean, expected = jax.value_and_grad(loss, argnums=(0, 1))(hidden, jnp.where(mask, T, 1.0))
    assert value == clean
    for slope, want in zip(slopes, expected, strict=True):
        np.testing.assert_array_equal(slope, want)
        np.testing.assert_array_equal(slope[:2], 0)


def test_temperatures_of_positions_are_the_same_in_both_families():
    s, t = (jnp.asarray(_rng.normal(size=(5, 5)), jnp.float32) for _ in range(2))
    T = jnp.linspace(0.5, 3, 5)  # as many positions as columns
    want = divergence(s, t, temperature=T)
    for given in (T, T[:, None]):
        np.testing.assert_allclose(losses.forward_kl(s, t, temperature=given), want, rtol=2e-6)
    for wrong in (T[None, :], T[:4]):
        with pytest.raises(ConfigError, match="temperature"):
            losses.forward_kl(s, t, temperature=wrong)
