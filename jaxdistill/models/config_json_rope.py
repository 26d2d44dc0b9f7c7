"""Position embedding settings of Hugging Face configurations, old and transformers 5 spelling."""

import json
from collections.abc import Mapping
from typing import Any

from jaxdistill.errors import ModelError
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.rope import ROPE_KINDS, Rope

# Our field -> theirs, and which kinds use it.
_FIELDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "factor": ("factor", ("linear", "llama3", "yarn")),
    "original_max_positions": ("original_max_position_embeddings", ("llama3", "yarn")),
    "low_freq_factor": ("low_freq_factor", ("llama3",)),
    "high_freq_factor": ("high_freq_factor", ("llama3",)),
    "beta_fast": ("beta_fast", ("yarn",)),
    "beta_slow": ("beta_slow", ("yarn",)),
    "attention_factor": ("attention_factor", ("yarn",)),
    "mscale": ("mscale", ("yarn",)),
    "mscale_all_dim": ("mscale_all_dim", ("yarn",)),
    "truncate": ("truncate", ("yarn",)),
}
_REQUIRED = ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor")


def read_rope(raw: Mapping[str, Any], where: str) -> Rope:
    """The Rope of a configuration: `rope_parameters`, or `rope_theta` with `rope_scaling`.

    Raises:
      ModelError: for a kind not in `ROPE_KINDS`, settings per layer type, or a missing number.
    """
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    given = raw.get(field) or {}
    if not isinstance(given, Mapping) or any(
        isinstance(value, Mapping) for value in given.values()
    ):
        raise ModelError(f"{where}: {field}: {shown(given)}: expected one table for all layers")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ModelError(
            f"{where}: {field}.rope_type: {shown(kind)} is not supported; supported: "
            f"{', '.join(ROPE_KINDS)}"
        )
    if given.get("partial_rotary_factor") not in (None, 1):
        raise ModelError(
            f"{where}: {field}.partial_rotary_factor: {shown(given['partial_rotary_factor'])} is "
            "not supported; this decoder rotates whole heads"
        )
    values: dict[str, Any] = {"theta": given.get("rope_theta", raw.get("rope_theta", 10_000.0))}
    for ours, (theirs, kinds) in _FIELDS.items():
        if kind in kinds and given.get(theirs) is not None:
            values[ours] = given[theirs]
    if kind in ("llama3", "yarn"):
        outside = raw.get("original_max_position_embeddings")  # transformers lets this one win
        inside = values.get("original_max_positions", raw["max_position_embeddings"])
        values["original_max_positions"] = inside if outside is None else outside
        if kind == "yarn" and "factor" not in values:
            _check(kind, values | {"factor": 1.0}, f"{where}: {field}")
            values["factor"] = raw["max_position_embeddings"] / values["original_max_positions"]
    _check(kind, values, f"{where}: {field}")
    for ours in values:
        whole = ours in ("original_max_positions", "truncate")
        values[ours] = values[ours] if whole else float(values[ours])
    return Rope(kind=kind, **values)


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, the spelling that every version of transformers reads."""
    rope = config.rope
    scaling = {
        theirs: getattr(rope, ours)
        for ours, (theirs, kinds) in _FIELDS.items()
        if rope.kind in kinds and getattr(rope, ours) is not None
    }
    table = {"rope_type": rope.kind, **scaling} if rope.kind != "default" else None
    return {"rope_theta": rope.theta, "rope_scaling": table}


def _check(kind: str, values: Mapping[str, Any], where: str) -> None:
    for ours, (theirs, kinds) in _FIELDS.items():
        if kind in kinds and ours in _REQUIRED and ours not in values:
            raise ModelError(f"{where}.{theirs}: missing; rope_type {kind} needs it")
    for ours, value in values.items():
        theirs = _FIELDS[ours][0] if ours in _FIELDS else "rope_theta"
        if ours == "truncate":
            if not isinstance(value, bool):
                raise ModelError(f"{where}.{theirs}: {shown(value)} must be true or false")
        elif ours == "original_max_positions" and (not isinstance(value, int) or value < 1):
            raise ModelError(f"{where}.{theirs}: {shown(value)} must be a whole number of tokens")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
            raise ModelError(f"{where}.{theirs}: {shown(value)} must be a number above 0")
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ModelError(
            f"{where}.high_freq_factor: {values['high_freq_factor']} must be above "
            f"low_freq_factor: {values['low_freq_factor']}"
        )


def shown(value: Any) -> str:
    """A value of a stranger's file as one short line."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
