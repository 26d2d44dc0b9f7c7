"""Builds the parameter tree on its devices from named tensors, each reading its own slices."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxdistill import sharding
from jaxdistill.formats import exchange, slices
from jaxdistill.formats.slices import Buffers, Tensors
from jaxdistill.formats.tensor_names import Part, TensorName, file_dims
from jaxdistill.formats.tensor_table import numbers, tensor_rows
from jaxdistill.models import decoder, host
from jaxdistill.models.architecture import DecoderConfig, Weight, flat_weights, nest, weights
from jaxdistill.models.quantized import Quantization, quantize_in_place


class Source(NamedTuple):
    """What all weights of one loading are read from and with.

    Attributes:
      tensors: where to read.
      dtype: of all weights; None keeps each one's own.
      buffers: memory that readings share.
      caches: from `exchange.page_caches`.
    """

    tensors: Tensors
    dtype: DTypeLike | None
    buffers: Buffers
    caches: tuple[str, ...]

    @classmethod
    def of(cls, tensors: Tensors, mesh: Mesh | None, dtype: DTypeLike | None) -> "Source":
        """That of a loading; all processes of the mesh call it."""
        files = getattr(tensors, "files", ())
        return cls(tensors, dtype, Buffers(), exchange.page_caches(mesh, files))


def placement(config: DecoderConfig, mesh: Mesh | None, rules: Mapping) -> dict:
    """The sharding of every weight by its dotted name; without a mesh the first local device."""
    flat = flat_weights(weights(config))
    if mesh is None:
        return dict.fromkeys(flat, SingleDeviceSharding(jax.local_devices()[0]))
    shapes = {name: jax.ShapeDtypeStruct(row.shape, np.float32) for name, row in flat.items()}
    axes = {name: row.axes for name, row in flat.items()}
    return sharding.shardings(mesh, axes, shapes, rules)


def assemble(
    config: DecoderConfig,
    tensors: Tensors,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Mapping = sharding.RULES,
    rounded: Quantization | None = None,
    offload: bool = False,
) -> dict:
    """The parameter tree read from `tensors`.

    A host holds at most the slices of one weight that its own devices need: layers are stacked and
    kernels turned to [in, out] slice by slice. Devices hold no more of what is rounded: a kernel
    is rounded before the next one is read.

    Args:
      config: the configuration; every tensor it asks for must be there with its shape.
      tensors: where to read.
      dtype: dtype of all weights; None keeps each one's own.
      mesh: None puts all on one device.
      rules: table from logical axes to mesh axes.
      rounded: which kernels of the layers, and to which numbers; None leaves them as they are.
      offload: whether the layers wait in the memory of the devices' host, moved as they are read.

    Raises:
      ConfigError: if groups do not divide a projection.
    """
    places = placement(config, mesh, rules)
    flat: dict[str, Any] = {}
    source = Source.of(tensors, mesh, dtype)
    for ours, (name, row) in tensor_rows(config).items():
        read: Any = weight(name, row, name.part(ours, config), places[ours], source)
        if rounded is not None and (scheme := rounded.of(ours)) is not None:
            read = quantize_in_place(read, scheme)
        flat[ours] = host.moved(read) if offload and host.waits(ours) else read
    return nest(flat)


def weight(
    name: TensorName,
    row: Weight,
    part: Part | None,
    place: Sharding,
    source: Source,
) -> jax.Array:
    """One weight of the tree: the slices of this process's devices, or as many bytes of rows.

    Args:
      name: what the file calls it.
      row: its shape.
      part: of the file's tensor; None: all.
      place: where it lies.
      source: where to read.
    """
    tensors, dtype, buffers, caches = source
    dtypes = {tensors.dtype(name.pattern.format(*index)) for index in numbers(name, row)}
    # Layers of several dtypes, and float64, meet in float32.
    own = dtypes.pop() if len(dtypes) == 1 and np.dtype(np.float64) not in dtypes else np.float32
    chosen = np.dtype(dtype or own)
    read = lambda found: slices.read(name, part, found, tensors, chosen, buffers)
    rows, columns = file_dims(name, row)
    return exchange.array(row.shape, place, read, rows, columns, chosen, caches)


def random(config, seed=0, dtype=np.float32, mesh=None, rules: Mapping = sharding.RULES) -> dict:
    """Random parameters, made on the devices where they stay: the same numbers on any mesh."""
    places = nest(placement(config, mesh, rules))
    make = jax.jit(decoder.init, static_argnums=(0, 2), out_shardings=places)
    return make(config, jax.random.key(seed), np.dtype(dtype))
