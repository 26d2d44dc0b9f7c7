"""Bytes by kind and the least time of a step, against sums done by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxdistill import chips
from jaxdistill.plan import cost, memory
from jaxdistill.plan.cost import Cost
from jaxdistill.plan.hlo.live import Buffer
from jaxdistill.sharding import make_mesh, replicated
from jaxdistill.train.state import TrainState


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("jit(step)/teacher/while/body/closed_call/dot_general", "activations"),
        ("jit(step)/teacher/while/body/weights/convert_element_type", "weights"),
        ("teacher_params['embedding']", "weights"),
        ("jit(step)/jvp(student)/while", "activations"),
        ("jit(step)/transpose(jvp(student))/while/body/checkpoint/dot_general", "activations"),
        ("jit(step)/transpose(jvp(student))/while", "gradients"),
        ("jit(step)/transpose(jvp(student))/while/body/weights/convert", "gradients"),
        ("jit(step)/while/body/jvp(loss)/shard_map/while/body/dot_general", "loss"),
        ("jit(step)/transpose(jvp(loss))/mul", "loss"),
        ("jit(step)/optimizer/sqrt", "optimizer"),
        ("jit(step)/while", "gradients"),
        ("jit(step)/mul", "other"),
    ],
)
def test_what_a_buffer_is_for_is_told_by_its_path(path, kind):
    assert memory.kind_of(path) == kind


def test_temporaries_are_counted_when_most_are_alive():
    def buffer(offset, size, first, last, path):
        return Buffer((7, offset), size, first, last, path)

    student, loss = "jit(step)/jvp(student)/while", "jit(step)/jvp(loss)/dot"
    at_peak, most = memory.temporary_bytes(
        [
            buffer(0, 100, 0, 1, "jit(step)/broadcast"),  # zeros that the loop fills
            buffer(0, 100, 1, 5, student),
            buffer(0, 100, 2, 4, student),  # updated in place
            buffer(100, 10, 2, 3, student),
            buffer(110, 70, 4, 4, loss),
            buffer(110, 60, 6, 6, loss),
        ]
    )
    assert at_peak == {"activations": 100, "loss": 70}  # at 4
    assert most == {"activations": 110, "loss": 70}  # at 2, at 4


def test_the_floor_is_the_longest_of_four():
    chip = chips.TPUS["v5e"]
    sent = lambda all, beyond: {"sent_bytes": all, "network_bytes": beyond}
    found = Cost(197e12, 2 * 819e9, [sent(100e9, 0.0), sent(500e9, 0.0)], [], [])
    assert found.seconds(chip) == {"compute": 1.0, "memory": 2.0, "links": 3.0}
    assert "links" not in found.seconds(chips.TPUS["v4"])  # nothing is published
    away = found._replace(host_bytes=128e9)
    assert away.seconds(chips.GPUS["h100"])["host"] == 2.0  # 64 GB/s in one direction
    assert "host" not in away.seconds(chip)
    assert found.seconds(None) == {}
    beyond = Cost(0.0, 0.0, [sent(100e9, 0.0), sent(512.5e9, 12.5e9)], [], [])
    assert beyond.seconds(chip) == {
        "compute": 0.0, "memory": 0.0, "links": 3.0, "network": 4.0,  # 3.125 GB/s
    }  # fmt: skip
    assert "network" not in beyond.seconds(chips.GPUS["mi300x"])


def test_collectives_over_one_device_are_none():
    text = (
        "ENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8] parameter(0)\n"
        "  %b = f32[8] all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add\n"
        "  ROOT %c = f32[8] all-reduce(%b), replica_groups={{0,1}}, to_apply=%add\n}\n"
    )
    found = cost(text, {"data": 1, "fsdp": 2})
    assert [(e["kind"], e["axes"], e["times"]) for e in found.collectives] == [
        ("all-reduce", ("fsdp",), 1)
    ]
    assert (found.link_bytes, found.network_bytes) == (32, 0)
    apart = cost(text, {"data": 1, "fsdp": 2}, [0, 1])
    assert (apart.link_bytes, apart.network_bytes) == (32, 32)


def test_a_chip_is_found_by_the_longest_name():
    assert chips.of_kind("TPU v5 lite") is chips.TPUS["v5e"]
    assert chips.of_kind("TPU v5p") is chips.TPUS["v5p"]
    assert chips.of_kind("NVIDIA H100 80GB HBM3") is chips.GPUS["h100"]
    assert chips.of_kind("NVIDIA GB200") is chips.GPUS["gb200"]
    assert chips.of_kind("TPU7x") is chips.TPUS["v7x"]
    assert chips.of_kind("cpu") is None
    for chip in (*chips.TPUS.values(), *chips.GPUS.values()):
        assert chip.source.startswith("https://")
        assert (chip.network is None) == (chip.network_source is None)
        assert chip.network is None or chip.network_source.startswith("https://")


def test_each_of_several_teachers_has_its_bytes():
    place = replicated(make_mesh(1, 1, devices=jax.devices()[:1]))
    leaf = lambda size, dtype: {"w": jax.ShapeDtypeStruct((size,), dtype, sharding=place)}
    state = TrainState({}, {}, {}, {}, {})
    several = {"math": leaf(10, jnp.float32), "code": leaf(6, jnp.int8)}
    held = memory.argument_bytes(state, several, {}, "float32", ["math", "code"])
    assert (held["teacher math"], held["teacher code"]) == (40, 6) and "teacher" not in held
    one = memory.argument_bytes(state, several["math"], {}, "float32")
    assert one["teacher"] == 40
