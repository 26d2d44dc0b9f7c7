"""Reads rows, which lie together in files, where processes need columns, and exchanges them.

A column of a row-major tensor lies in runs as short as its part of a row, and a disk gives pages:
processes that each need some columns would all read the whole tensor. So each reads rows of its
own, as many bytes as it needs, and an all-to-all over the mesh turns them into its columns.

Processes of one host that have one file open share its pages: the disk is read once for all of
them, and each takes its columns of what is in memory. They exchange only with other hosts.
"""

import functools
import math
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from jaxdistill import agree
from jaxdistill.formats.slices import Spans
from jaxdistill.sharding import AnyMesh, mesh_axes

Result = TypeVar("Result")
_LEAST = 1 << 16  # numbers of a tensor: a smaller one is read whole sooner than it is exchanged


def array(
    shape: tuple[int, ...],
    place: Sharding,
    read: Callable[[Sequence[Spans]], list[np.ndarray]],
    rows: int | None,
    columns: int,
    dtype: DTypeLike,
    caches: Sequence[str] = (),
) -> jax.Array:
    """The array that `read` gives in slices, of which each process reads those that lie together.

    All processes of the mesh call it, in the same order, where the mesh is that of all. Beside the
    array a device holds as much again while it is exchanged.

    Args:
      shape: of the array.
      place: where it shall lie.
      read: gives the slices at some indices, no two alike; whole numbers in bytes of their own.
      rows: the dim that counts the rows of a file's tensor; None: slices are read as they are.
      columns: the dim that counts inside of a row.
      dtype: of the array; `read` may give another that holds the same numbers.
      caches: from `page_caches`.

    Raises:
      UserError: that of `read` in any process.
    """
    mesh = place.mesh if isinstance(place, NamedSharding) else None
    by_rows = None if rows is None else _by_rows(shape, place, rows, columns, caches)
    if rows is None or by_rows is None:

        def cast(slices: Sequence[Spans]) -> list[np.ndarray]:
            blocks = read(slices)
            for number, block in enumerate(blocks):  # one at a time: not all of them twice
                blocks[number] = block.astype(dtype, copy=False)
            return blocks

        return together(mesh, lambda: _placed(shape, place, cast))
    lying = together(mesh, lambda: _placed(shape, by_rows, read))
    turned = _turning(by_rows, place, rows, columns, np.dtype(dtype))(lying)
    return jax.block_until_ready(turned)  # Gloo mixes up two programs that run at once


def _placed(
    shape: tuple[int, ...], place: Sharding, read: Callable[[Sequence[Spans]], list[np.ndarray]]
) -> jax.Array:
    """The array of the slices that lie here; replicas on this host's devices share one."""
    here = place.addressable_devices_indices_map(shape).values()
    slices = {str(spans): spans for spans in (_spans(index, shape) for index in here)}
    blocks = dict(zip(slices, read(list(slices.values())), strict=True))
    return jax.make_array_from_callback(
        shape, place, lambda index: blocks[str(_spans(index, shape))]
    )


def _spans(index: Spans | None, shape: tuple[int, ...]) -> Spans:
    assert index is not None
    return tuple(slice(*one.indices(size)) for one, size in zip(index, shape, strict=True))


def together(mesh: AnyMesh | None, work: Callable[[], Result]) -> Result:
    """Does work on files; on a mesh of all processes it fails in all of them or in none.

    Who fails alone would be waited for where the others exchange.

    Raises:
      UserError: that of `work` in any process.
    """
    return agree.together(work) if _of_all(mesh) else work()


def page_caches(mesh: AnyMesh | None, files: Sequence[pathlib.Path]) -> tuple[str, ...]:
    """The name of each process's page cache of these files, by the number of the process.

    Processes of one host that open the same files have one name. A source without files has a name
    for each process: one column costs it the reading of its whole row.

    Raises:
      OSError: in all processes, where a file is gone in one of them.
    """
    if not _of_all(mesh):
        return ()

    def name() -> str:
        if not files:
            return str(jax.process_index())
        found = [file.stat() for file in files]
        return f"{_host()} {sorted((one.st_dev, one.st_ino) for one in found)}"

    return tuple(agree.everyone(agree.together(name)))


def _host() -> str:
    """What tells this running system from any other."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")  # of Linux
    return boot.read_text().strip() if boot.is_file() else f"{uuid.getnode()}"


def _of_all(mesh: AnyMesh | None) -> bool:
    if not isinstance(mesh, Mesh):
        return False
    return len({device.process_index for device in mesh.devices.flat}) == jax.process_count()


def _by_rows(
    shape: tuple[int, ...], place: Sharding, rows: int, columns: int, caches: Sequence[str]
) -> NamedSharding | None:
    """Where the devices that share rows have each some of these whole; None: as they lie.

    That is where the processes of each page cache together need whole rows, where the rows cannot
    be divided so often, and of small tensors.
    """
    if not isinstance(place, NamedSharding) or not _of_all(place.mesh):
        return None
    if shape[rows] * shape[columns] < _LEAST:
        return None
    if _whole_rows(shape, place.devices_indices_map(shape), columns, caches):
        return None
    spec = [mesh_axes(axes) for axes in (*place.spec, *[None] * (len(shape) - len(place.spec)))]
    spec[rows], spec[columns] = spec[rows] + spec[columns], ()
    if shape[rows] % math.prod(place.mesh.shape[axis] for axis in spec[rows]):
        return None
    return NamedSharding(place.mesh, PartitionSpec(*(axes or None for axes in spec)))


def _whole_rows(
    shape: tuple[int, ...],
    needed: Mapping[Any, Spans | None],
    columns: int,
    caches: Sequence[str] = (),
) -> bool:
    """Whether the processes of each page cache together need all of every row that one needs."""
    parts: dict[tuple, set[tuple[int, int, int]]] = {}
    for device, index in needed.items():
        assert index is not None
        spans = [one.indices(size) for one, size in zip(index, shape, strict=True)]
        own = spans.pop(columns)
        process = device.process_index
        parts.setdefault((caches[process] if caches else process, *spans), set()).add(own)
    sizes = (sum(stop - start for start, stop, _ in one) for one in parts.values())
    return all(size == shape[columns] for size in sizes)


@functools.cache
def _turning(
    by_rows: NamedSharding, place: NamedSharding, rows: int, columns: int, dtype: np.dtype
) -> Callable[[jax.Array], jax.Array]:
    """The program that lays rows out as columns, by an all-to-all among devices that share rows.

    Stacked tensors go one by one: the devices need no room for all of them on their way.
    """
    axes = mesh_axes(place.spec[columns])

    def exchanged(bits: jax.Array, before: int = 0) -> jax.Array:
        if min(rows, columns) > before:
            return jax.lax.map(lambda one: exchanged(one, before + 1), bits)
        return jax.lax.all_to_all(bits, axes, columns - before, rows - before, tiled=True)

    def turned(block: jax.Array) -> jax.Array:
        # As whole numbers: of others XLA may change the bits of a NaN.
        bits = jax.lax.bitcast_convert_type(block, f"uint{8 * block.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(exchanged(bits), block.dtype).astype(dtype)

    local = jax.shard_map(
        turned,
        mesh=place.mesh,
        in_specs=by_rows.spec,
        out_specs=place.spec,
        check_vma=False,
    )
    return jax.jit(local, out_shardings=place)
