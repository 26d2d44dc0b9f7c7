"""The configuration of a GGUF file out of its metadata and the shapes of its tensors."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill.errors import ModelError
from jaxdistill.formats import gguf_layout
from jaxdistill.formats.config_json import read_config
from jaxdistill.formats.families import FAMILIES
from jaxdistill.models import rope
from jaxdistill.models.architecture import DecoderConfig

ROPE_FACTORS = "rope_freqs.weight"
_BAND = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Description:
    """What a file says of its model.

    Args:
      metadata: values by key.
      shapes: of its tensors, by name.
      factors: the numbers of `ROPE_FACTORS`, where there are some.
      where: the file, for messages.

    Raises:
      ModelError: for an architecture that is not read.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        factors: np.ndarray | None,
        where: str,
    ):
        self.metadata, self.shapes, self.factors, self.where = metadata, shapes, factors, where
        self.architecture = metadata.get("general.architecture")
        if self.architecture not in gguf_layout.ARCHITECTURES:
            raise ModelError(
                f"{where}: general.architecture: {self.architecture!r} is not supported; "
                f"supported: {', '.join(gguf_layout.ARCHITECTURES)}"
            )
        window, experts = self.setting("attention.sliding_window"), self.setting("expert_count")
        self.family = gguf_layout.family_of(self.architecture, window, experts)
        self._check_settings()

    def setting(self, name: str, default: Any = None) -> Any:
        """A metadata value of the architecture, float32 values as their shortest decimal."""
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _check_settings(self) -> None:
        """No setting changes the mathematics of an architecture that is read without it."""
        layout = gguf_layout.LAYOUTS[self.family]
        for name, word in gguf_layout.MATTERS.items():
            value = self.setting(name)
            told = name in layout.settings.values() or value == layout.fixed.get(word)
            if value and not told:
                raise ModelError(
                    f"{self.where}: {self.architecture}.{name}: {value}: llama.cpp computes with "
                    f"it, and {self.family} is read here without: use the model's folder"
                )

    def config(self) -> DecoderConfig:
        """The configuration, through the same checks as a config.json.

        Raises:
          ModelError: for settings that are not supported, or out of range.
        """
        table = self.shapes.get("token_embd.weight")
        raw = {
            "model_type": self.family,
            "vocab_size": None if table is None else table[0],
            **gguf_layout.words_of(self.family, self.setting),
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._stops(),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }
        biases = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}
        for word, tensor in biases.items():
            if word in FAMILIES[self.family].read.values():
                fused = "blk.0.attn_qkv.bias" if tensor == "attn_q" else ""
                raw[word] = f"blk.0.{tensor}.bias" in self.shapes or fused in self.shapes
        size = self._head_dim()
        if "head_dim" not in FAMILIES[self.family].absent:
            raw["head_dim"] = size
        if gguf_layout.LAYOUTS[self.family].partial and size:
            share = self.setting("rope.dimension_count", size) / size
            raw[FAMILIES[self.family].field("partial_rotary_factor")] = share
        if FAMILIES[self.family].ropes:
            raw |= self._rope(size)
        return read_config(raw, f"{self.where}: metadata, in the words of config.json")

    def _head_dim(self) -> int | None:
        heads, embed = self.setting("attention.head_count"), self.setting("embedding_length")
        size = self.setting("attention.key_length")
        others = ["attention.value_length"]
        if not gguf_layout.LAYOUTS[self.family].partial:
            others.append("rope.dimension_count")
        settings = {name: self.setting(name) for name in others}
        if size is None and isinstance(heads, int) and isinstance(embed, int) and heads > 0:
            size = embed // heads
        for name, other in settings.items():
            if other is not None and other != (self.setting("attention.key_length") or size):
                raise ModelError(
                    f"{self.where}: {self.architecture}.{name}: {other} differs from the head "
                    f"size {size}, which is not supported"
                )
        return size

    def _stops(self) -> list[int] | None:
        """Ends of text, of turn and of message, where they are several tokens."""
        keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
        stops = [self.metadata[key] for key in keys if self.metadata.get(key) is not None]
        return list(dict.fromkeys(stops)) or None

    def _rope(self, head_dim: int | None) -> dict[str, Any]:
        """Position settings; Llama 3.1's are a tensor of factors that must match its formula."""
        theta = self.setting("rope.freq_base", 10_000.0)
        kind = self.setting("rope.scaling.type", "none")
        if kind not in ("none", "linear", "yarn"):
            raise ModelError(
                f"{self.where}: {self.architecture}.rope.scaling.type: {kind!r} is not supported; "
                "supported: none, linear, yarn"
            )
        table: dict[str, Any] | None = None
        if kind != "none":
            length = self.setting("rope.scaling.original_context_length")
            table = {"rope_type": kind, "factor": self.setting("rope.scaling.factor")}
            if kind == "yarn":
                table["original_max_position_embeddings"] = length
                table["attention_factor"] = self.setting("rope.scaling.attn_factor")
        elif self.factors is not None and head_dim:
            table = self._llama3(self.factors, theta, head_dim)
        return {FAMILIES[self.family].field("rope_theta"): theta, "rope_scaling": table}

    def _llama3(self, given: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
        given = given.reshape(-1).astype(np.float64)
        factor = float(given.max())
        plain, _ = rope.frequencies(rope.Rope(theta=theta), head_dim)
        scaled, _ = rope.frequencies(rope.Rope(theta, "llama3", factor, 8192, 1.0, 4.0), head_dim)
        if given.shape != plain.shape or not np.allclose(plain / scaled, given, rtol=1e-4):
            raise ModelError(
                f"{self.where}: {ROPE_FACTORS}: its factors are not those of Llama 3.1 scaling "
                f"(factor {factor:g}, band 1 to 4 of 8192 tokens); use the safetensors folder"
            )
        return {"rope_type": "llama3", "factor": factor, **_BAND}
