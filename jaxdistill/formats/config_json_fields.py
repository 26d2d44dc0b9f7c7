"""Fields of a config.json: which are known, what is assumed, which values are in range."""

import json
from collections.abc import Mapping
from typing import Any

from jaxdistill.errors import ModelError
from jaxdistill.formats.family import Family
from jaxdistill.models.architecture import DecoderConfig

MAX_LAYERS, MAX_VOCAB, MAX_WIDTH = 1_000, 2_000_000, 1_000_000

# Our field -> theirs, where a value is copied as it is.
COPIED: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "embed": "hidden_size",
    "mlp": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tied_head": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "bos_id": "bos_token_id",
    "pad_id": "pad_token_id",
}

# Their name of an activation -> ours; None is what the class assumes.
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu2": "relu2",
}
NUMBERS = ("softcap", "multiplier", "divisor")  # how our fields end that hold a number above 0

# What their configuration classes assume where a file leaves a field out.
_ASSUMED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

# Fields that change the mathematics, and the values under which this decoder is the same model.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "quantization": (None,),
}

# How weights that other tools made smaller are made whole again, by their method.
_DEQUANTISED = (
    "transformers' AutoModelForCausalLM.from_pretrained(folder, quantization_config={}(dequantize="
    "True)).save_pretrained(new_folder)"
)
_REMEDIES: Mapping[str, str] = {
    "fp8": f"8-bit floats: make bfloat16 of them by {_DEQUANTISED.format('FineGrainedFP8Config')}",
    "mxfp4": f"4-bit floats: make bfloat16 of them by {_DEQUANTISED.format('Mxfp4Config')}",
    "bitsandbytes": "made smaller by bitsandbytes: load them with transformers, call "
    "model.dequantize() and save that",
    "mlx": "made smaller by MLX: `mlx_lm.convert --hf-path folder --mlx-path new_folder "
    "--dequantize` makes them whole",
}

# Common fields that are read elsewhere.
_READ = ("model_type", "architectures", "hidden_act", "layer_types", "eos_token_id")
_ROPE = ("rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor")
_WINDOWS: Mapping[str, tuple[str, ...]] = {
    "all": ("sliding_window",),
    "listed": ("sliding_window",),
    "switched": ("sliding_window", "use_sliding_window"),
    "chosen": ("sliding_window", "use_sliding_window", "max_window_layers"),
    "pattern": ("sliding_window", "sliding_window_pattern", "_sliding_window_pattern"),
}

# What says nothing about a forward pass: bookkeeping of exporters, settings of training, of
# generation and of other tasks, and where code lies that is never run.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels
    auto_map chunk_size_feed_forward dtype finetuning_task gradient_checkpointing id2label
    is_decoder keys_to_ignore_at_inference label2id max_length max_sequence_length model_max_length
    output_attentions output_hidden_states prefix problem_type return_dict task_specific_params
    temperature tokenizer_class top_k top_p torch_dtype transformers.js_config transformers_version
    unsloth_fixed unsloth_version use_cache use_return_dict
    """.split()
)


def check_quantised(raw: Mapping[str, Any], where: str) -> None:
    """Weights are whole; those that other tools made smaller are refused with the way back.

    Raises:
      ModelError: naming the field, the method and what can be done.
    """
    for field in ("quantization_config", "quantization"):
        given = raw.get(field)
        if given is None:
            continue
        # MLX writes {"bits": 4, "group_size": 64} into both, and names no method.
        is_mlx = isinstance(given, Mapping) and "bits" in given and "quant_method" not in given
        kind = given.get("quant_method") if isinstance(given, Mapping) else None
        name = "mlx" if is_mlx else str(kind)
        known = f"the weights are {_REMEDIES[name]}; or" if name in _REMEDIES else "weights of"
        other = "" if name in _REMEDIES else f" {shown(kind)} are not read:"
        raise ModelError(
            f"{where}: {field}: {shown(given)} is not supported: {known}{other} use the model that "
            "these were made from, which its page on the Hub names"
        )


def check_known(row: Family, raw: Mapping[str, Any], where: str) -> None:
    """Every field that is set is understood; null and false are not set.

    Raises:
      ModelError: naming the first field that is not.
    """
    common = (*COPIED.values(), *_ONLY, *_READ, *_WINDOWS.get(row.windowed, ()))
    known = {row.field(name) for name in common if name not in row.absent}
    known |= {*row.read.values(), *row.only, *row.ignored, *row.assumed, *row.aliases, *_HARMLESS}
    known |= set(map(row.field, _ROPE)) if row.ropes else set()
    known |= {"original_max_position_embeddings"} if "yarn" in row.ropes else set()
    known |= {row.field("num_experts")} if "num_experts_per_tok" in row.assumed else set()
    known |= {"no_rope_layers"} if "no_rope_layer_interval" in row.assumed else set()
    for field, value in raw.items():
        fixed = row.features.get(field) == value  # what these models have anyway
        if field in known or value is None or value is False or fixed:
            continue
        if field in row.absent:
            _check_follows(row, field, raw, where)
            continue
        raise ModelError(
            f"{where}: {field}: {shown(value)} is not a field that {raw['model_type']} models are "
            "known to have; if it changes nothing in the model, remove it"
        )


def _check_follows(row: Family, field: str, raw: Mapping[str, Any], where: str) -> None:
    """A field that this family lacks may say only what is so anyway."""
    heads, width = raw.get(row.field("num_attention_heads")), raw.get(row.field("hidden_size"))
    follows = {"num_key_value_heads": heads, "norm_topk_prob": True}
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        follows["head_dim"] = width // heads
    if raw[field] != follows.get(field):
        raise ModelError(
            f"{where}: {field}: {shown(raw[field])} differs from {shown(follows.get(field))}, "
            f"which is what a {raw['model_type']} model has"
        )


def assumed(row: Family, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in common words, with what its class assumes where nothing is said."""
    back = {**row.aliases, **{theirs: common for common, theirs in row.renamed.items()}}
    words = lambda fields: {
        back.get(name, name): value
        for name, value in fields.items()
        if name not in row.ignored and name not in row.absent
    }
    filled = {**_ASSUMED, **words(row.assumed), **words(raw)}
    if "_sliding_window_pattern" in raw:
        filled["sliding_window_pattern"] = raw["_sliding_window_pattern"]
    if filled["hidden_act"] is None:
        filled["hidden_act"] = words(row.assumed).get("hidden_act", "silu")
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        filled.setdefault(field, None)
    return filled


def check_only(row: Family, family: str, filled: Mapping[str, Any], where: str) -> None:
    """Fields that change the mathematics have values that are built here."""
    allowed = {**_ONLY, "hidden_act": tuple(ACTIVATIONS), **row.only}
    if "attention_dropout" in row.ignored:
        del allowed["attention_dropout"]
    if "partial" not in row.ropes:
        allowed["partial_rotary_factor"] = (1, None)
    for field, values in allowed.items():
        if field in filled and not any(_same(filled[field], value) for value in values):
            raise ModelError(
                f"{where}: {row.field(field)}: {shown(filled[field])} is not supported for "
                f"{family}; this decoder computes {row.field(field)}: {values[0]}"
            )


def _same(given: Any, value: Any) -> bool:
    """Equality that does not take true for 1."""
    return isinstance(given, bool) == isinstance(value, bool) and given == value


def check_ranges(row: Family, filled: dict[str, Any], where: str) -> None:
    """Sizes, numbers and flags are of their kind and in range; sizes that follow are filled in."""
    for field in ("num_attention_heads", "hidden_size"):
        _check_count(row, filled, field, MAX_WIDTH, where)
    if filled.get("head_dim") is None:
        filled["head_dim"] = filled["hidden_size"] // filled["num_attention_heads"]
    if filled["intermediate_size"] is None and row.architecture == "GPT2LMHeadModel":
        filled["intermediate_size"] = 4 * filled["hidden_size"]
    limits = {
        "vocab_size": MAX_VOCAB,
        "num_hidden_layers": MAX_LAYERS,
        "intermediate_size": MAX_WIDTH,
        "num_key_value_heads": MAX_WIDTH,
        "head_dim": MAX_WIDTH,
        "max_position_embeddings": 1 << 31,
    }
    if row.windowed == "pattern":
        limits["sliding_window_pattern"] = MAX_LAYERS
    if "query_scalar" in row.read:
        limits[row.read["query_scalar"]] = MAX_WIDTH
    if "num_experts_per_tok" in row.assumed:
        limits["num_experts"] = 1 << 16
    for field, limit in limits.items():
        _check_count(row, filled, field, limit, where)
    if "num_experts_per_tok" in row.assumed:
        _check_count(row, filled, "num_experts_per_tok", filled["num_experts"], where)
    heads, kv_heads = filled["num_attention_heads"], filled["num_key_value_heads"]
    if heads % kv_heads:
        raise ModelError(
            f"{where}: num_key_value_heads: {kv_heads} must divide num_attention_heads: {heads}"
        )
    if filled["head_dim"] * heads != filled["hidden_size"] and "head_dim" in row.absent:
        raise ModelError(
            f"{where}: {row.field('hidden_size')}: {filled['hidden_size']} must be a multiple of "
            f"{row.field('num_attention_heads')}: {heads}"
        )
    if filled["head_dim"] % 2 and row.ropes:
        raise ModelError(f"{where}: head_dim: {filled['head_dim']} must be even for rotary pairs")
    _check_numbers(row, filled, where)
    _check_flags(row, filled, where)
    _check_ids(filled, where)


def _check_count(row: Family, filled: Mapping[str, Any], field: str, limit: int, where: str):
    value = filled.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise ModelError(
            f"{where}: {row.field(field)}: {shown(value)} must be a whole number, 1 to {limit}"
        )


def _check_numbers(row: Family, filled: dict[str, Any], where: str) -> None:
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    for field in ("rms_norm_eps", "initializer_range"):
        value = filled[field]
        if not number(value) or not 0 <= value <= 1:
            raise ModelError(
                f"{where}: {row.field(field)}: {shown(value)} must be a number from 0 to 1"
            )
        filled[field] = float(value)
    for ours, field in row.read.items():
        value = filled.get(field) if ours.endswith(NUMBERS) else None
        if value is None and ours.endswith(NUMBERS) and not ours.endswith("softcap"):
            filled[field] = value = row.assumed[field]
        if value is not None and not (number(value) and 0 < value < 1e18):
            raise ModelError(f"{where}: {field}: {shown(value)} must be a number above 0, or null")


def _check_flags(row: Family, filled: Mapping[str, Any], where: str) -> None:
    flags = ["tie_word_embeddings", "use_sliding_window", "norm_topk_prob"]
    flags += [row.read[ours] for ours in row.read if ours.endswith("bias") or ours == "parallel"]
    for field in flags:
        if not isinstance(filled.get(field, False), bool):
            raise ModelError(f"{where}: {field}: {shown(filled[field])} must be true or false")
    start = filled.get("max_window_layers", 0)
    if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start <= MAX_WIDTH:
        raise ModelError(f"{where}: max_window_layers: {shown(start)} must be a whole number")


def _check_ids(filled: Mapping[str, Any], where: str) -> None:
    ids = {field: filled[field] for field in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for field, value in ids.items():
        several = value if field == "eos_token_id" and isinstance(value, list) else [value]
        allowed = int if several is value else int | None
        if any(isinstance(one, bool) or not isinstance(one, allowed) for one in several):
            raise ModelError(f"{where}: {field}: {shown(value)} must be a token id or null")


def written_activation(config: DecoderConfig) -> str:
    """Their name of our activation."""
    if config.family == "gpt2" and config.activation == "gelu_tanh":
        return "gelu_new"
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)


def shown(value: Any) -> str:
    """A value of a stranger's file as one short line."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
