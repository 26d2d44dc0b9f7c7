"""Weights cross the mesh once a step: the same curve, and no gather of weights in the loop."""

import functools

import jax
import numpy as np
import pytest

from jaxdistill import models, optim, teachers
from jaxdistill.methods import kd
from jaxdistill.models import decoder, lora
from jaxdistill.plan import hlo
from jaxdistill.train import once
from jaxdistill.train import state as states
from jaxdistill.train import step as steps
from tests.also import also
from tests.train.test_step import ROWS, STUDENT, TEACHER, VOCAB, mesh_of, rows

PARTS = 4
MESH = (1, 2, 2)
SHAPE = {"data": 1, "fsdp": 2, "tensor": 2, "context": 1}


def program_of(ahead, gathered, adapters=None):
    """(program, state, teacher's parameters) of a training in four micro-batches."""
    mesh = mesh_of(*MESH)
    teacher = models.random(TEACHER, 1, "float32", mesh).params
    student = models.random(STUDENT, 0, "float32", mesh).params
    tx = optim.optimizer(1e-2, knobs={"alpha": 0.3, "temperature": 2.0})
    loss = steps.make_loss(STUDENT, kd.objective(vocab=VOCAB), compute_dtype="float32")
    trained, frozen = student, None
    if adapters is not None:
        trained, frozen = lora.init(STUDENT, adapters, jax.random.key(3)), student
        trained = jax.device_put(trained, jax.NamedSharding(mesh, jax.P()))
    step = steps.make(
        loss,
        teachers.online(TEACHER, compute_dtype="float32", taps=(0,)),
        tx,
        micro_batches=PARTS,
        adapters=adapters,
        ahead=ahead,
        gather=functools.partial(once.gathered, STUDENT, dtype="float32") if gathered else None,
    )
    state = states.create(trained, {}, tx, 7, mesh, frozen)
    shape = steps.abstract_batch(rows(0), ROWS, mesh)
    return steps.compiled(step, state, teacher, shape, mesh), state, teacher


def curve(*options):
    program, state, teacher = program_of(*options)
    found = []
    for seed in range(4):
        batch = steps.place(rows(seed), mesh_of(*MESH))
        state, means = program(state, teacher, batch)
        found.append([float(means[name].value) for name in ("loss/total", "optim/grad_norm")])
    return program.as_text(), np.array(found), jax.device_get(state.params["student"])


@pytest.fixture(scope="module")
def plain():
    return curve(False, False)


def weight_gathers(text):
    """How often each gather over fsdp runs that brings weights of layers together, by whose."""
    times = {"teacher": set(), "student": set()}
    for one in hlo.collectives(text):
        path = one.written_by
        of_layers = f"{decoder.WEIGHTS}/" in path or "dynamic_index_in_dim" in path  # or back again
        if one.kind == "all-gather" and of_layers and one.axes(SHAPE) == ("fsdp",):
            for who in times:
                times[who] |= {one.times} if who in path else set()
    return times


@pytest.mark.parametrize(("ahead", "gathered"), [(True, False), *also((True, True))])
def test_weights_that_cross_once_give_the_same_curve(ahead, gathered, plain):
    text, found, params = curve(ahead, gathered)
    np.testing.assert_allclose(found, plain[1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, plain[2])
    before, after = weight_gathers(plain[0]), weight_gathers(text)
    assert before == {"teacher": {TEACHER.layers * PARTS}, "student": {STUDENT.layers * PARTS}}
    assert after["teacher"] == {TEACHER.layers}
    assert after["student"] == ({1} if gathered else before["student"])


def test_the_frozen_layers_beside_adapters_cross_once():
    adapters = lora.Lora(2, 4.0, ("query", "down"))
    found = [curve(ahead, ahead, adapters) for ahead in (False, True)]
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5)
    assert weight_gathers(found[1][0])["student"] == {1}
