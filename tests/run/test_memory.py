"""Less memory for a run: a teacher in whole numbers, moments that wait on the host."""

import dataclasses
import importlib.util
import shutil

import jax
import numpy as np
import pytest

from jaxdistill import api, models
from jaxdistill.compress import quantize
from jaxdistill.errors import ConfigError
from jaxdistill.models import Model
from jaxdistill.plan import describe
from jaxdistill.run import participants, setup, states
from tests.also import also
from tests.run.conftest import models_of, take_devices
from tests.run.test_session import arrays, losses

DIVIDED = "mesh={data: 2, fsdp: 2, tensor: 2}"
RANDOM = "student={random: {like: teacher, layers: 2}, compute_dtype: float32}"
needs_qwix = pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="needs qwix")


def _kl(teacher: Model, other: Model) -> float:
    """Mean KL(teacher || other) over random tokens, float64."""
    tokens = np.random.default_rng(0).integers(0, 250, (4, 32))
    log_p, log_q = (
        np.asarray(jax.nn.log_softmax(one.logits(tokens)), np.float64) for one in (teacher, other)
    )
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


@needs_qwix
@pytest.mark.parametrize(("scheme", "limit"), [("int8", 1e-3), ("int4", 0.2)])
def test_a_rounded_teacher_says_almost_the_same(scheme, limit, load_config, tmp_path):
    """Weights of size: with those of a fresh model every teacher says nearly nothing."""
    config = load_config(
        tmp_path, RANDOM, "teacher.random={layers: 4, embed: 64, mlp: 64, heads: 4}"
    )
    teacher = models_of(config, setup.mesh_of(config)).teacher
    larger = lambda path, leaf: leaf * (1.0 if path[-1].key == "scale" else 6.0)
    wide = jax.tree_util.tree_map_with_path(larger, teacher.params)
    wide = dataclasses.replace(teacher, params=wide)
    again = quantize.quantized(wide, scheme)
    loss = _kl(wide, again)
    assert 1e-9 < loss < limit, loss
    spoken = np.asarray(jax.nn.softmax(wide.logits(np.arange(32)[None])))
    assert spoken.max() > 3 / spoken.shape[-1]  # it does say something


@needs_qwix
def test_a_run_against_a_rounded_teacher(load_config, tmp_path, monkeypatch):
    take_devices(monkeypatch, 1)
    plain = api.train(load_config(tmp_path / "plain", RANDOM)).run_dir
    result = api.train(load_config(tmp_path / "int8", RANDOM, "teacher.quantize=int8"))
    rounded = result.run_dir
    before, after = losses(plain), losses(rounded)
    assert before != after
    np.testing.assert_allclose(list(after.values()), list(before.values()), rtol=1e-3)
    config = load_config(tmp_path / "again", RANDOM, "teacher.quantize=int8")
    teacher = models_of(config, setup.mesh_of(config)).teacher
    kernel = teacher.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.values.dtype == np.int8 and kernel.values.shape == (4, 32, 48)
    assert api.resume(rounded).metrics == result.metrics


@pytest.fixture(scope="module")
def divided(load_config, tmp_path_factory):
    """(folder, its arrays) of a run on two by two by two devices, with all memory on them."""
    folder = tmp_path_factory.mktemp("divided")
    run = api.train(load_config(folder, DIVIDED)).run_dir
    return run, arrays(run, 6)


@pytest.mark.parametrize("option", ["optimizer.offload=true", *also("teacher.offload=true")])
def test_what_waits_on_the_host_changes_no_bit(option, divided, load_config, tmp_path):
    """Moments, or the teacher's layers, of which the student is cut out of a copy on the device."""
    plain, expected = divided
    away = api.train(load_config(tmp_path, DIVIDED, option)).run_dir
    assert losses(plain) == losses(away)

    def same():
        found = arrays(away, 6)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)

    same()
    shutil.rmtree(away / "checkpoints" / "6")
    api.resume(away)
    same()


def test_the_step_takes_and_leaves_moments_on_the_host(load_config, tmp_path):
    config = load_config(tmp_path, "optimizer.offload=true")
    step, state, _ = api.build(config)

    def kinds(state):
        leaves = jax.tree.leaves(state.opt_state)
        return {leaf.sharding.memory_kind for leaf in leaves if leaf.ndim > 1}

    assert kinds(state) == {states.HOST}
    outputs = step.output_shardings[0].opt_state
    large = {
        place.memory_kind
        for place, leaf in zip(*map(jax.tree.leaves, (outputs, state.opt_state)), strict=True)
        if leaf.ndim > 1
    }
    assert large == {states.HOST}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}


def test_what_cannot_be_met_is_named(load_config, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cut out of rounded weights: give student.source"):
        load_config(tmp_path, "teacher.quantize=int8")
    for who in ("teacher", "student"):
        config = load_config(tmp_path, f"{who}.attention=splash")
        with pytest.raises(ConfigError, match="attention = 'splash': runs on a tpu, and this is a"):
            participants.shapes_of(config, setup.mesh_of(config))
    config = load_config(tmp_path, "student.router_aux_loss_coef=0.02")
    with pytest.raises(ConfigError, match="coef = 0.02: the student has no routed experts: leave"):
        participants.shapes_of(config, setup.mesh_of(config))
    monkeypatch.setattr(states, "HOST", "host_of_another_kind")
    for option in ("optimizer.offload", "teacher.offload"):
        config = load_config(tmp_path, f"{option}=true")
        with pytest.raises(ConfigError, match=rf"{option} = true: cpu addresses .*pinned_host"):
            participants.shapes_of(config, setup.mesh_of(config))
    for teacher in (
        "{self: {weights: frozen}}",
        "{cache: somewhere}",
        "{api: {base_url: 'http://h', model: m}}",
    ):
        with pytest.raises(ConfigError, match="offload"):
            load_config(tmp_path, RANDOM, f"teacher={teacher}", "teacher.offload=true")


@needs_qwix
def test_a_folder_is_read_to_the_host_as_it_is_planned(load_config, tmp_path):
    teacher = models_of(load_config(tmp_path), setup.mesh_of(load_config(tmp_path))).teacher
    models.save(teacher, tmp_path / "teacher")
    source = f"teacher={{source: {tmp_path}/teacher, dtype: float32, offload: true}}"
    options = (RANDOM, source, "teacher.quantize={scheme: int8, exceptions: [mlp.down=none]}")
    config = load_config(tmp_path, *options)
    mesh = setup.mesh_of(config)
    params = models_of(config, mesh).teaching.params
    shapes = participants.shapes_of(config, mesh).teaching.abstract_params(mesh)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(params["layers"])}
    assert kinds == {states.HOST} and params["embedding"].sharding.memory_kind == "device"
    same = lambda one, two: (
        (one.shape, one.dtype, one.sharding) == (two.shape, two.dtype, two.sharding)
    )
    assert jax.tree.all(jax.tree.map(same, params, shapes))
    held = dataclasses.replace(teacher, params=params).logits(np.arange(32)[None])
    rounded = quantize.quantized(teacher, quantize.named("int8", ("mlp.down=none",)))
    np.testing.assert_array_equal(held, rounded.logits(np.arange(32)[None]))


@pytest.mark.variant
def test_what_waits_on_the_host_is_planned_apart(load_config, tmp_path):
    def planned(*more):
        config = load_config(tmp_path, RANDOM, "train.micro_batches=2", *more)
        return api.plan(config, "cpu:1")

    before, after = planned(), planned("teacher.offload=true", "optimizer.offload=true")
    layers = 4 * 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)
    held = after["memory"]["host"]
    assert held["teacher"] == layers and "host" in describe(after)
    assert before["memory"]["host"] == {} and before["host_bytes"] == 0
    for name, moved in held.items():
        arguments = before["memory"]["arguments"][name] - after["memory"]["arguments"][name]
        assert arguments == moved
    assert after["host_bytes"] == 2 * layers + held["optimizer"]
