"""Builds the parameter tree on its devices from named tensors, each reading its own slices."""

import collections
import concurrent.futures
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxdistill import sharding
from jaxdistill.formats import exchange
from jaxdistill.formats.tensor_names import Part, TensorName, file_dims
from jaxdistill.formats.tensor_table import numbers, tensor_rows
from jaxdistill.models import decoder, host
from jaxdistill.models.architecture import DecoderConfig, Weight, flat_weights, nest, weights
from jaxdistill.models.quantized import Quantization, quantize_in_place

_THREADS = 8  # that read the pieces of one weight; copies hold no lock of Python's
_TILE = 192
_ALIGNED = 64  # bytes: where XLA wants a CPU's arrays to begin
_PIECE = 1 << 21  # bytes of a reading: a thread holds no more beside the weight


@runtime_checkable
class Tensors(Protocol):
    """What a folder or a GGUF file offers: slices and dtypes of tensors by their file's names."""

    def read(
        self, name: str, index: tuple[slice, ...], memory: np.ndarray | None = None
    ) -> np.ndarray:
        """The slice `index` of one tensor; it may lie in `memory`, bytes that are free for it."""

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` returns."""


class Pieces:
    """Buffers that the readings of one loading use in turn: the system clears new memory first."""

    def __init__(self) -> None:
        self._free: collections.deque[np.ndarray] = collections.deque()

    @contextlib.contextmanager
    def one(self) -> Iterator[np.ndarray]:
        """Bytes for one reading."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(_PIECE, np.uint8)
        try:
            yield memory
        finally:
            self._free.append(memory)


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
    pieces = Pieces()
    for ours, (name, row) in tensor_rows(config).items():
        read: Any = weight(name, row, name.part(ours, config), tensors, dtype, places[ours], pieces)
        if rounded is not None and (scheme := rounded.of(ours)) is not None:
            read = quantize_in_place(read, scheme)
        flat[ours] = host.moved(read) if offload and host.waits(ours) else read
    return nest(flat)


def weight(
    name: TensorName,
    row: Weight,
    part: Part | None,
    tensors: Tensors,
    dtype: DTypeLike | None,
    place: Sharding,
    pieces: Pieces,
) -> jax.Array:
    """One weight of the tree, each device's slice read by itself, or as rows of as many bytes.

    Args:
      name: what the file calls it.
      row: its shape.
      part: of the file's tensor; None: all.
      tensors: where to read.
      dtype: None keeps its own.
      place: where it lies.
      pieces: memory that its readings share with those of other weights.
    """
    dtypes = {tensors.dtype(name.pattern.format(*index)) for index in numbers(name, row)}
    # Layers of several dtypes, and float64, meet in float32.
    own = dtypes.pop() if len(dtypes) == 1 and np.dtype(np.float64) not in dtypes else np.float32
    chosen = np.dtype(dtype or own)
    read = lambda spans: _read(name, part, spans, tensors, chosen, pieces)
    rows, columns = file_dims(name, row)
    return exchange.array(row.shape, place, read, rows, columns, chosen)


def _read(name: TensorName, part: Part | None, spans, tensors, dtype, pieces) -> np.ndarray:
    """One slice of a stacked weight, pieces of its tensors read by a few threads into place."""
    sizes = [span.stop - span.start for span in spans]
    block = _empty(sizes, dtype)
    outer, inner = spans[: name.stacked], spans[name.stacked :]
    whole = slice(0, sizes[-1]), inner[-1]
    runs = [whole] if part is None else list(part.runs(inner[-1]))
    readings: list[Callable[[], None]] = []
    for index in np.ndindex(*sizes[: name.stacked]):
        tensor = (span.start + at for span, at in zip(outer, index, strict=True))
        file = name.pattern.format(*tensor)
        for here, there in runs:
            place, wanted = block[(*index, ..., here)], (*inner[:-1], there)
            readings += _by_rows(place, tensors, file, wanted, name.transposed, pieces)
    if len(readings) == 1 or not getattr(tensors, "threads", False):
        for reading in readings:
            reading()
        return block
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(reading) for reading in readings]:
            done.result()  # raises what the reading raised
    return block


def _empty(sizes: list[int], dtype: np.dtype) -> np.ndarray:
    """New memory that begins where a CPU's device takes it as it is; other memory is copied."""
    size = math.prod(sizes) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    first = -memory.ctypes.data % _ALIGNED
    return memory[first : first + size].view(dtype).reshape(sizes)


def _by_rows(
    place: np.ndarray,
    tensors: Tensors,
    file: str,
    wanted: tuple[slice, ...],
    turned: bool,
    pieces: Pieces,
) -> Iterator[Callable[[], None]]:
    """Readings of a few rows each, which together do place[:] = a slice of one tensor."""
    over = lambda array: array.T if turned else array
    first, *rest = wanted[::-1] if turned else wanted
    rows, own = over(place), tensors.dtype(file)
    step = max(1, _PIECE * len(rows) // max(1, place.size * own.itemsize))

    def reading(here: np.ndarray, chosen: tuple[slice, ...]) -> None:
        if here.flags.c_contiguous and here.dtype == own:  # as in the file: read right there
            memory = here.reshape(-1).view(np.uint8)
            values = tensors.read(file, chosen, memory)
            if not np.may_share_memory(values, memory):
                _fill(over(here), over(values))
            return
        with pieces.one() as memory:
            _fill(over(here), over(tensors.read(file, chosen, memory)))

    for start in range(0, len(rows), step):
        here = rows[start : start + step]
        chosen = slice(first.start + start, first.start + start + len(here))
        yield functools.partial(reading, here, (chosen, *rest))


def _fill(place: np.ndarray, values: np.ndarray) -> None:
    """place[:] = values, a tile at a time where one of them is turned: both stay in the cache.

    A tile is copied in the file's order first: its lines lie far apart there, often by a power of
    two, and would evict each other from the cache while it is turned. Numbers of 16 bits that stay
    as they are move as whole numbers: NumPy has no fast loop for bfloat16.
    """
    if place.dtype == values.dtype and place.dtype.itemsize == 2:
        place, values = place.view(np.uint16), values.view(np.uint16)
    if place.ndim != 2 or values.flags.c_contiguous:
        place[...] = values
        return
    for row in range(0, place.shape[0], _TILE):
        for column in range(0, place.shape[1], _TILE):
            here = np.s_[row : row + _TILE, column : column + _TILE]
            place[here] = np.ascontiguousarray(values[here].T, dtype=place.dtype).T


def random(config, seed=0, dtype=np.float32, mesh=None, rules: Mapping = sharding.RULES) -> dict:
    """Random parameters, made on the devices where they stay: the same numbers on any mesh."""
    places = nest(placement(config, mesh, rules))
    make = jax.jit(decoder.init, static_argnums=(0, 2), out_shardings=places)
    return make(config, jax.random.key(seed), np.dtype(dtype))
