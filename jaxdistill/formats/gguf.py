"""Reads GGUF files: configuration from metadata, weights dequantised row by row, tokenizer."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxdistill.errors import ModelError
from jaxdistill.formats import exchange, gguf_layout
from jaxdistill.formats.assemble import assemble
from jaxdistill.formats.gguf_config import ROPE_FACTORS, Description
from jaxdistill.formats.gguf_header import read_header
from jaxdistill.formats.gguf_tokenizer import build_tokenizer
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.model import Model
from jaxdistill.models.quantized import Quantization
from jaxdistill.sharding import RULES

# Quantisation types whose dequantisation the tests compare with a second implementation.
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


def load_file(
    path: pathlib.Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Mapping = RULES,
    tokenizer: bool = True,
    rounded: Quantization | None = None,
    offload: bool = False,
) -> Model:
    """The model of one GGUF file.

    Args:
      path: the file.
      dtype: dtype of the parameters; None is float32, which holds every supported type's values.
      mesh: where the parameters lie; each device dequantises only the rows it needs.
      rules: table from logical axes to mesh axes.
      tokenizer: also build the tokenizer from the metadata.
      rounded: which of its kernels, and to which numbers, as they are read; None: none.
      offload: whether the layers wait in the memory of the devices' host.

    Raises:
      ConfigError: if groups do not divide a projection.
      ModelError: where the gguf package is missing, or the file is damaged or of an unsupported
        architecture or quantisation.
    """
    file = exchange.together(mesh, lambda: _checked(path))
    config = file.config
    params = assemble(
        config, file, dtype=dtype, mesh=mesh, rules=rules, rounded=rounded, offload=offload
    )
    jax.block_until_ready(params)
    built = build_tokenizer(file.metadata, str(path)) if tokenizer else None
    return Model(config=config, params=params, tokenizer=built, source=str(path))


def _checked(path: pathlib.Path) -> "_GgufFile":
    file = _GgufFile(path)
    file.check_tensors()
    return file


def file_spec(path: pathlib.Path, *, tokenizer: bool = True) -> tuple[DecoderConfig, Any]:
    """(configuration, tokenizer or None) of a GGUF file, without its weights."""
    file = _GgufFile(path)
    return file.config, build_tokenizer(file.metadata, str(path)) if tokenizer else None


class _GgufFile:
    """One open GGUF file: metadata as plain values, tensors under their Hugging Face names."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.metadata, self.tensors = read_header(path)
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise ModelError(
                f"{path}: is one part of a split file: join it with gguf-split --merge"
            )
        shapes = {name: place.shape for name, place in self.tensors.items()}
        factors = self._rows(ROPE_FACTORS, slice(None)) if ROPE_FACTORS in shapes else None
        described = Description(self.metadata, shapes, factors, str(path))
        self.layout = gguf_layout.LAYOUTS[described.family]
        self.config = described.config()
        self._heads = {"attn_q": self.config.heads, "attn_k": self.config.kv_heads}
        self._names: dict[str, str] = {}

    def check_tensors(self) -> None:
        """Every tensor is there, in its shape and a supported type, and none is left over."""
        expected = gguf_layout.file_shapes(self.config)
        missing = [name for name in expected if name not in self.tensors]
        unknown = [name for name in self.tensors if name not in (*expected, ROPE_FACTORS)]
        for problem, names in (("missing", missing), ("unknown", unknown)):
            if names:
                raise ModelError(
                    f"{self.path}: {len(names)} {problem} tensors for {self.layout.architecture} "
                    f"of {self.config.layers} layers, such as {', '.join(names[:5])}"
                )
        for name, shape in expected.items():
            place = self.tensors[name]
            if place.kind not in KINDS:
                raise ModelError(
                    f"{self.path}: {name} is of type {place.kind}; supported: {', '.join(KINDS)}; "
                    "requantise the model, or use its safetensors folder"
                )
            if place.shape != shape:
                raise ModelError(
                    f"{self.path}: {name} has shape {list(place.shape)}, expected {list(shape)}"
                )

    def dtype(self, name: str) -> np.dtype:
        """Everything is dequantised to float32."""
        return np.dtype(np.float32)

    def read(
        self, name: str, index: tuple[slice, ...], memory: np.ndarray | None = None
    ) -> np.ndarray:
        """The slice `index` of the tensor with this Hugging Face name, in that layout."""
        name, expert = gguf_layout.stacked(name)
        if name not in self._names:
            self._names[name] = gguf_layout.name_of(self.layout, self.config.layers, name)
        name = self._names[name]
        shape = self.tensors[name].shape
        size, stem = shape[0] if expert is None else shape[1], name.split(".")[-2]
        if len(index) == 2 and gguf_layout.turned_over(self.layout, name, shape):
            columns, chosen = index
            return self._rows(name, np.arange(size)[chosen])[:, columns].T
        rows = np.arange(size)[index[0]]
        if self.layout.pairs and stem in self._heads:
            rows = gguf_layout.interleaved(rows, size // self._heads[stem])
        if self.layout.by_part and stem == "attn_qkv":
            rows = gguf_layout.part_by_part(rows, self.config.heads, self.config.head_dim)
        if len(index) == 1:  # a vector is one row in the file
            vector = self._rows(name, slice(None)).reshape(-1)[rows]
            return vector - 1.0 if self.layout.offset_norms and stem.endswith("norm") else vector
        return self._rows(name, rows + size * (expert or 0))[:, index[1]]

    def _rows(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        """Rows of a tensor as the file has them, dequantised to float32."""
        from gguf import GGMLQuantizationType, quants

        place = self.tensors[name]
        count = math.prod(place.shape[:-1])
        packed = np.memmap(self.path, np.uint8, "r", place.start, (count, place.row_bytes))
        return quants.dequantize(packed[rows], GGMLQuantizationType[place.kind])
