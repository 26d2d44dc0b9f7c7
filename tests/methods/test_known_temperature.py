"""A temperature that is 1 throughout a run is part of its program, one that moves is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import methods
from jaxdistill.kernels import measure
from jaxdistill.methods import kd, measuring
from jaxdistill.methods.base import Facts
from jaxdistill.types import Batch, Outputs, TeacherSignal

B, L, D, V = 2, 9, 6, 31
ALPHA = 0.3


def outputs(seed):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(B, L, D)), rng.normal(size=(V, D))
    return Outputs(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32))


def batch():
    rng = np.random.default_rng(7)
    tokens = jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32)
    ones = jnp.ones((B, L), jnp.int32)
    mask = jnp.asarray(rng.random((B, L)) < 0.7)
    return Batch(tokens, jnp.roll(tokens, -1, 1), mask, ones, ones)


def built(name, **options):
    facts = Facts(None, None, None, None, vocab=V, steps=10, learning_rate=1e-3)
    return methods.build(methods.METHODS[name].options(name=name, **options), facts).objective


def loss(objective, hidden, head, knobs):
    """Its sum over the batch; every knob is traced, as it is in a step."""
    student = Outputs(hidden, head)
    params = objective.init(jax.random.key(0))
    means = objective.apply(params, student, TeacherSignal(outputs(2)), batch(), knobs)
    return means["loss"].total, means


MOVING = {"schedule": "linear", "start": 1.0, "end": 2.0}


@pytest.mark.parametrize(
    ("make", "twice"),
    [
        (lambda: built("kd"), False),
        (lambda: built("reverse_kd"), False),
        (lambda: built("taid"), False),
        (lambda: measuring.against_teacher(vocab=V), False),
        (lambda: built("kd", temperature=2.0), True),
        (lambda: built("kd", temperature=MOVING), True),
        (lambda: built("ctkd"), True),
    ],
)
def test_sums_are_made_once_where_the_temperature_is_one_throughout(make, twice, monkeypatch):
    asked, right = set(), measure.measure
    monkeypatch.setattr(measure, "measure", lambda *a: asked.update(a[0]) or right(*a))
    numbers = dict.fromkeys(("alpha", "temperature", "taid_t", "reversal"), jnp.float32(0.5))
    student, objective = outputs(1), make()
    run = lambda hidden, head, knobs: loss(objective, hidden, head, knobs)[0]
    jax.eval_shape(run, student.hidden, student.head, numbers)
    assert {"sum_s", "sum_z"} <= asked
    assert ("sum_s1" in asked) == twice


def test_either_form_has_the_gradient_of_the_definition_in_float64():
    student, knobs = outputs(1), {"alpha": jnp.float32(ALPHA), "temperature": jnp.float32(1)}
    run = lambda objective: jax.jit(
        jax.value_and_grad(
            lambda hidden, head, knobs: loss(objective, hidden, head, knobs),
            argnums=(0, 1), has_aux=True,
        )
    )(student.hidden, student.head, knobs)  # fmt: skip
    (value, means), slopes = run(built("kd"))
    (traced, same), others = run(kd.objective(vocab=V))
    rows, taught = batch(), outputs(2)

    def definition(hidden, head):
        log_q = jax.nn.log_softmax(hidden @ head.T)
        log_p = jax.nn.log_softmax(np.float64(taught.hidden) @ np.float64(taught.head).T)
        ce = -jnp.take_along_axis(log_q, rows.targets[..., None], -1)[..., 0]
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        return jnp.sum(jnp.where(rows.mask, ALPHA * ce + (1 - ALPHA) * kl, 0))

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.float64(x)) for x in (student.hidden, student.head)]
        want, exact = jax.value_and_grad(definition, argnums=(0, 1))(*wide)
    np.testing.assert_allclose([value, traced], want, rtol=5e-7)
    for found in (slopes, others):
        for slope, right in zip(found, exact, strict=True):
            np.testing.assert_allclose(slope, right, atol=1e-6 * np.abs(right).max())
    assert means.keys() == same.keys()
    for name, mean in means.items():
        np.testing.assert_allclose(mean.total, same[name].total, rtol=1e-6, err_msg=name)


def test_a_temperature_that_is_one_is_still_a_knob_of_the_run():
    facts = Facts(None, None, None, None, vocab=V, steps=10, learning_rate=1e-3)
    options = methods.METHODS["kd"].options(name="kd")
    assert methods.build(options, facts).knobs["temperature"] == 1.0
