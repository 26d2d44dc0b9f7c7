"""The mesh, and the one table from logical axes to mesh axes."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdistill.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "context")  # of every mesh
EXPERT = "expert"  # between fsdp and tensor, of a mesh with more than one part of experts
BATCH_AXES = ("data", "fsdp", EXPERT)
PARAMETER_AXES = ("fsdp", EXPERT)

MeshAxes = str | tuple[str, ...] | None
HOST = "pinned_host"  # the memory of a device's host that the device can address

AnyMesh = Mesh | AbstractMesh  # real devices, or the mesh in context while a function is traced

# Parameters name the first block, activations the second. Two dims of one array never land on the
# same mesh axis, because no array has two of "embed", or two of "heads, kv_heads, mlp,
# experts, vocab"; where a dim before took one of several axes, as "experts" does, the others are
# left. What divides experts divides the rows and the other parameters, too.
RULES: Mapping[str, MeshAxes] = {
    "embed": PARAMETER_AXES,
    "vocab": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "experts": (EXPERT, "tensor"),
    "expert_mlp": None,
    "routes": None,
    "positions": None,
    "layers": None,
    "batch": BATCH_AXES,
    "length": "context",
    "length_between": ("context", "tensor"),
    "act_embed": None,
    "act_mlp": "tensor",
    "act_heads": "tensor",
}

# How a teacher's parameters may lie: as the student's; over the copies too, which only a gradient
# would need; or whole on every device, so that they cross no mesh.
TEACHER_RULES: Mapping[str, Mapping[str, MeshAxes]] = {
    "fsdp": RULES,
    "all": {**RULES, "embed": ("data", *PARAMETER_AXES)},
    "whole": {**RULES, "embed": None},
}
# The same where the layers' weights were brought together before: `constrain_weight`.
GATHERED: Mapping[str, MeshAxes] = {**RULES, "layer_embed": None}


def make_mesh(
    data: int | None = 1,
    fsdp: int = -1,
    tensor: int = 1,
    context: int = 1,
    expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh with axes data, fsdp, tensor and context; one size may be -1: all that is left.

    Behind fsdp it has the axis expert where that is not 1.

    Args:
      data: None takes as many as there are fast networks (hosts of GPUs, slices of a TPU) where
        another axis is -1, and is otherwise 1.
      fsdp: parts of parameters and batch.
      tensor: parts of heads, MLP and vocabulary.
      context: parts of rows.
      expert: parts of the experts of each layer, and of all that fsdp divides.
      devices: None takes all.

    Raises:
      ConfigError: if the sizes do not multiply to the number of devices, or no such grid exists.
    """
    devices = list(jax.devices() if devices is None else devices)
    given = {"fsdp": fsdp, EXPERT: expert, "tensor": tensor, "context": context}
    if data is None:
        others = math.prod(size for size in given.values() if size > 0)
        free = -1 in given.values()
        data = math.gcd(_networks(devices)[0], max(1, len(devices) // others)) if free else 1
    sizes = {"data": data, **given}
    if expert == 1:
        del sizes[EXPERT]
    shown = ", ".join(f"{axis}: {size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    wrong = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    if wrong or len(open_axes) > 1:
        raise ConfigError(
            f"mesh: {{{shown}}}: every size must be at least 1, and at most one may be -1 (the "
            "rest of the devices)"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh: {{{shown}}} does not divide the {len(devices)} devices: the sizes must "
            "multiply to the number of devices; set one of them to -1 to let it follow, or start "
            "more processes (`jaxdistill launch -n N --devices-per-process M`)"
        )
    return Mesh(_arrange(sizes, devices), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _networks(devices: Sequence[jax.Device]) -> tuple[int, bool]:
    """(fast networks that the devices belong to, whether these end at the host).

    A TPU slice is one fast network, however many hosts it has; elsewhere it ends at the host.
    """
    by_host = _ends_at_host(devices)
    return len(set(networks(devices))), by_host


def networks(devices: Sequence[Any]) -> list[int]:
    """Of each device the number of the fast network that it belongs to."""
    if _ends_at_host(devices):
        return [device.process_index for device in devices]
    return [getattr(device, "slice_index", 0) for device in devices]


def _ends_at_host(devices: Sequence[Any]) -> bool:
    slices = {getattr(device, "slice_index", 0) for device in devices}
    return len(slices) == 1 and devices[0].platform != "tpu"


def _arrange(sizes: Mapping[str, int], devices: list[jax.Device]) -> np.ndarray:
    """Devices in the mesh's shape: slow networks on the first axes, neighbours on the last.

    Axes of a TPU's torus stay whole where that gives the shape; else they are split.

    Raises:
      ConfigError: if the torus cannot be laid out so.
    """
    from jax.experimental import mesh_utils

    shape = tuple(sizes.values())
    granules, by_host = _networks(devices)
    outer = spread(shape, granules)
    inner = tuple(size // parts for size, parts in zip(shape, outer, strict=True))
    if math.prod(outer) == 1 and devices[0].platform == "cpu":
        return np.asarray(devices).reshape(shape)

    def arranged(split: bool) -> np.ndarray:
        if math.prod(outer) == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, process_is_granule=by_host, allow_split_physical_axes=split
        )

    try:
        return arranged(split=False)
    except NotImplementedError:
        pass  # no product of whole axes of the torus
    except AssertionError:
        raise ConfigError(
            f"mesh: the {len(devices)} devices are no whole block of the slice: take as many as "
            "some of its rows or layers have"
        ) from None
    try:
        return arranged(split=True)
    except (NotImplementedError, ValueError) as error:
        named = ", ".join(f"{axis}: {size}" for axis, size in sizes.items())
        raise ConfigError(
            f"mesh: {{{named}}}: the {len(devices)} devices in {granules} fast networks cannot be "
            f"laid out so ({str(error).splitlines()[0][:200]}): take powers of two that multiply "
            "to the sides of the slice"
        ) from None


def spread(shape: Sequence[int], granules: int) -> tuple[int, ...]:
    """How many hosts or slices each mesh axis spans: as many as divide it, the first axis first.

    So `data`, which moves only gradients, takes the slow network, and `tensor` takes it last.

    >>> spread((4, 4, 2, 1), 2), spread((1, 8, 2, 1), 4), spread((2, 1, 8, 1), 4)
    ((2, 1, 1, 1), (1, 4, 1, 1), (2, 1, 2, 1))
    """
    outer = []
    for size in shape:
        outer.append(math.gcd(size, granules))
        granules //= outer[-1]
    return tuple(outer)


def spec(
    logical: Sequence[str | None],
    shape: Sequence[int] | None = None,
    mesh: AnyMesh | None = None,
    rules: Mapping[str, MeshAxes] = RULES,
) -> PartitionSpec:
    """The PartitionSpec of one array; with shape and mesh, dims that do not divide stay whole."""
    entries: list[MeshAxes] = []
    used: list[str] = []
    for dim, name in enumerate(logical):
        wanted = mesh_axes(None if name is None else rules[name])
        axes = present(wanted, mesh) if mesh is not None else wanted
        if len(wanted) > 1:
            axes = tuple(axis for axis in axes if axis not in used)
        if shape is not None and mesh is not None:
            if shape[dim] % math.prod(mesh.shape[axis] for axis in axes):
                axes = ()
        entries.append(axes[0] if len(axes) == 1 else axes or None)
        used += axes
    assert len(used) == len(set(used)), (
        f"{tuple(logical)} puts two dims on one mesh axis: {entries}"
    )
    return PartitionSpec(*entries)


def present(axes: MeshAxes, mesh: AnyMesh) -> tuple[str, ...]:
    """Those of these axes that the mesh has."""
    return tuple(axis for axis in mesh_axes(axes) if axis in mesh.shape)


def row_parts(mesh: AnyMesh) -> int:
    """How many parts the rows of a batch have."""
    return math.prod(mesh.shape[axis] for axis in present(BATCH_AXES, mesh))


def mesh_axes(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of an entry of the rules."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes


def shardings(
    mesh: Mesh, logical_axes: Any, shapes: Any, rules: Mapping[str, MeshAxes] = RULES
) -> Any:
    """A tree of NamedSharding for a tree of logical axes and its tree of shapes."""
    return jax.tree.map(
        lambda shape, axes: NamedSharding(mesh, spec(axes, shape.shape, mesh, rules)),
        shapes,
        logical_axes,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How [B, L] batches lie on the mesh: rows over data, fsdp and expert, length over context."""
    return NamedSharding(mesh, spec(("batch", "length"), mesh=mesh))


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a global batch lie on this process's devices, ascending.

    Processes that differ in the axes of `BATCH_AXES` have different rows; those that differ in the
    others have the same.
    """
    return rows_by_process(mesh, rows).get(jax.process_index(), [])


def rows_by_process(mesh: Mesh, rows: int) -> dict[int, list[int]]:
    """`local_rows` of every process that has devices of the mesh, by its number."""
    found: dict[int, set[int]] = {}
    shape = (rows, mesh.shape["context"])
    for device, place in batch_sharding(mesh).devices_indices_map(shape).items():
        assert place is not None
        found.setdefault(device.process_index, set()).update(range(rows)[place[0]])
    return {process: sorted(found[process]) for process in sorted(found)}


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(
    array: jax.Array, logical: Sequence[str | None], rules: Mapping[str, MeshAxes] = RULES
) -> jax.Array:
    """Pins an activation to the table's layout; without a mesh in context it does nothing."""
    mesh = current_mesh()
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, spec(logical, array.shape, mesh, rules))


def between(array: jax.Array, rules: Mapping[str, MeshAxes] = RULES) -> jax.Array:
    """Pins activations [B, L, D] between blocks: devices of `tensor` have a part of each row.

    What a block adds up over them is left in parts, and norms and sums run on these alone
    (Korthikanti et al. 2022, arXiv 2205.05198). Rows that do not divide are whole on each.
    """
    mesh = current_mesh()
    if mesh is None:
        return array
    parts = math.prod(mesh.shape[axis] for axis in mesh_axes(rules["length_between"]))
    length = "length" if array.shape[1] % parts else "length_between"
    return constrain(array, ("batch", length, "act_embed"), rules)


def within(array: jax.Array, rules: Mapping[str, MeshAxes] = RULES) -> jax.Array:
    """Pins activations [B, L, D] that enter a block: all its devices have the same tokens."""
    mesh = current_mesh()
    if mesh is None or mesh.shape["tensor"] == 1:
        return array
    return constrain(array, ("batch", "length", "act_embed"), rules)


def constrain_weight(
    array: jax.Array, logical: Sequence[str | None], rules: Mapping[str, MeshAxes] = RULES
) -> jax.Array:
    """`constrain` of a layer's weight; by `GATHERED` it stays whole, its gradient is divided."""
    mesh = current_mesh()
    if mesh is None or "layer_embed" not in rules:
        return constrain(array, logical, rules)
    return _divided_back(spec(logical, array.shape, mesh, rules), array)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divided_back(place: PartitionSpec, array: jax.Array) -> jax.Array:
    return array


_divided_back.defvjp(
    lambda place, array: (array, None),
    lambda place, _, slope: (jax.lax.with_sharding_constraint(slope, place),),
)


def by_device(local: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function of attention, run by each device on its own rows and heads.

    mixed(query [B, L, H, E], key [B, L, G, E], value [B, L, G, E], segments [B, L], *rest): rest is
    the same on every device. Without a mesh it is `local` itself; rows or heads that do not divide
    over the devices are whole on each.
    """

    def mixed(query_BLHE, key_BLGE, value_BLGE, segments_BL, *rest):
        mesh = current_mesh()
        if mesh is None:
            return local(query_BLHE, key_BLGE, value_BLGE, segments_BL, *rest)
        whole_rows = query_BLHE.shape[0] % row_parts(mesh) != 0
        batch = None if whole_rows else present(BATCH_AXES, mesh)
        divides = key_BLGE.shape[2] % mesh.shape["tensor"] == 0
        heads = PartitionSpec(batch, None, "tensor" if divides else None, None)
        whole = (PartitionSpec(),) * len(rest)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(heads, heads, heads, PartitionSpec(batch, None), *whole),
            out_specs=heads,
            check_vma=False,
        )(query_BLHE, key_BLGE, value_BLGE, segments_BL, *rest)

    return mixed


def current_mesh() -> AnyMesh | None:
    """The mesh in context if it is one of ours with more than one device, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or set(AXES) - set(mesh.axis_names) or mesh.size == 1:
        return None
    return mesh


def on_mesh(tree: Any) -> contextlib.AbstractContextManager:
    """The context of the mesh that arrays lie on, or nothing on a single device."""
    for leaf in jax.tree.leaves(tree):
        place = getattr(leaf, "sharding", None)
        if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
            return jax.set_mesh(place.mesh)
    return contextlib.nullcontext()
