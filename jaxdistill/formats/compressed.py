"""Quantised folders in the compressed-tensors format, which vLLM and transformers read too.

    pack-quantized   weights alone: weight_packed int32 [out, in * bits / 32], lowest bits first,
                     offset by 2 ** (bits - 1); weight_scale [out, groups]; weight_shape
    int-quantized    weights int8 [out, in] and weight_scale [out, 1]; inputs by token, dynamic
    float-quantized  weights float8_e4m3fn [out, in] and weight_scale [out, 1]

int8 and int4 are written as the first, int8_dynamic as the second, float8 and float8_dynamic as the
third. Other forms are refused. What is not rounded has its tensor as in any folder.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from jaxdistill.errors import ModelError
from jaxdistill.formats import exchange, shards, slices
from jaxdistill.formats.assemble import Source, placement, weight
from jaxdistill.formats.compressed_settings import form
from jaxdistill.formats.slices import Spans
from jaxdistill.formats.tensor_names import TensorName, file_shape
from jaxdistill.formats.tensor_table import numbers, tensor_rows
from jaxdistill.models.architecture import DecoderConfig, Weight, nest
from jaxdistill.models.quantized import Quantization, QuantizedKernel, Scheme, scale_place


def file_tensors(
    config: DecoderConfig, flat: Mapping[str, Any], dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a quantised folder with its name, one at a time.

    Args:
      config: the model's.
      flat: parameters by dotted name; kernels of the layers are `QuantizedKernel`.
      dtype: of all that is not a whole number.
    """
    for ours, (name, row) in tensor_rows(config).items():
        leaf = flat[ours]
        stacked = ours.startswith("layers.")
        for layer in range(row.shape[0] if stacked else 1):
            base = name.pattern.format(layer)
            if isinstance(leaf, QuantizedKernel):
                values = np.asarray(leaf.values[layer]).T
                values = values.astype(np.int8) if leaf.scheme.kind == "int" else values
                scale = np.asarray(leaf.scale[layer]).T.astype(dtype)
                yield from _kernel_tensors(base, values, scale, leaf)
            else:
                one = np.asarray(leaf[layer] if stacked else leaf).astype(dtype)
                yield base, one.T if name.transposed else one


def _kernel_tensors(base, values, scale, leaf) -> Iterator[tuple[str, np.ndarray]]:
    stem = base.removesuffix("weight")
    if form(leaf.scheme) != "pack-quantized":
        yield base, values
    else:
        yield stem + "weight_packed", pack(values, leaf.scheme.bits)
        yield stem + "weight_shape", np.asarray(values.shape, np.int64)
    yield stem + "weight_scale", scale


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers [out, in] as int32 words [out, ceil(in * bits / 32)], lowest bits first.

    >>> pack(np.array([[-8, -7, 0, 7]], np.int8), 4).tolist()
    [[63504]]
    """
    each = 32 // bits
    rows, columns = values.shape
    wide = np.zeros((rows, -(-columns // each) * each), np.uint32)
    wide[:, :columns] = values.astype(np.int32) + (1 << (bits - 1))
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    words = wide.reshape(rows, -1, each) << shifts
    return np.bitwise_or.reduce(words, axis=-1).view(np.int32)


def unpack(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The whole numbers [out, in] of `pack`.

    >>> unpack(np.array([[63504]], np.int32), 4, 4).tolist()
    [[-8, -7, 0, 7]]
    """
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    values = fields.reshape(len(words), -1)[:, :columns].astype(np.int32)
    return (values - (1 << (bits - 1))).astype(np.int8)


def load_params(
    config: DecoderConfig,
    files: shards.Folder,
    rounded: Quantization,
    *,
    dtype: DTypeLike | None,
    mesh: Mesh | None,
    rules: Mapping,
) -> dict:
    """The parameters of a quantised folder, kernels as `QuantizedKernel`.

    Every process reads its slices alone, as `assemble` does; scales lie beside them.
    """
    places = placement(config, mesh, rules)
    flat: dict[str, Any] = {}
    source = Source.of(files, mesh, dtype)
    for ours, (name, row) in tensor_rows(config).items():
        if (scheme := rounded.of(ours)) is not None:
            flat[ours] = _kernel(name, row, scheme, places[ours], files, source)
        else:
            flat[ours] = weight(name, row, None, places[ours], source)
    return nest(flat)


def check_tensors(config: DecoderConfig, files: shards.Folder, rounded: Quantization) -> None:
    """Every tensor of a quantised folder is there with its shape.

    Raises:
      ModelError: where one is missing or has another shape.
    """
    for ours, (name, row) in tensor_rows(config).items():
        scheme = rounded.of(ours)
        for base in _bases(name, row):
            if scheme is None:
                _check_shape(files, base, file_shape(name, row, None))
                continue
            _, inputs, outputs = row.shape
            _check_shape(files, *_stored(base, scheme, inputs, outputs))
            scale = base.removesuffix("weight") + "weight_scale"
            _check_shape(files, scale, (outputs, inputs // (scheme.group or inputs)))


def _bases(name: TensorName, row: Weight) -> list[str]:
    return [name.pattern.format(*index) for index in numbers(name, row)]


def _kernel(
    name: TensorName,
    row: Weight,
    scheme: Scheme,
    place: Sharding,
    files: shards.Folder,
    source: Source,
) -> QuantizedKernel:
    """One projection of all layers, [layers, in, out]."""
    layers, inputs, outputs = row.shape
    bases = _bases(name, row)
    scales = [base.removesuffix("weight") + "weight_scale" for base in bases]
    scale_shape = (layers, inputs // (scheme.group or inputs), outputs)

    def values(wanted: Sequence[Spans]) -> list[np.ndarray]:
        if form(scheme) != "pack-quantized":
            return slices.read(name, None, wanted, files, files.dtype(bases[0]), source.buffers)
        return [
            np.stack([_unpacked(files, base, scheme, rows, columns) for base in bases[layers]])
            for layers, rows, columns in wanted
        ]

    def scale(wanted: Sequence[Spans]) -> list[np.ndarray]:
        return [
            np.stack([files.read(name, (columns, groups)).T for name in scales[layers]])
            for layers, groups, columns in wanted
        ]

    there = scale_place(place, scale_shape)
    return QuantizedKernel(
        exchange.array(row.shape, place, values, 2, 1, scheme.dtype, source.caches),
        exchange.array(scale_shape, there, scale, None, 1, source.dtype or files.dtype(scales[0])),
        scheme,
    )


def _stored(base: str, scheme: Scheme, inputs: int, outputs: int) -> tuple[str, tuple[int, int]]:
    """Name and shape of the tensor that holds a projection's rounded numbers."""
    if form(scheme) != "pack-quantized":
        return base, (outputs, inputs)
    return base.removesuffix("weight") + "weight_packed", (outputs, -(-inputs * scheme.bits // 32))


def _unpacked(
    files: shards.Folder, base: str, scheme: Scheme, rows: slice, columns: slice
) -> np.ndarray:
    """These inputs and outputs of one projection, [in, out], of which whole words are read."""
    each = 32 // scheme.bits
    first, last = rows.start // each, -(-rows.stop // each)
    name, _ = _stored(base, scheme, 0, 0)
    words = files.read(name, (columns, slice(first, last)))
    values = unpack(words, scheme.bits, (last - first) * each)
    return values[:, rows.start - first * each : rows.stop - first * each].T


def _check_shape(files: shards.Folder, name: str, shape: tuple[int, ...]) -> None:
    entry = files.entries.get(name)
    if entry is None or entry.shape != tuple(shape):
        state = "missing" if entry is None else f"of shape {list(entry.shape)}"
        raise ModelError(f"{files.folder}: {name} is {state}, expected {list(shape)}")


def open_folder(folder: pathlib.Path) -> shards.Folder:
    """The tensors of a quantised folder."""
    return shards.Folder(folder, rounded=True)
