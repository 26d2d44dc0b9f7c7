"""Tiny models of the families beyond Llama's form: configurations as the Hub has them, weights."""

import pathlib

import jax
import numpy as np

from jaxdistill import models
from jaxdistill.formats.config_json import read_config

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_IDS,
}
_GEMMA = {
    **_SMALL,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "cache_implementation": "hybrid",
}
_NEOX = {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"}
_EXPERTS = {**_SMALL, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
CASES = {
    "gemma2": {
        "model_type": "gemma2",
        **_GEMMA,
        "hidden_act": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "num_hidden_layers": 4,
        "sliding_window_pattern": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {
        "model_type": "phi3",
        **_SMALL,
        "sliding_window": 6,
        "original_max_position_embeddings": 64,
        "embd_pdrop": 0.0,
    },
    "phi3_partial": {"model_type": "phi3", **_SMALL, "partial_rotary_factor": 0.75},
    "phi3_longrope": {
        "model_type": "phi3",
        **_SMALL,
        "original_max_position_embeddings": 32,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.5],
            "long_factor": [1.0, 2.5, 4.0, 11.0],
        },
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 36,
        "n_head": 3,
        "n_layer": 3,
        "n_ctx": 64,
        "n_positions": 64,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "task_specific_params": {"text-generation": {"do_sample": True}},
        **_IDS,
    },
    "pythia": {
        "model_type": "gpt_neox",
        **_NEOX,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "layer_norm_eps": 1e-5,
    },
    "neox_serial": {
        "model_type": "gpt_neox",
        **_NEOX,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_fast",
    },
    "olmo2": {"model_type": "olmo2", **_SMALL, "rope_theta": 500000},
    "olmo3": {
        "model_type": "olmo3",
        **_SMALL,
        "num_hidden_layers": 4,
        "rope_theta": 500000,
        "sliding_window": 5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 1.2,
        },
    },
    "gemma": {
        "model_type": "gemma",
        **_SMALL,
        "head_dim": 16,
        "hidden_act": "gelu",
    },
    "smollm3": {
        "model_type": "smollm3",
        **_SMALL,
        "rope_theta": 5000000.0,
        "no_rope_layers": [1, 0, 1],
        "no_rope_layer_interval": 4,
        "layer_types": ["full_attention"] * 3,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "sliding_window": None,
        "pretraining_tp": 2,
    },
    "granite": {
        "model_type": "granite",
        **_SMALL,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
        "logits_scaling": 4.0,
        "tie_word_embeddings": True,
    },
    "ministral": {
        "model_type": "ministral",
        **_SMALL,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "arcee": {"model_type": "arcee", **_SMALL, "hidden_act": "relu2", "head_dim": 8},
    "glm4": {
        "model_type": "glm4",
        **_SMALL,
        "head_dim": 16,
        "eos_token_id": [2, 5],
        "partial_rotary_factor": 0.5,
    },
    "mixtral": {
        "model_type": "mixtral",
        **_EXPERTS,
        "num_local_experts": 4,
        "sliding_window": None,
        "output_router_logits": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_EXPERTS,
        "intermediate_size": 6144,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_window_layers": 3,
        "use_sliding_window": False,
    },
    "qwen3_moe_unnormalised": {
        "model_type": "qwen3_moe",
        **_EXPERTS,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "num_experts": 4,
        "norm_topk_prob": False,
    },
}

# Whose every part stands in another case as well.
LIKE_OTHERS = {"gemma", "arcee", "ministral", "phi3_partial", "neox_serial", "olmo2"}


def model(name: str) -> models.Model:
    """A model of a case, its weights large enough that every part matters."""
    made = models.random(read_config(CASES[name]))
    draw = np.random.default_rng(0)

    def weight(path, leaf):
        kind = path[-1].key
        if kind in ("scale", "bias"):
            return leaf + 0.3 * draw.standard_normal(leaf.shape).astype(np.float32)
        fan = leaf.shape[-2] if kind == "kernel" else 1
        return (draw.standard_normal(leaf.shape) * 1.3 / np.sqrt(fan)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(weight, made.params)
    return models.Model(made.config, jax.tree.map(jax.numpy.asarray, params))


def tokens(rows: int = 2, length: int = 24, seed: int = 1) -> np.ndarray:
    """Random token ids [rows, length]."""
    return np.random.default_rng(seed).integers(0, 61, (rows, length))


def transformers_folder(name: str, folder: pathlib.Path) -> pathlib.Path:
    """A folder that transformers wrote, from a model it made of the same configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = dict(CASES[name])
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, weight in theirs.named_parameters():
            spread = 0.3 if weight.ndim == 1 else 1.3 / weight.shape[-1] ** 0.5
            kept = weight if weight.ndim == 1 else 0 * weight
            spread = 1.0 if "embed" in path or "wte" in path else spread
            weight.copy_(kept + torch.randn_like(weight) * spread)
    theirs.save_pretrained(str(folder))
    return folder
