"""A decoder in plain numpy float64, loops and all, and tiny models of every family to run it on."""

import json
import math
import pathlib

import numpy as np
from safetensors.numpy import save_file

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def _case(family: str, **fields) -> dict:
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    return {
        "model_type": family,
        "architectures": [architecture[family] + "ForCausalLM"],
        **_SMALL,
        **fields,
    }


CASES = {
    "llama2": _case("llama", num_key_value_heads=4, rope_theta=10000.0),
    "llama3": _case("llama", rope_theta=500000.0, rope_scaling=_LLAMA3, tie_word_embeddings=True),
    "smollm2": _case(
        "llama",
        hidden_size=36,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        rope_interleaved=False,
    ),
    "llama_biases": _case("llama", attention_bias=True, mlp_bias=True, head_dim=6),
    "llama_linear": _case("llama", rope_scaling={"type": "linear", "factor": 2.5}),
    "llama_new_spelling": _case("llama", rope_parameters={**_LLAMA3, "rope_theta": 5000.0}),
    "mistral": _case("mistral", sliding_window=None, head_dim=16),
    "mistral_window": _case("mistral", sliding_window=5),
    "qwen2": _case("qwen2", use_sliding_window=False, sliding_window=4, tie_word_embeddings=True),
    "qwen2_windows": _case("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen2_yarn": _case("qwen2", rope_theta=1e6, rope_scaling=_YARN),
    "qwen3": _case("qwen3", head_dim=16, rope_theta=1e6, tie_word_embeddings=True),
    "qwen3_biases": _case("qwen3", head_dim=8, attention_bias=True),
    "qwen3_layer_types": _case(
        "qwen3",
        head_dim=8,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def tensors(raw: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights under their Hugging Face names, large enough that every part matters."""
    rng = np.random.default_rng(seed)
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    width = raw["hidden_size"]
    size = raw.get("head_dim") or width // heads
    family = raw["model_type"]
    out_bias = bool(raw.get("attention_bias"))
    qkv_bias = out_bias or family == "qwen2"
    mlp_bias = bool(raw.get("mlp_bias"))
    named = {}

    def norm(name, count):
        named[name] = 1 + 0.3 * rng.standard_normal(count)

    def linear(name, outside, inside, bias):
        named[name + ".weight"] = rng.standard_normal((outside, inside)) * 1.5 / math.sqrt(inside)
        if bias:
            named[name + ".bias"] = 0.5 * rng.standard_normal(outside)

    named["model.embed_tokens.weight"] = rng.standard_normal((raw["vocab_size"], width))
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        norm(at + "input_layernorm.weight", width)
        norm(at + "post_attention_layernorm.weight", width)
        linear(at + "self_attn.q_proj", heads * size, width, qkv_bias)
        linear(at + "self_attn.k_proj", kv_heads * size, width, qkv_bias)
        linear(at + "self_attn.v_proj", kv_heads * size, width, qkv_bias)
        linear(at + "self_attn.o_proj", width, heads * size, out_bias)
        if family == "qwen3":
            norm(at + "self_attn.q_norm.weight", size)
            norm(at + "self_attn.k_norm.weight", size)
        linear(at + "mlp.gate_proj", raw["intermediate_size"], width, mlp_bias)
        linear(at + "mlp.up_proj", raw["intermediate_size"], width, mlp_bias)
        linear(at + "mlp.down_proj", width, raw["intermediate_size"], mlp_bias)
    norm("model.norm.weight", width)
    if not raw["tie_word_embeddings"]:
        linear("lm_head", raw["vocab_size"], width, False)
    return {name: value.astype(np.float32) for name, value in named.items()}


def write_folder(folder: pathlib.Path, raw: dict, weights: dict | None = None) -> pathlib.Path:
    """A model folder as transformers would save it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(
        tensors(raw) if weights is None else weights,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def tokens(raw: dict, rows: int = 2, length: int = 24, seed: int = 1) -> np.ndarray:
    """Random token ids [rows, length]."""
    return np.random.default_rng(seed).integers(0, raw["vocab_size"], (rows, length))


def _frequencies(raw: dict, size: int) -> tuple[list[float], float]:
    """Angle per position of each pair, one at a time, from the published case distinctions."""
    table = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = table.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = table.get("rope_type", table.get("type", "default"))
    factor = table.get("factor", 1.0)
    length = table.get("original_max_position_embeddings", raw["max_position_embeddings"])
    result = []
    for pair in range(size // 2):
        plain = theta ** (-2 * pair / size)
        wave = 2 * math.pi / plain
        if kind == "linear":
            result.append(plain / factor)
        elif kind == "llama3":
            low, high = table["low_freq_factor"], table["high_freq_factor"]
            if wave < length / high:
                result.append(plain)
            elif wave > length / low:
                result.append(plain / factor)
            else:
                smooth = (length / wave - low) / (high - low)
                result.append((1 - smooth) * plain / factor + smooth * plain)
        elif kind == "yarn":
            edges = [
                size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (32, 1)
            ]
            low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), size - 1)
            ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
            result.append(ramp * plain / factor + (1 - ramp) * plain)
        else:
            result.append(plain)
    return result, 0.1 * math.log(factor) + 1 if kind == "yarn" else 1.0


def _windows(raw: dict) -> list[int | None]:
    layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    if raw["model_type"] == "mistral":
        return [window] * layers
    if raw["model_type"] == "llama" or not raw.get("use_sliding_window"):
        return [None] * layers
    types = raw.get("layer_types")
    if types:
        return [window if one == "sliding_attention" else None for one in types]
    return [window if layer >= raw["max_window_layers"] else None for layer in range(layers)]


def logits(raw: dict, named: dict[str, np.ndarray], token_rows: np.ndarray) -> np.ndarray:
    """Float64 logits [B, L, V], each row a document of its own."""
    named = {name: value.astype(np.float64) for name, value in named.items()}
    return np.stack([_row_logits(raw, named, row) for row in np.asarray(token_rows)])


def _row_logits(raw, named, row):
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    size = raw.get("head_dim") or raw["hidden_size"] // heads
    steps, multiplier = _frequencies(raw, size)
    angles = np.arange(len(row))[:, None] * np.asarray(steps)
    cos, sin = np.cos(angles) * multiplier, np.sin(angles) * multiplier

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + raw["rms_norm_eps"]) * named[name]

    def linear(x, name):
        return x @ named[name + ".weight"].T + named.get(name + ".bias", 0.0)

    def turn(x):
        first, second = x[:, : size // 2], x[:, size // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)

    x = named["model.embed_tokens.weight"][row]
    for layer, window in enumerate(_windows(raw)):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm.weight")
        query, key, value = (linear(y, f"{at}self_attn.{one}_proj") for one in "qkv")
        mixed = np.zeros((len(row), heads * size))
        for head in range(heads):
            group = head // (heads // kv_heads)
            q = query[:, head * size : (head + 1) * size]
            k = key[:, group * size : (group + 1) * size]
            v = value[:, group * size : (group + 1) * size]
            if raw["model_type"] == "qwen3":
                q = norm(q, at + "self_attn.q_norm.weight")
                k = norm(k, at + "self_attn.k_norm.weight")
            q, k = turn(q), turn(k)
            for i in range(len(row)):
                start = 0 if window is None else max(0, i - window + 1)
                scores = k[start : i + 1] @ q[i] / math.sqrt(size)
                share = np.exp(scores - scores.max())
                mixed[i, head * size : (head + 1) * size] = share / share.sum() @ v[start : i + 1]
        x = x + linear(mixed, at + "self_attn.o_proj")
        y = norm(x, at + "post_attention_layernorm.weight")
        gate = linear(y, at + "mlp.gate_proj")
        x = x + linear(
            gate / (1 + np.exp(-gate)) * linear(y, at + "mlp.up_proj"), at + "mlp.down_proj"
        )
    head = "model.embed_tokens" if raw["tie_word_embeddings"] else "lm_head"
    return norm(x, "model.norm.weight") @ named[head + ".weight"].T


def distance(ours, theirs) -> float:
    """Largest difference, relative to the largest logit."""
    theirs = np.asarray(theirs, np.float64)
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())
