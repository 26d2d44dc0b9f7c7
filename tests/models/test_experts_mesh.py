"""Experts on a mesh: tokens that go to their experts and back learn what one device learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import models, rules, sharding, teachers
from jaxdistill.methods import kd
from jaxdistill.models import decoder, experts_exchange
from jaxdistill.models.architecture import Experts
from jaxdistill.plan import hlo
from jaxdistill.train import step as steps
from tests.also import also
from tests.train.test_step import LENGTH, ROWS, STUDENT, TEACHER, VOCAB, rows

FOR_TEACHER = dataclasses.replace(TEACHER, family="qwen3_moe", layers=2, experts=Experts(8, 3))
FOR_STUDENT = dataclasses.replace(STUDENT, family="mixtral", experts=Experts(8, 2))
KNOBS = {"alpha": jnp.float32(0.3), "temperature": jnp.float32(2.0)}


def uneven(params):
    """Routers that send most tokens to the first two experts."""
    mlp = params["layers"]["mlp"]
    kernel = mlp["router"]["kernel"]
    router = {"kernel": kernel.at[..., :2].add(0.5 * jnp.sign(kernel.sum(-1, keepdims=True)))}
    return {**params, "layers": {**params["layers"], "mlp": {**mlp, "router": router}}}


@pytest.fixture(scope="module")
def weights():
    return [uneven(models.random(c, n).params) for n, c in enumerate((FOR_STUDENT, FOR_TEACHER))]


def placed(params, config, mesh):
    places = sharding.shardings(mesh, decoder.logical_axes(config), params)
    return jax.device_put(params, places)


def learned(weights, mesh=None):
    """The loss of packed documents, and its gradient: of a student and a teacher with experts."""
    loss = steps.make_loss(FOR_STUDENT, kd.objective(vocab=VOCAB), compute_dtype="float32")
    signal = teachers.online(FOR_TEACHER, compute_dtype="float32")

    def run(student, teacher, batch):
        said = signal(teacher, None, batch)
        mean = lambda params: loss({"student": params, "objective": {}}, said, batch, KNOBS)["loss"]
        return jax.value_and_grad(lambda params: mean(params).value)(student)

    if mesh is None:
        return jax.jit(run)(*weights, jax.tree.map(jnp.asarray, rows(0)))
    spread = [placed(p, c, mesh) for p, c in zip(weights, (FOR_STUDENT, FOR_TEACHER), strict=True)]
    with jax.set_mesh(mesh):
        return jax.jit(run)(*spread, steps.place(rows(0), mesh))


@pytest.fixture(scope="module")
def plain(weights):
    return learned(weights)


@pytest.mark.parametrize(
    ("sizes", "room"),
    [
        ({"fsdp": 2, "expert": 4}, 0.3),  # many rounds
        *also(
            ({"fsdp": 2, "expert": 4}, 1.5),
            ({"fsdp": 1, "expert": 2, "tensor": 2, "context": 2}, 1.0),
        ),
    ],
)
def test_tokens_that_travel_give_the_loss_and_gradient_of_one_device(
    sizes, room, plain, weights, monkeypatch
):
    monkeypatch.setattr(experts_exchange, "ROOM", room)
    loss, gradient = learned(weights, sharding.make_mesh(**sizes))
    np.testing.assert_allclose(loss, plain[0], rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (gradient, plain[1])), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max() + 1e-8)


def largest_gather(mesh):
    """Numbers of the largest array that the teacher's forward pass brings together."""
    shape = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        decoder.shapes(FOR_TEACHER),
        sharding.shardings(mesh, decoder.logical_axes(FOR_TEACHER), decoder.shapes(FOR_TEACHER)),
    )
    batch = steps.abstract_batch(rows(0), ROWS, mesh)
    run = lambda params, batch: decoder.apply(
        FOR_TEACHER, params, batch.tokens, batch.positions, batch.segment_ids,
        compute_dtype="float32",
    ).hidden  # fmt: skip
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(shape, batch).compile().as_text()
    found = hlo.collectives(text)
    sent = [one.nbytes for one in found if one.kind == "all-to-all"]
    gathered = [one.nbytes for one in found if one.kind == "all-gather"]
    return max(gathered, default=0) / 4, max(sent, default=0) / 4


def test_no_expert_crosses_a_mesh_whose_expert_axis_has_all_devices():
    one_expert = FOR_TEACHER.embed * FOR_TEACHER.mlp
    gathered, _ = largest_gather(sharding.make_mesh(fsdp=8))
    assert gathered == 8 * one_expert
    gathered, sent = largest_gather(sharding.make_mesh(fsdp=1, expert=8))
    assert gathered < 8 * one_expert / 2
    pairs = ROWS * LENGTH * FOR_TEACHER.experts.chosen / 8
    assert sent == 8 * np.ceil(experts_exchange.ROOM * pairs / 8) * FOR_TEACHER.embed


def test_experts_that_do_not_divide_are_told():
    assert not list(rules.expert_axis(1, 1, {}))
    assert not list(rules.expert_axis(4, 2, {"teacher": 8}))
    (none,) = rules.expert_axis(4, 1, {})
    assert "no model on it has routed experts: use mesh.fsdp" in str(none)
    (wrong,) = rules.expert_axis(3, 2, {"teacher": 8, "student": 12})
    assert "mesh.expert = 3: with mesh.tensor = 2" in str(wrong)
    assert "the teacher's 8 experts: take one of 1, 2, 4" in str(wrong)
