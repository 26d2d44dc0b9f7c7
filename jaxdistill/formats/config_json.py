"""A Hugging Face config.json into our configuration, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdistill.errors import ModelError
from jaxdistill.formats.config_json_fields import (
    ACTIVATIONS,
    COPIED,
    NUMBERS,
    assumed,
    check_known,
    check_only,
    check_quantised,
    check_ranges,
    shown,
    written_activation,
)
from jaxdistill.formats.config_json_rope import read_ropes, write_ropes
from jaxdistill.formats.families import FAMILIES, WRAPPERS
from jaxdistill.formats.family import Family
from jaxdistill.models.architecture import DecoderConfig, Experts, count_parameters

_NO_ROPE = "no_rope_layer_interval"
# What the configuration of a model that sees says of its text model outside of `text_config`.
_OUTSIDE = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "quantization")
MAX_PARAMETERS = 10**13  # ten times the largest model that was ever published


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Our configuration from a Hugging Face one, in the old or the transformers 5 spelling.

    What an `auto_map` names is not looked at: a supported `model_type` is built here, and code of a
    folder's own is never run.

    Raises:
      ModelError: for an unknown `model_type`, a field out of range or unknown, or a feature not
        built here.
    """
    raw = unwrapped(raw, where)
    check_quantised(raw, where)
    family = _family(raw, where)
    row = FAMILIES[family]
    check_known(row, raw, where)
    # From here on in the common words; messages find back to the family's own.
    filled = assumed(row, raw)
    check_only(row, family, filled, where)
    if filled.get("num_key_value_heads") is None:
        filled["num_key_value_heads"] = filled["num_attention_heads"]
    check_ranges(row, filled, where)
    eos = filled["eos_token_id"]
    rope, local_rope = read_ropes(row, filled, where)
    fields: dict[str, Any] = {"activation": ACTIVATIONS[filled["hidden_act"]]}
    fields |= {**row.features, **_read_more(row, filled)}
    config = DecoderConfig(
        family=family,
        rope=rope,
        local_rope=local_rope,
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        windows=_read_windows(row, filled, where),
        turned=_read_turned(row, filled, where),
        experts=_read_experts(row, filled),
        **fields,
        **{ours: filled[theirs] for ours, theirs in COPIED.items()},
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
    common: dict[str, Any] = {
        "attention_dropout": 0.0,
        "hidden_act": written_activation(config),
        **{theirs: getattr(config, ours) for ours, theirs in COPIED.items()},
        **write_ropes(row, config),
        **_write_windows(row, config),
        **_write_turned(row, config),
        **_write_experts(row, config),
    }
    eos = list(config.eos_ids)
    common["eos_token_id"] = (eos[0] if len(eos) == 1 else eos) if eos else None
    if config.family == "gpt2":  # its dropouts are 0.1 where nothing else is said
        del common["attention_dropout"]
        common |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    raw: dict[str, Any] = {
        "architectures": [row.architecture],
        "model_type": config.family,
        "use_cache": True,
        "torch_dtype": dtype,
        **{row.field(name): value for name, value in common.items() if name not in row.absent},
        **{field: getattr(config, ours) for ours, field in row.read.items()},
    }
    back = read_config(raw, "the written configuration")
    for field in dataclasses.fields(config):
        wanted, got = getattr(config, field.name), getattr(back, field.name)
        if wanted != got:
            raise ModelError(
                f"{field.name}: {wanted!r} cannot be written as a {config.family} configuration "
                f"(it would read back as {got!r}); save it under a family that has it"
            )
    return raw


def unwrapped(raw: Mapping[str, Any], where: str = "config.json") -> Mapping[str, Any]:
    """The configuration of the text model in a folder of one that sees as well; others as is.

    Raises:
      ModelError: where such a folder has none.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return raw
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelError(
            f"{where}: text_config: {shown(text)} must hold the text model of this {kind} model"
        )
    outside = {key: raw[key] for key in _OUTSIDE if raw.get(key) is not None}
    own = {key: value for key, value in text.items() if key != "architectures"}
    return {"model_type": WRAPPERS[kind], **own, **outside}


def _family(raw: Mapping[str, Any], where: str) -> str:
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        published = ", ".join(row.published for row in FAMILIES.values())
        code = ""
        if raw.get("auto_map"):
            code = " (auto_map: it needs Python code of the folder's own, which is never run)"
        raise ModelError(
            f"{where}: model_type: {shown(family)} is not supported{code}; supported: "
            f"{', '.join(FAMILIES)} ({published})"
        )
    wanted = FAMILIES[family].architecture
    architectures = raw.get("architectures") or [wanted]
    if not isinstance(architectures, list) or wanted not in architectures:
        raise ModelError(
            f"{where}: architectures: {shown(architectures)} is not a language model with a head; "
            f"{family} needs {wanted}"
        )
    return family


def _read_more(row: Family, filled: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields that the family reads beyond the common ones."""
    fields: dict[str, Any] = {}
    for ours, field in row.read.items():
        value = filled.get(field)
        if ours.endswith(NUMBERS):
            fields[ours] = None if value is None else float(value)
        else:
            fields[ours] = value if ours == "query_scalar" else bool(value)
    return fields


def _read_experts(row: Family, filled: Mapping[str, Any]) -> Experts | None:
    if "num_experts_per_tok" not in row.assumed:
        return None
    return Experts(
        filled["num_experts"],
        filled["num_experts_per_tok"],
        normalised=filled.get("norm_topk_prob", True),
    )


def _write_experts(row: Family, config: DecoderConfig) -> dict[str, Any]:
    if config.experts is None or "num_experts_per_tok" not in row.assumed:
        return {}
    return {
        "num_experts": config.experts.count,
        "num_experts_per_tok": config.experts.chosen,
        "norm_topk_prob": config.experts.normalised,
    }


def _read_windows(row: Family, filled: Mapping[str, Any], where: str):
    """Per layer the number of visible tokens, or None where no layer has a window."""
    layers, window = filled["num_hidden_layers"], filled.get("sliding_window")
    types = filled.get("layer_types")
    chosen = _windowed_layers(row, filled, layers)
    if types is not None:
        known = {"full_attention": False, "sliding_attention": True}
        names = types if isinstance(types, list) else []
        if len(names) != layers or any(not isinstance(n, str) or n not in known for n in names):
            raise ModelError(
                f"{where}: layer_types: {shown(types)} must name full_attention or "
                f"sliding_attention for each of the {layers} layers"
            )
        given = [known[name] for name in names]
        if row.windowed not in ("chosen", "listed", "pattern") and given != chosen:
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


def _windowed_layers(row: Family, filled: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers have a window where no list says so."""
    given = filled.get("sliding_window") is not None
    if row.windowed in ("chosen", "switched"):
        given = given and filled.get("use_sliding_window", False)
    start = filled["max_window_layers"] if row.windowed == "chosen" else 0
    if row.windowed == "never":
        return [False] * layers
    if row.windowed == "pattern":
        every = filled["sliding_window_pattern"]
        return [bool((layer + 1) % every) for layer in range(layers)]
    return [given and layer >= start for layer in range(layers)]


def _read_turned(row: Family, filled: Mapping[str, Any], where: str) -> tuple[bool, ...] | None:
    """Per layer whether positions turn its heads; None where they do in all."""
    if _NO_ROPE not in row.assumed:
        return None
    layers, every = filled["num_hidden_layers"], filled[_NO_ROPE]
    flags = filled.get("no_rope_layers")
    if flags is None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ModelError(f"{where}: {_NO_ROPE}: {shown(every)} must be a whole number from 1")
        flags = [int((layer + 1) % every != 0) for layer in range(layers)]
    known = isinstance(flags, list) and all(flag in (0, 1) for flag in flags)
    if not known or len(flags) < layers:
        raise ModelError(
            f"{where}: no_rope_layers: {shown(flags)} must have a 1 for each of the {layers} "
            "layers whose heads turn, and a 0 for the others"
        )
    turned = tuple(bool(flag) for flag in flags[:layers])
    return None if all(turned) else turned


def _write_turned(row: Family, config: DecoderConfig) -> dict[str, Any]:
    if _NO_ROPE not in row.assumed:
        return {}
    return {"no_rope_layers": [int(one) for one in config.turned or (True,) * config.layers]}


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
    if row.windowed == "switched":
        return {"use_sliding_window": window is not None, "sliding_window": window}
    chosen = [here is not None for here in config.windows or (None,) * config.layers]
    types = ["sliding_attention" if here else "full_attention" for here in chosen]
    if row.windowed in ("listed", "pattern"):
        return {"sliding_window": window, "layer_types": types}
    first = chosen.index(True) if any(chosen) else config.layers
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": types,
    }
