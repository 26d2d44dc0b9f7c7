"""A model's tensors as its files hold them: their names, shapes, and which weights share one."""

import re

import numpy as np

from jaxdistill.formats import tensor_names
from jaxdistill.formats.families import FAMILIES
from jaxdistill.formats.tensor_names import TensorName
from jaxdistill.models.architecture import DecoderConfig, Weight, flat_weights, weights

# Buffers that old exporters wrote beside the weights; they follow from the configuration.
HARMLESS_TENSORS = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias)$")


def tensor_rows(config: DecoderConfig) -> dict[str, tuple[TensorName, Weight]]:
    """Our dotted weight name -> its name in the file and its row of the table."""
    names = FAMILIES[config.family].names
    rows = flat_weights(weights(config))
    return {ours: (names[ours], row) for ours, row in rows.items()}


def file_rows(config: DecoderConfig) -> dict[str, dict[str, tuple[TensorName, Weight]]]:
    """The rows by the pattern of their file's tensor: several where it is fused."""
    tensors: dict[str, dict[str, tuple[TensorName, Weight]]] = {}
    for ours, (name, row) in tensor_rows(config).items():
        tensors.setdefault(name.pattern, {})[ours] = (name, row)
    return tensors


def numbers(name: TensorName, row: Weight) -> list[tuple[int, ...]]:
    """Of a weight's tensors in the file: (), or layers, or layers with their experts."""
    return list(np.ndindex(*row.shape[: name.stacked]))


def expected_tensors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a folder of this model holds, with its shape there."""
    expected = {}
    for pattern, rows in file_rows(config).items():
        ours, (name, row) = next(iter(rows.items()))
        shape = tensor_names.file_shape(name, row, name.part(ours, config))
        for index in numbers(name, row):
            expected[pattern.format(*index)] = shape
    return expected


def head_name(config: DecoderConfig) -> str:
    """The file's name of a head, tied ones included."""
    return FAMILIES[config.family].names["head"].pattern


def root_name(config: DecoderConfig) -> str:
    """What all names but the head's begin with; files of a model without its head lack it."""
    return FAMILIES[config.family].names["embedding"].pattern.partition(".")[0] + "."
