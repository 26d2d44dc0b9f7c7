"""Per model family the table: Hugging Face configuration fields and tensor names <-> ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdistill.formats import tensor_names
from jaxdistill.formats.tensor_names import Names


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` differs from the common table.

    Attributes:
      architecture: the transformers class that opens a saved folder.
      published: models that are of it, for people.
      assumed: its configuration defaults where they differ from the common ones.
      names: of its tensors.
      features: our fields that it fixes.
      read: our fields -> configuration fields that set them, beyond the common ones.
      renamed: common configuration fields -> what this family calls them.
      aliases: what else transformers calls a field -> the common name.
      absent: common configuration fields that it lacks.
      only: fields that change the mathematics -> the values under which this decoder is the same.
      ignored: fields that change nothing in a forward pass.
      windowed: "never"; "all" layers where `sliding_window` is set; "listed": or those that
        `layer_types` lists; "switched": only where `use_sliding_window` says so too; "chosen"
        layers; or "pattern": all but every n-th.
      ropes: which kinds of position scaling it has; "partial": its heads may turn in part; "local":
        windows have frequencies of their own; "interleaved": neighbours turn together.
    """

    architecture: str
    published: str
    assumed: Mapping[str, Any]
    names: Names = dataclasses.field(default_factory=lambda: tensor_names.LLAMA)
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Mapping[str, str] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    windowed: str = "never"
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")

    def field(self, common: str) -> str:
        """What this family calls a common configuration field."""
        return self.renamed.get(common, common)


_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_BOTH_BIASES = {"attention_bias": "attention_bias", "attention_out_bias": "attention_bias"}
_ROUTING = ("router_aux_loss_coef", "output_router_logits")  # of a loss that a run weighs
_GEMMA_READ = {
    **_BOTH_BIASES,
    "query_scalar": "query_pre_attn_scalar",
    "attention_softcap": "attn_logit_softcapping",
    "logits_softcap": "final_logit_softcapping",
}
_GEMMA_ASSUMED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA_FEATURES = {"norm": "rms_offset", "post_norm": True, "embedding_scaled": True}
# Folders of models that see as well: their model_type -> that of the text model inside, where
# `text_config` does not say it.
WRAPPERS: Mapping[str, str] = {"gemma3": "gemma3_text", "mistral3": "mistral"}
# What stands before the names of its tensors there -> what stands before them alone.
TEXT_MODEL: Mapping[str, str] = {
    "language_model.": "",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        published="Llama 2 and 3, SmolLM2",
        assumed={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        read={**_BOTH_BIASES, "mlp_bias": "mlp_bias"},
        ignored=("pretraining_tp", "is_llama_config"),
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        published="Mistral",
        assumed={
            "max_position_embeddings": 4096 * 32,
            "sliding_window": 4096,
            "num_key_value_heads": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        windowed="all",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        published="Qwen2, Qwen2.5",
        assumed={**_QWEN, "num_key_value_heads": 32},
        features={"attention_bias": True},
        windowed="chosen",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        published="Qwen3",
        assumed={**_QWEN, "num_key_value_heads": 32, "head_dim": 128},
        features={"qk_norm": True},
        read=_BOTH_BIASES,
        windowed="chosen",
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        published="Gemma 1",
        assumed={
            **{k: v for k, v in _GEMMA_ASSUMED.items() if k in ("head_dim", "bos_token_id")},
            "eos_token_id": 1,
            "pad_token_id": 0,
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 16,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        features={"norm": "rms_offset", "embedding_scaled": True, "activation": "gelu_tanh"},
        read=_BOTH_BIASES,
        only={
            "hidden_act": (
                "gelu_pytorch_tanh",
                "gelu",
            ),  # published as gelu, and meant as the other
            "hidden_activation": ("gelu_pytorch_tanh", "gelu", None),
            "use_bidirectional_attention": (False, None),
        },
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        published="Gemma 2",
        assumed={
            **_GEMMA_ASSUMED,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        names=tensor_names.GEMMA,
        features=_GEMMA_FEATURES,
        read=_GEMMA_READ,
        renamed={"hidden_act": "hidden_activation"},
        only={"use_bidirectional_attention": (False, None), "sliding_window_pattern": (2,)},
        ignored=("hidden_act", "cache_implementation", "sliding_window_size"),
        windowed="pattern",
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        published="Gemma 3 (text)",
        assumed={
            **_GEMMA_ASSUMED,
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        names=tensor_names.GEMMA,
        features={**_GEMMA_FEATURES, "qk_norm": True},
        read=_GEMMA_READ,
        renamed={"hidden_act": "hidden_activation"},
        only={"use_bidirectional_attention": (False, None)},
        ignored=("hidden_act", "cache_implementation"),
        windowed="pattern",
        ropes=("default", "linear", "llama3", "yarn", "local"),
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        published="Phi-3, Phi-4, Phi-4-mini",
        assumed={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        names=tensor_names.PHI3,
        only={
            "attention_bias": (False, None),
            "embd_pdrop": (0, None),
            "resid_pdrop": (0, None),
        },
        ignored=("full_attn_mod", "interpolate_factor"),
        windowed="all",
        ropes=("default", "longrope", "partial"),
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        published="GPT-2",
        assumed={
            "activation_function": "gelu_new",
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
        names=tensor_names.GPT2,
        features={
            "norm": "layer",
            "gated": False,
            "attention_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
        },
        renamed={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        absent=("num_key_value_heads", "head_dim"),
        only={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        ignored=(
            "n_ctx",
            "reorder_and_upcast_attn",
            "attn_pdrop",
            "embd_pdrop",
            "resid_pdrop",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        ),
        ropes=(),
    ),  # fmt: skip
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        published="Pythia, GPT-NeoX",
        assumed={
            "hidden_act": "gelu",
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "use_parallel_residual": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "rotary_pct": 0.25,
        },
        names=tensor_names.GPT_NEOX,
        features={"norm": "layer", "gated": False, "mlp_bias": True},
        read={**_BOTH_BIASES, "parallel": "use_parallel_residual"},
        renamed={
            "rms_norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        absent=("num_key_value_heads", "head_dim"),
        ignored=("hidden_dropout", "classifier_dropout", "attention_dropout"),
        ropes=("default", "linear", "llama3", "yarn", "partial"),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        published="OLMo 2",
        assumed={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 50279,
            "pad_token_id": 1,
        },
        names=tensor_names.OLMO2,
        features={"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_whole": True},
        read=_BOTH_BIASES,
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        published="OLMo 3",
        assumed={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "eos_token_id": 50279,
            "pad_token_id": 1,
        },
        names=tensor_names.OLMO2,
        features={"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_whole": True},
        read=_BOTH_BIASES,
        only={"sliding_window_pattern": (4,)},
        windowed="pattern",
        ropes=("default", "linear", "llama3", "yarn", "local"),
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        published="SmolLM3",
        assumed={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
        read={**_BOTH_BIASES, "mlp_bias": "mlp_bias"},
        only={"use_sliding_window": (False, None)},
        ignored=("sliding_window", "max_window_layers", "pretraining_tp"),
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        published="Granite 3 and 4 (dense)",
        assumed={
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        read={
            **_BOTH_BIASES,
            "mlp_bias": "mlp_bias",
            "embedding_multiplier": "embedding_multiplier",
            "residual_multiplier": "residual_multiplier",
            "attention_multiplier": "attention_multiplier",
            "logits_divisor": "logits_scaling",
        },
    ),
    "ministral": Family(
        architecture="MinistralForCausalLM",
        published="Ministral 8B",
        assumed={
            "max_position_embeddings": 4096 * 32,
            "sliding_window": 4096,
            "num_key_value_heads": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        windowed="listed",
    ),
    "arcee": Family(
        architecture="ArceeForCausalLM",
        published="Arcee AFM",
        assumed={
            "hidden_act": "relu2",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        features={"gated": False},
        read={**_BOTH_BIASES, "mlp_bias": "mlp_bias"},
    ),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        published="GLM-4 (0414)",
        assumed={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1.5625e-7,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "eos_token_id": [151329, 151336, 151338],
            "pad_token_id": 151329,
        },
        names=tensor_names.GLM4,
        features={"post_norm": True},
        read={"attention_bias": "attention_bias"},
        ropes=("default", "linear", "yarn", "partial", "interleaved"),
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        published="Mixtral",
        assumed={
            "max_position_embeddings": 4096 * 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        names=tensor_names.MIXTRAL,
        renamed={"num_experts": "num_local_experts"},
        absent=("norm_topk_prob",),
        only={"router_jitter_noise": (0, None)},
        ignored=_ROUTING,
        windowed="all",
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        published="Qwen3-MoE",
        assumed={
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        names=tensor_names.QWEN3_MOE,
        features={"qk_norm": True},
        read=_BOTH_BIASES,
        renamed={"intermediate_size": "moe_intermediate_size"},
        aliases={"num_local_experts": "num_experts"},
        only={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
        ignored=(*_ROUTING, "intermediate_size", "max_window_layers"),
        windowed="switched",
    ),
}
