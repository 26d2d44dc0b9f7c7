"""Grids of devices: slices of TPUs as makers sell them, and hosts on slow networks."""

import dataclasses
import itertools

import numpy as np
import pytest
from jax.experimental import mesh_utils

from jaxdistill import sharding
from jaxdistill.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as JAX describes one: what laying out a grid reads of it."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    coords: tuple[int, ...] = ()
    process_index: int = 0
    slice_index: int = 0
    core_on_chip: int = 0


def tpu(*sides, kind="TPU v5 lite", slices=1):
    """The chips of slices of a torus, four to a host."""
    sides = sides + (1,) * (3 - len(sides))
    places = [
        (part, xyz) for part in range(slices) for xyz in itertools.product(*map(range, sides))
    ]
    return [
        Device(n, device_kind=kind, coords=xyz, process_index=n // 4, slice_index=part)
        for n, (part, xyz) in enumerate(places)
    ]


def hosts(count, each):
    return [Device(n, "gpu", "NVIDIA H100", (), n // each) for n in range(count * each)]


@pytest.fixture
def grid(monkeypatch):
    """A function: sizes, devices -> the array of devices of the mesh."""
    monkeypatch.setattr(sharding, "Mesh", lambda array, names, axis_types: array)
    for name in ("_arrange", "_networks", "make_mesh"):  # without types: these are no JAX devices
        plain = getattr(sharding, name)
        monkeypatch.setattr(sharding, name, getattr(plain, "__wrapped__", plain))
    return lambda devices, **sizes: sharding.make_mesh(**sizes, devices=devices)


SLICES = [
    ((4, 4), {"fsdp": 8, "tensor": 2}),
    ((4, 4), {"data": 2, "fsdp": 8}),
    ((4, 4), {"data": 2, "fsdp": 2, "tensor": 4}),
    ((4, 4), {"fsdp": 4, "tensor": 2, "context": 2}),
    ((16, 16), {"tensor": 2}),
    ((16, 16), {"tensor": 4}),
    ((16, 16), {"tensor": 8}),
    ((8, 8, 4), {"data": 16, "fsdp": 16}),
    ((8, 8, 4), {"tensor": 2}),
    ((2, 2, 4), {"fsdp": 16}),
]


@pytest.mark.parametrize(("sides", "sizes"), SLICES)
def test_slices_that_are_sold_take_the_usual_meshes(sides, sizes, grid):
    devices = tpu(*sides, kind="TPU v5" if len(sides) == 3 else "TPU v5 lite")
    found = grid(devices, **sizes)
    shape = dict(zip(sharding.AXES, found.shape, strict=True))
    assert all(shape[axis] == size for axis, size in sizes.items())
    assert sorted(device.id for device in found.flat) == list(range(len(devices)))
    if (
        "tensor" in sizes and "context" not in sizes
    ):  # they talk most: each is one link from the next
        pairs = zip(found[0, 0, :-1, 0], found[0, 0, 1:, 0], strict=True)
        steps = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in pairs]
        assert max(steps) == 1


def test_a_grid_that_no_torus_has_is_told(grid, monkeypatch):
    def none(*arguments, **options):
        raise NotImplementedError("no assignment")

    monkeypatch.setattr(mesh_utils, "create_device_mesh", none)
    with pytest.raises(ConfigError, match=r"fsdp: 4, tensor: 3.*cannot be laid out so"):
        grid(tpu(2, 6), data=1, fsdp=4, tensor=3)


def test_a_part_of_a_slice_is_a_whole_block_of_it_or_told(grid):
    chips = tpu(4, 2)
    found = grid(chips[-4:], data=1, fsdp=4)
    assert {device.id for device in found.flat} == {4, 5, 6, 7}
    with pytest.raises(ConfigError, match="the 3 devices are no whole block of the slice"):
        grid(chips[-3:], data=1, fsdp=3)


def test_hosts_and_slices_hold_copies_unless_told(grid):
    on_hosts = grid(hosts(4, 8), data=None)
    assert on_hosts.shape == (4, 8, 1, 1)
    assert all({d.process_index for d in row.flat} == {n} for n, row in enumerate(on_hosts))
    assert grid(hosts(4, 8), data=1).shape == (1, 32, 1, 1)
    assert grid(hosts(4, 8), data=None, fsdp=32).shape == (1, 32, 1, 1)
    assert grid(hosts(4, 8), data=None, tensor=8).shape == (4, 1, 8, 1)
    assert grid(hosts(4, 2), data=None, tensor=4).shape == (2, 1, 4, 1)
    on_slices = grid(tpu(4, 4, slices=2), data=None)
    assert on_slices.shape == (2, 16, 1, 1)
    assert all({d.slice_index for d in row.flat} == {n} for n, row in enumerate(on_slices))
    assert grid(tpu(4, 4), data=None).shape == (1, 16, 1, 1)  # four hosts, one network
