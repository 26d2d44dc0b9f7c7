"""A Hugging Face config.json into our configuration, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdistill.errors import ModelError
from jaxdistill.models.architecture import DecoderConfig, count_parameters
from jaxdistill.models.config_json_rope import read_rope, shown, write_rope
from jaxdistill.models.families import FAMILIES, Family

MAX_LAYERS, MAX_VOCAB, MAX_WIDTH = 1_000, 2_000_000, 1_000_000
MAX_PARAMETERS = 10**13  # ten times the largest model that was ever published

# Our field -> theirs, where a value is copied as it is.
_COPIED: Mapping[str, str] = {
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

# What their configuration classes assume where a file leaves a field out.
_ASSUMED: Mapping[str, Any] = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

# Fields that change the mathematics, and the values under which this decoder is the same model.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
}


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Our configuration from a Hugging Face one, in the old or the transformers 5 spelling.

    Fields outside the table are not read: transformers ignores them for these model types too.

    Raises:
      ModelError: for an unknown `model_type`, a field out of range, or a feature not built here.
    """
    if raw.get("auto_map"):
        raise ModelError(
            f"{where}: auto_map: asks for Python code of the folder's own, which is never run: the "
            "model may compute something else than this decoder; remove the field if it does not"
        )
    family = _family(raw, where)
    row = FAMILIES[family]
    filled = {**_ASSUMED, **row.assumed, **raw}
    for field, allowed in _ONLY.items():
        if filled.get(field) not in allowed:
            raise ModelError(
                f"{where}: {field}: {shown(filled[field])} is not supported for {family}; this "
                f"decoder computes {field}: {allowed[0]}"
            )
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        filled.setdefault(field, None)
    _check_count(filled, "num_attention_heads", MAX_WIDTH, where)
    _check_count(filled, "hidden_size", MAX_WIDTH, where)
    if filled.get("num_key_value_heads") is None:
        filled["num_key_value_heads"] = filled["num_attention_heads"]
    if filled.get("head_dim") is None:
        filled["head_dim"] = filled["hidden_size"] // filled["num_attention_heads"]
    _check_ranges(filled, where)
    for field in ("rms_norm_eps", "initializer_range"):
        filled[field] = float(filled[field])
    eos = filled["eos_token_id"]
    config = DecoderConfig(
        family=family,
        rope=read_rope(filled, where),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        qk_norm=row.qk_norm,
        windows=_read_windows(row, filled, where),
        **{
            flag: bool(filled.get(field, False)) if isinstance(field, str) else field
            for flag, field in row.biases.items()
        },
        **{ours: filled[theirs] for ours, theirs in _COPIED.items()},
    )
    if (size := count_parameters(config)) > MAX_PARAMETERS:
        raise ModelError(f"{where}: describes {size:.1e} parameters, more than any model has")
    return config


def write_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The Hugging Face configuration that `read_config` turns back into `config`.

    Raises:
      ModelError: where the family has no field for something this configuration asks for.
    """
    row = FAMILIES.get(config.family)
    if row is None:
        raise ModelError(f"family: {config.family!r} is not one of {', '.join(FAMILIES)}")
    raw: dict[str, Any] = {
        "architectures": [row.architecture],
        "model_type": config.family,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        **{theirs: getattr(config, ours) for ours, theirs in _COPIED.items()},
        **write_rope(config),
        **_write_windows(row, config),
    }
    eos = list(config.eos_ids)
    raw["eos_token_id"] = (eos[0] if len(eos) == 1 else eos) if eos else None
    for flag, field in row.biases.items():
        if isinstance(field, str):
            raw[field] = getattr(config, flag)
    back = read_config(raw, "the written configuration")
    for field in dataclasses.fields(config):
        wanted, got = getattr(config, field.name), getattr(back, field.name)
        if wanted != got:
            raise ModelError(
                f"{field.name}: {wanted!r} cannot be written as a {config.family} configuration "
                f"(it would read back as {got!r}); save it under a family that has it"
            )
    return raw


def _family(raw: Mapping[str, Any], where: str) -> str:
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(
            f"{where}: model_type: {shown(family)} is not supported; supported: "
            f"{', '.join(FAMILIES)} (Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3)"
        )
    wanted = FAMILIES[family].architecture
    architectures = raw.get("architectures") or [wanted]
    if not isinstance(architectures, list) or wanted not in architectures:
        raise ModelError(
            f"{where}: architectures: {shown(architectures)} is not a language model with a head; "
            f"{family} needs {wanted}"
        )
    return family


def _check_count(filled: Mapping[str, Any], field: str, limit: int, where: str) -> None:
    value = filled.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise ModelError(f"{where}: {field}: {shown(value)} must be a whole number, 1 to {limit}")


def _check_whole(filled: Mapping[str, Any], field: str, where: str) -> None:
    value = filled[field]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_WIDTH:
        raise ModelError(f"{where}: {field}: {shown(value)} must be a whole number")


def _check_ranges(filled: Mapping[str, Any], where: str) -> None:
    limits = {
        "vocab_size": MAX_VOCAB,
        "num_hidden_layers": MAX_LAYERS,
        "intermediate_size": MAX_WIDTH,
        "num_key_value_heads": MAX_WIDTH,
        "head_dim": MAX_WIDTH,
        "max_position_embeddings": 1 << 31,
    }
    for field, limit in limits.items():
        _check_count(filled, field, limit, where)
    heads, kv_heads = filled["num_attention_heads"], filled["num_key_value_heads"]
    if heads % kv_heads:
        raise ModelError(
            f"{where}: num_key_value_heads: {kv_heads} must divide num_attention_heads: {heads}"
        )
    if filled["head_dim"] % 2:
        raise ModelError(f"{where}: head_dim: {filled['head_dim']} must be even for rotary pairs")
    for field in ("rms_norm_eps", "initializer_range"):
        value = filled[field]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ModelError(f"{where}: {field}: {shown(value)} must be a number from 0 to 1")
    for field in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        if not isinstance(filled.get(field, False), bool):
            raise ModelError(f"{where}: {field}: {shown(filled[field])} must be true or false")
    ids = {field: filled[field] for field in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for field, value in ids.items():
        several = value if field == "eos_token_id" and isinstance(value, list) else [value]
        allowed = int if several is value else int | None
        if any(isinstance(one, bool) or not isinstance(one, allowed) for one in several):
            raise ModelError(f"{where}: {field}: {shown(value)} must be a token id or null")


def _read_windows(row: Family, filled: Mapping[str, Any], where: str):
    """Per layer the number of visible tokens, or None where no layer has a window."""
    layers, window = filled["num_hidden_layers"], filled.get("sliding_window")
    types = filled.get("layer_types")
    if row.windowed == "chosen":
        window = window if filled.get("use_sliding_window", False) else None
        _check_whole(filled, "max_window_layers", where)
        start = filled["max_window_layers"]
        chosen = [window is not None and layer >= start for layer in range(layers)]
    else:
        window = None if row.windowed == "never" else window
        chosen = [window is not None] * layers
    if types is not None:
        known = {"full_attention": False, "sliding_attention": True}
        listed = isinstance(types, list) and len(types) == layers
        if not listed or any(not isinstance(name, str) or name not in known for name in types):
            raise ModelError(
                f"{where}: layer_types: {shown(types)} must name full_attention or "
                f"sliding_attention for each of the {layers} layers"
            )
        given = [known[name] for name in types]
        if row.windowed != "chosen" and given != chosen:
            raise ModelError(
                f"{where}: layer_types: {shown(types)} differs from what sliding_window: {window} "
                "means for this model_type"
            )
        chosen = given
    if not any(chosen):
        return None
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ModelError(f"{where}: sliding_window: {shown(window)} must be at least 1")
    return tuple(window if here else None for here in chosen)


def _write_windows(row: Family, config: DecoderConfig) -> dict[str, Any]:
    if row.windowed == "never":
        return {}
    sizes = {window for window in config.windows or () if window is not None}
    if len(sizes) > 1:
        raise ModelError(
            f"windows: layers with different windows {sorted(sizes)} cannot be written as a "
            f"{config.family} configuration; use one size"
        )
    window = sizes.pop() if sizes else None
    if row.windowed == "all":
        return {"sliding_window": window}
    chosen = [here is not None for here in config.windows or (None,) * config.layers]
    first = chosen.index(True) if any(chosen) else config.layers
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": ["sliding_attention" if here else "full_attention" for here in chosen],
    }
