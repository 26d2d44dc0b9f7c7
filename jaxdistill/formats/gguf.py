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
from jaxdistill.formats import tensor_names
from jaxdistill.formats.assemble import assemble
from jaxdistill.formats.config_json import read_config
from jaxdistill.formats.gguf_header import read_header
from jaxdistill.formats.gguf_tokenizer import build_tokenizer
from jaxdistill.formats.tensor_table import expected_tensors
from jaxdistill.models import rope
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.model import Model
from jaxdistill.models.quantized import Scheme
from jaxdistill.sharding import RULES

# Quantisation types whose dequantisation the tests compare with a second implementation.
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Name in a Hugging Face folder -> name in a GGUF file, without ".weight" and ".bias".
_STEMS: Mapping[str, str] = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}
ROPE_FACTORS = "rope_freqs.weight"


def load_file(
    path: pathlib.Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Mapping = RULES,
    tokenizer: bool = True,
    scheme: Scheme | None = None,
) -> Model:
    """The model of one GGUF file.

    Args:
      path: the file.
      dtype: dtype of the parameters; None is float32, which holds every supported type's values.
      mesh: where the parameters lie; each device dequantises only the rows it needs.
      rules: table from logical axes to mesh axes.
      tokenizer: also build the tokenizer from the metadata.
      scheme: of its kernels, rounded as they are read; None leaves them in floating point.

    Raises:
      ConfigError: if groups of the scheme do not divide a projection.
      ModelError: where the gguf package is missing, or the file is damaged or of an unsupported
        architecture or quantisation.
    """
    file = _File(path)
    config = file.config()
    file.check_tensors(config)
    params = assemble(config, file, dtype=dtype, mesh=mesh, rules=rules, scheme=scheme)
    jax.block_until_ready(params)
    built = build_tokenizer(file.metadata, str(path)) if tokenizer else None
    return Model(config=config, params=params, tokenizer=built, source=str(path))


def file_spec(path: pathlib.Path, *, tokenizer: bool = True) -> tuple[DecoderConfig, Any]:
    """(configuration, tokenizer or None) of a GGUF file, without its weights."""
    file = _File(path)
    return file.config(), build_tokenizer(file.metadata, str(path)) if tokenizer else None


class _File:
    """One open GGUF file: metadata as plain values, tensors under their Hugging Face names."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.metadata, self.tensors = read_header(path)
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{path}: general.architecture: {self.architecture!r} is not supported; supported: "
                f"{', '.join(ARCHITECTURES)}"
            )
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise ModelError(
                f"{path}: is one part of a split file: join it with gguf-split --merge"
            )
        if self.setting("expert_count", 0):
            raise ModelError(
                f"{path}: {self.architecture}.expert_count: {self.setting('expert_count')}: "
                "mixtures of experts are not supported; use a dense model"
            )
        self.heads: dict[str, int] = {}

    def setting(self, name: str, default: Any = None) -> Any:
        """A metadata value of the architecture, float32 values as their shortest decimal."""
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def config(self) -> DecoderConfig:
        """The configuration, through the same checks as a config.json."""
        heads, embed = self.setting("attention.head_count"), self.setting("embedding_length")
        table = self.tensors.get("token_embd.weight")
        window = self.setting("attention.sliding_window")
        family = "mistral" if self.architecture == "llama" and window else self.architecture
        raw = {
            "model_type": family,
            "vocab_size": None if table is None else table.shape[0],
            "hidden_size": embed,
            "intermediate_size": self.setting("feed_forward_length"),
            "num_hidden_layers": self.setting("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.setting("attention.head_count_kv"),
            "rms_norm_eps": self.setting("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self.setting("context_length"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self.tensors,
            "sliding_window": window,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._stops(),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }
        raw["head_dim"] = self._head_dim(heads, embed)
        raw |= self._rope(raw)
        where = f"{self.path}: metadata, in the words of config.json"
        config = read_config(raw, where)
        self.heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
        return config

    def _head_dim(self, heads, embed) -> int | None:
        size = self.setting("attention.key_length")
        sizes = {"attention.value_length": size, "rope.dimension_count": size}
        if size is None and isinstance(heads, int) and isinstance(embed, int) and heads > 0:
            size = embed // heads
        for name in sizes:
            other = self.setting(name)
            if other is not None and other != size:
                raise ModelError(
                    f"{self.path}: {self.architecture}.{name}: {other} differs from the head size "
                    f"{size}, which is not supported"
                )
        return size

    def _stops(self) -> list[int] | None:
        """Ends of text, of turn and of message, where they are several tokens."""
        keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
        stops = [self.metadata[key] for key in keys if self.metadata.get(key) is not None]
        return list(dict.fromkeys(stops)) or None

    def _rope(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Position settings; Llama 3.1's are a tensor of factors that must match its formula."""
        theta = self.setting("rope.freq_base", 10_000.0)
        kind = self.setting("rope.scaling.type", "none")
        if kind not in ("none", "linear", "yarn"):
            raise ModelError(
                f"{self.path}: {self.architecture}.rope.scaling.type: {kind!r} is not supported; "
                "supported: none, linear, yarn"
            )
        table: dict[str, Any] | None = None
        if kind != "none":
            length = self.setting("rope.scaling.original_context_length")
            table = {"rope_type": kind, "factor": self.setting("rope.scaling.factor")}
            if kind == "yarn":
                table["original_max_position_embeddings"] = length
                table["attention_factor"] = self.setting("rope.scaling.attn_factor")
        elif ROPE_FACTORS in self.tensors:
            table = self._llama3(theta, raw["head_dim"])
        return {"rope_theta": theta, "rope_scaling": table}

    def _llama3(self, theta: float, head_dim: int) -> dict[str, Any]:
        given = self._rows(ROPE_FACTORS, slice(None)).reshape(-1).astype(np.float64)
        factor = float(given.max())
        band = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192}
        plain, _ = rope.frequencies(rope.Rope(theta=theta), head_dim)
        scaled, _ = rope.frequencies(
            rope.Rope(theta, "llama3", factor, band["original"], 1.0, 4.0), head_dim
        )
        if given.shape != plain.shape or not np.allclose(plain / scaled, given, rtol=1e-4):
            raise ModelError(
                f"{self.path}: {ROPE_FACTORS}: its factors are not those of Llama 3.1 scaling "
                f"(factor {factor:g}, band 1 to 4 of 8192 tokens); use the safetensors folder"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": band["original"],
        }

    def check_tensors(self, config: DecoderConfig) -> None:
        """Every tensor is there, in its shape and a supported type, and none is left over."""
        expected = {gguf_name(name): shape for name, shape in expected_tensors(config).items()}
        missing = [name for name in expected if name not in self.tensors]
        unknown = [name for name in self.tensors if name not in (*expected, ROPE_FACTORS)]
        for problem, names in (("missing", missing), ("unknown", unknown)):
            if names:
                raise ModelError(
                    f"{self.path}: {len(names)} {problem} tensors for {self.architecture} of "
                    f"{config.layers} layers, such as {', '.join(names[:5])}"
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

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The slice `index` of the tensor with this Hugging Face name, in that layout."""
        name = gguf_name(name)
        size = self.tensors[name].shape[0]
        rows = np.arange(size)[index[0]]
        stem = name.split(".")[-2]
        if self.architecture == "llama" and stem in self.heads:
            rows = interleaved(rows, size // self.heads[stem])
        if len(index) == 1:  # a vector is one row in the file
            return self._rows(name, slice(None)).reshape(-1)[rows]
        return self._rows(name, rows)[:, index[1]]

    def _rows(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        """Rows of a tensor as the file has them, dequantised to float32."""
        from gguf import GGMLQuantizationType, quants

        place = self.tensors[name]
        count = math.prod(place.shape[:-1])
        packed = np.memmap(self.path, np.uint8, "r", place.start, (count, place.row_bytes))
        return quants.dequantize(packed[rows], GGMLQuantizationType[place.kind])


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where llama.cpp keeps these rows: it stores the two halves of each head pair by pair."""
    head, place = rows // head_dim, rows % head_dim
    half, pair = place // (head_dim // 2), place % (head_dim // 2)
    return head * head_dim + pair * 2 + half


def _patterns() -> dict[str, str]:
    patterns = {}
    for name in tensor_names.LLAMA.values():
        stem, _, suffix = name.pattern.rpartition(".")
        patterns[name.pattern] = f"{_STEMS[stem]}.{suffix}"
    return patterns


_PATTERNS = _patterns()


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor with this Hugging Face name."""
    parts = name.split(".")
    layer = next((part for part in parts if part.isdigit()), "")
    pattern = ".".join("{}" if part.isdigit() else part for part in parts)
    return _PATTERNS[pattern].format(layer)
