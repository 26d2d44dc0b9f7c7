"""A teacher on devices of its own: the same numbers as in the step, and what is refused."""

import dataclasses
import json
import pathlib
import shutil
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import api, plan
from jaxdistill.config.ahead import TeacherMesh
from jaxdistill.data.teacher_cache.formats import HIDDEN
from jaxdistill.errors import ConfigError
from jaxdistill.run import ahead, participants, setup
from jaxdistill.sharding import batch_sharding, make_mesh
from jaxdistill.train.step import place
from jaxdistill.types import Batch
from tests.run.conftest import take_devices
from tests.run.test_session import arrays

FOUR = ("mesh={fsdp: 2, tensor: 2}", "train.micro_batches=2", "teacher.random.layers=2")
OWN = "teacher.mesh={fsdp: 2, tensor: 2}"

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")


def curve(result):
    """[steps, 2] of loss and gradient norm."""
    lines = (pathlib.Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
    records = [line for line in map(json.loads, lines) if "loss/total" in line]
    return np.asarray([[line["loss/total"], line["optim/grad_norm"]] for line in records])


@pytest.fixture(scope="module")
def shared(load_config, tmp_path_factory):
    """A run whose teacher computes in the step, on four devices."""
    with pytest.MonkeyPatch.context() as patch:
        take_devices(patch, 4)
        return api.train(load_config(tmp_path_factory.mktemp("shared"), *FOUR))


@pytest.fixture(scope="module")
def apart(load_config, tmp_path_factory):
    """The same with four more for the teacher, divided alike."""
    folder = tmp_path_factory.mktemp("apart")
    return api.train(load_config(folder, *FOUR, OWN, "eval.samples=1"))


def test_divided_alike_it_says_the_same_to_the_last_bit(shared, apart):
    np.testing.assert_array_equal(curve(apart), curve(shared))
    assert apart.metrics == shared.metrics
    measured = lambda row: {n: v for n, v in row.items() if n != "scored_tokens_per_second"}
    assert list(map(measured, apart.table)) == list(map(measured, shared.table))
    assert apart.table[0]["name"] == "teacher"
    for name, value in arrays(pathlib.Path(shared.run_dir), 6).items():
        np.testing.assert_array_equal(arrays(pathlib.Path(apart.run_dir), 6)[name], value)


@pytest.mark.variant
def test_divided_otherwise_it_says_the_same(shared, load_config, tmp_path):
    other = "teacher.mesh={data: 2, context: 2}"
    result = api.train(load_config(tmp_path, *FOUR, other, "train.gather_once=teacher"))
    np.testing.assert_allclose(curve(result), curve(shared), rtol=1e-6)


@pytest.mark.variant
def test_a_resumed_run_ends_in_the_same_bits(apart, tmp_path):
    folder = pathlib.Path(apart.run_dir)
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "6")
    result = api.resume(tmp_path / "copy")
    assert result.metrics == apart.metrics
    for name, value in arrays(folder, 6).items():
        np.testing.assert_array_equal(arrays(tmp_path / "copy", 6)[name], value)


@pytest.mark.parametrize("kind", ["quantised", "second view"])
def test_what_is_sent_is_what_a_teacher_in_the_step_would_say(kind, load_config, tmp_path):
    student = "student={random: {layers: 1, embed: 32, mlp: 48, heads: 4}}"
    options = [student, "mesh={fsdp: 2}", "teacher.mesh={fsdp: 2}", "teacher.dtype=bfloat16"]
    if kind == "quantised":
        pytest.importorskip("qwix", reason="needs qwix (pip install 'jaxdistill[quant]')")
        options.append("teacher.quantize=int8")
    else:
        options.append("teacher.sharding=whole")
    config = load_config(tmp_path, *options)
    devices = jax.devices()[:4]
    mesh = setup.mesh_of(config, devices)
    shapes = participants.shapes_of(config, mesh, devices)
    second = kind == "second view"
    asked = dataclasses.replace(shapes.teaching, second_view=second).loaded(mesh)
    assert set(asked.mesh.devices.flat) == set(devices[2:])

    tokens = np.random.default_rng(0).integers(0, 257, (4, 16), dtype=np.int32)
    numbers = np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16))
    text = {"tokens": tokens, "positions": numbers % 9, "segment_ids": 1 + numbers // 9}
    theirs = {name: leaf[:, ::-1] % 9 for name, leaf in text.items()} if second else None
    batch = Batch(**text, targets=tokens, mask=numbers > 0, second=theirs)
    placed = ahead.placing(asked, mesh)(batch)

    inside = super(ahead.Ahead, asked)  # the same model, as it computes in a step
    alone = inside.loaded(mesh).model.params
    with jax.set_mesh(mesh):
        said = jax.jit(inside.signal())(alone, None, place(batch, mesh)).outputs
        told = asked.signal()(asked.params, None, placed).outputs
    np.testing.assert_array_equal(told.hidden, said.hidden)
    np.testing.assert_array_equal(told.head, said.head)
    assert set(placed.teacher[HIDDEN].devices()) == set(devices[:2]) == set(told.head.devices())


@pytest.mark.parametrize(
    ("rows", "sizes"), [(2, {"fsdp": 6}), (3, {"fsdp": 2, "tensor": 2}), (2, {"context": 4})]
)
def test_each_device_is_sent_its_own_part(rows, sizes):
    values = np.arange(12 * 8 * 3, dtype=np.float32).reshape(12, 8, 3)
    own = make_mesh(fsdp=rows, devices=jax.devices()[-rows:])
    other = make_mesh(
        **{"fsdp": 1, **sizes}, devices=jax.devices()[: int(np.prod([*sizes.values()]))]
    )
    there = NamedSharding(other, PartitionSpec("fsdp", "context"))
    array = jax.device_put(values, NamedSharding(own, PartitionSpec("fsdp")))
    with jax.set_mesh(other), jax.transfer_guard_device_to_host("disallow"):
        moved = ahead.sent(array, there)
    assert moved.sharding == there
    np.testing.assert_array_equal(moved, values)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method={name: ted}"], "ted reads its layers, heads or queries, and its final hidden"),
        (["method={name: sft}"], "sft asks no teacher, and its devices would be idle"),
        (["teacher.until=3"], "idle in some steps"),
        (["teacher.offload=true"], r"layers in host memory \(teacher.offload\)"),
        (
            ["rollout={max_new_tokens: 8, prompts_per_step: 8}"],
            "is there too late to be read a step ahead",
        ),
        (["teacher.cache=there", "student={source: there}"], "no weights of a teacher are read"),
        (["teacher.mesh.fsdp=3"], r"batch_size must be a multiple of teacher.mesh.data \*"),
        (
            ["train.micro_batches=8"],
            "batch_size / micro_batches must be a multiple of teacher.mesh",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(overrides, words, load_config, tmp_path):
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path, "teacher.mesh={fsdp: 2}", *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.mesh={fsdp: 8}"], "takes 8 of 8 devices, and the student needs some"),
        (
            ["teacher.mesh={tensor: 3}", "mesh.fsdp=1"],
            "divide the 5 devices.*; 3 devices are the teacher's",
        ),
        (
            ["teacher.mesh={tensor: 3}", "mesh={data: 1, fsdp: 1, context: 5}", "data.seq_len=40"],
            r"teacher.mesh.tensor = 3 does not divide the teacher's heads = 4",
        ),
        (["teacher.mesh={context: 4}", "data.seq_len=36"], r"multiple of 2 \* teacher.mesh.contex"),
        (["teacher.mesh={expert: 2, fsdp: 2}"], "teacher.mesh.expert = 2: no model on it has rou"),
    ],
)
def test_a_mesh_that_cannot_work_is_told_before_anything_is_written(
    overrides, words, load_config, tmp_path
):
    with pytest.raises(ConfigError, match=words):
        api.train(load_config(tmp_path, *overrides))
    assert not (tmp_path / "run").exists()


def test_a_loop_of_ones_own_has_no_teacher_beside_it(load_config, tmp_path):
    config = load_config(tmp_path, OWN)
    with pytest.raises(ConfigError, match="a loop of one's own would have to ask the teacher"):
        setup.build(config)


@pytest.mark.variant
def test_a_plan_tells_of_both_kinds_of_devices(load_config, tmp_path):
    config = load_config(tmp_path, *FOUR, OWN)
    found = api.plan(config, "cpu:8", tries=0)
    apart, table = found["teacher"], 257 * 32 * 4
    assert (found["devices"], apart["devices"]) == (4, 4)
    asked = participants.shapes_of(config, setup.mesh_of(config)).teaching
    there = jax.tree.leaves(asked.loaded(setup.mesh_of(config)).model.params)
    assert apart["parameters"] == sum(leaf.addressable_shards[0].data.nbytes for leaf in there)
    assert apart["hidden_bytes"] == 8 * 32 * 32 * 4 / 2  # rows are in two parts
    assert found["memory"]["arguments"]["teacher"] == table / 2  # the head, its columns divided
    assert apart["total"] > apart["parameters"] + apart["hidden_bytes"]
    assert "each of the teacher's own 4 devices, fsdp 2, tensor 2" in plan.describe(found)


class _Device(NamedTuple):
    number: int
    process_index: int


def test_each_process_has_as_many_devices_of_the_teacher():
    devices = [_Device(number, number // 4) for number in range(8)]
    student, own = ahead._last_of_each(devices, 2)
    assert [device.number for device in student] == [0, 1, 2, 4, 5, 6]
    assert [device.number for device in own] == [3, 7]
    with pytest.raises(ConfigError, match="its 3 devices do not divide over 2 processes"):
        ahead._last_of_each(devices, 3)
    for count, there in ((8, devices), (3, [*devices, _Device(8, 2)])):
        rule = f"takes {count} of {len(there)} devices, and the student needs some"
        with pytest.raises(ConfigError, match=rule):
            ahead._last_of_each(there, count)


def test_hidden_states_do_not_leave_their_process():
    halves = {0: [0], 1: [1]}
    ahead._check_rows(halves, halves)
    with pytest.raises(
        ConfigError, match="process 0 has row 1 of a batch on the teacher's devices"
    ):
        ahead._check_rows({0: [0, 1], 1: [0, 1]}, halves)  # tensor spans the processes there
    with pytest.raises(
        ConfigError, match="process 0 has row 0 of a batch on the student's devices"
    ):
        ahead._check_rows({0: [1], 1: [0]}, halves)


def test_rows_of_both_meshes_are_compared_before_a_run(load_config, tmp_path, monkeypatch):
    """As if the first half of the devices were one process's, the other another's."""

    def by_process(mesh, rows):
        found = {0: set(), 1: set()}
        for device, index in batch_sharding(mesh).devices_indices_map((rows, 1)).items():
            found[device.id % 4 // 2].update(range(rows)[index[0]])
        return {process: sorted(some) for process, some in found.items()}

    monkeypatch.setattr(ahead, "rows_by_process", by_process)
    four = "mesh={data: 2, fsdp: 2}"
    with pytest.raises(
        ConfigError, match="process 0 has row 2 of a batch on the teacher's devices"
    ):
        api.train(load_config(tmp_path, four, "teacher.mesh={tensor: 4}"))
    config = load_config(tmp_path, four, "teacher.mesh={fsdp: 2, tensor: 2}")
    participants.shapes_of(config, setup.mesh_of(config))


def test_a_mesh_has_as_many_devices_as_its_sizes_multiply_to():
    assert TeacherMesh(data=2, expert=3, tensor=2).devices == 12
