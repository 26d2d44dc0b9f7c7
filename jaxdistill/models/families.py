"""Per model family the table: Hugging Face configuration defaults and tensor names <-> ours."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxdistill.models.architecture import DecoderConfig, Weight, flat_weights, weights


class TensorName(NamedTuple):
    """The file's name of a weight; `{}` is the layer, `transposed` where the file has [out, in]."""

    pattern: str
    transposed: bool = False


_LAYER = "model.layers.{}."
TENSORS: Mapping[str, TensorName] = {
    "embedding": TensorName("model.embed_tokens.weight"),
    "head": TensorName("lm_head.weight"),
    "final_norm.scale": TensorName("model.norm.weight"),
    "layers.attention_norm.scale": TensorName(_LAYER + "input_layernorm.weight"),
    "layers.mlp_norm.scale": TensorName(_LAYER + "post_attention_layernorm.weight"),
    "layers.attention.query_norm.scale": TensorName(_LAYER + "self_attn.q_norm.weight"),
    "layers.attention.key_norm.scale": TensorName(_LAYER + "self_attn.k_norm.weight"),
    **{
        f"layers.{ours}.{part}": TensorName(_LAYER + f"{theirs}.{name}", part == "kernel")
        for ours, theirs in {
            "attention.query": "self_attn.q_proj",
            "attention.key": "self_attn.k_proj",
            "attention.value": "self_attn.v_proj",
            "attention.out": "self_attn.o_proj",
            "mlp.gate": "mlp.gate_proj",
            "mlp.up": "mlp.up_proj",
            "mlp.down": "mlp.down_proj",
        }.items()
        for part, name in {"kernel": "weight", "bias": "bias"}.items()
    },
}

# Buffers that old exporters wrote beside the weights; they follow from the configuration.
HARMLESS_TENSORS = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` differs from the common table.

    Attributes:
      architecture: the transformers class that opens a saved folder.
      assumed: its configuration defaults where they differ from the common ones.
      biases: our bias flags -> the configuration field that sets them, or a constant.
      qk_norm: RMSNorm on query and key heads.
      windowed: "never", "all" layers where `sliding_window` is set, or "chosen" layers.
    """

    architecture: str
    assumed: Mapping[str, Any]
    biases: Mapping[str, str | bool]
    qk_norm: bool = False
    windowed: str = "never"


_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        assumed={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        biases={
            "attention_bias": "attention_bias",
            "attention_out_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
        },
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        assumed={
            "max_position_embeddings": 4096 * 32,
            "sliding_window": 4096,
            "num_key_value_heads": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        biases={},
        windowed="all",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        assumed={**_QWEN, "num_key_value_heads": 32},
        biases={"attention_bias": True},
        windowed="chosen",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        assumed={**_QWEN, "num_key_value_heads": 32, "head_dim": 128},
        biases={"attention_bias": "attention_bias", "attention_out_bias": "attention_bias"},
        qk_norm=True,
        windowed="chosen",
    ),
}


def tensor_rows(config: DecoderConfig) -> dict[str, tuple[TensorName, Weight]]:
    """Our dotted weight name -> its name in the file and its row of the table."""
    return {ours: (TENSORS[ours], row) for ours, row in flat_weights(weights(config)).items()}


def expected_tensors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a folder of this model holds, with its shape there."""
    expected = {}
    for ours, (name, row) in tensor_rows(config).items():
        stacked = ours.startswith("layers.")
        shape = row.shape[1:] if stacked else row.shape
        shape = shape[::-1] if name.transposed else shape
        for layer in range(config.layers if stacked else 1):
            expected[name.pattern.format(layer)] = shape
    return expected
