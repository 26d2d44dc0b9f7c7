"""Position embedding settings of Hugging Face configurations, old and transformers 5 spelling."""

from collections.abc import Mapping
from typing import Any

from jaxdistill.errors import ModelError
from jaxdistill.formats.config_json_fields import shown
from jaxdistill.formats.family import Family
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.rope import ROPE_KINDS, Rope

# Our field -> theirs, and which kinds use it.
_FIELDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "factor": ("factor", ("linear", "llama3", "yarn", "longrope")),
    "original_max_positions": ("original_max_position_embeddings", ("llama3", "yarn", "longrope")),
    "low_freq_factor": ("low_freq_factor", ("llama3",)),
    "high_freq_factor": ("high_freq_factor", ("llama3",)),
    "beta_fast": ("beta_fast", ("yarn",)),
    "beta_slow": ("beta_slow", ("yarn",)),
    "attention_factor": ("attention_factor", ("yarn", "longrope")),
    "mscale": ("mscale", ("yarn",)),
    "mscale_all_dim": ("mscale_all_dim", ("yarn",)),
    "truncate": ("truncate", ("yarn",)),
    "short_factors": ("short_factor", ("longrope",)),
    "long_factors": ("long_factor", ("longrope",)),
}
_LISTS = ("short_factors", "long_factors")
_REQUIRED = ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor", *_LISTS)


def read_ropes(row: Family, raw: Mapping[str, Any], where: str) -> tuple[Rope | None, Rope | None]:
    """The Rope of a configuration, and that of its layers with a window where it is another.

    `rope_parameters`, or `rope_theta` with `rope_scaling`; of a family with two of them a table for
    each type of layer, or `rope_local_base_freq` beside the others.

    Raises:
      ModelError: for a kind that the family has not, or a missing number.
    """
    if not row.ropes:
        return None, None
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    given = raw.get(field) or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"{where}: {field}: {shown(given)}: expected a table")
    nested = [name for name, value in given.items() if isinstance(value, Mapping)]
    if "local" not in row.ropes:
        if nested:
            raise ModelError(f"{where}: {field}: {shown(given)}: expected one table for all layers")
        return _read_rope(row, raw, given, f"{where}: {field}"), None
    # Where windows have a base of their own, or the base of all, which is not stretched there.
    local = {"rope_theta": raw.get("rope_local_base_freq", raw.get("rope_theta"))}
    if nested:
        if set(given) != {"full_attention", "sliding_attention"} or len(nested) != len(given):
            raise ModelError(
                f"{where}: {field}: {shown(given)}: expected a table for full_attention and one "
                "for sliding_attention"
            )
        given, local = given["full_attention"], local | dict(given["sliding_attention"])
    plain = {"max_position_embeddings": raw["max_position_embeddings"]}
    return (
        _read_rope(row, raw, given, f"{where}: {field}"),
        _read_rope(row, plain, local, f"{where}: {field}.sliding_attention"),
    )


def _read_rope(row: Family, raw: Mapping[str, Any], given: Mapping[str, Any], where: str) -> Rope:
    kinds = [kind for kind in ROPE_KINDS if kind in row.ropes]
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "su" and "longrope" in kinds:  # what it was called at first
        kind = "longrope"
    if kind not in kinds:
        raise ModelError(
            f"{where}.rope_type: {shown(kind)} is not supported; supported: {', '.join(kinds)}"
        )
    values: dict[str, Any] = {"theta": given.get("rope_theta", raw.get("rope_theta", 10_000.0))}
    share = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if share is not None:
        values["share"] = _checked_share(row, raw, share, where)
    for ours, (theirs, used) in _FIELDS.items():
        if kind in used and given.get(theirs) is not None:
            values[ours] = given[theirs]
    if kind in ("llama3", "yarn", "longrope"):
        outside = raw.get("original_max_position_embeddings")  # transformers lets this one win
        inside = values.get("original_max_positions", raw["max_position_embeddings"])
        values["original_max_positions"] = inside if outside is None else outside
        if kind != "llama3" and "factor" not in values:
            _check(kind, values | {"factor": 1.0}, where)
            values["factor"] = raw["max_position_embeddings"] / values["original_max_positions"]
    _check(kind, values, where)
    for ours, value in values.items():
        if ours in _LISTS:
            dims = int(raw["head_dim"] * values.get("share", 1.0))
            values[ours] = _checked_list(value, dims // 2, f"{where}.{_FIELDS[ours][0]}")
        elif ours not in ("original_max_positions", "truncate"):
            values[ours] = float(value)
    return Rope(kind=kind, interleaved="interleaved" in row.ropes, **values)


def _checked_share(row: Family, raw: Mapping[str, Any], share: Any, where: str) -> float:
    """The part of a head that turns: even dims of it, and all of them in most families."""
    number = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1
    if number and share != 1 and "partial" not in row.ropes:
        raise ModelError(
            f"{where}.partial_rotary_factor: {shown(share)} is not supported for this model_type; "
            "it rotates whole heads"
        )
    dims = int(raw["head_dim"] * share) if number else 0
    if dims < 2 or dims % 2:
        raise ModelError(
            f"{where}: {row.field('partial_rotary_factor')}: {shown(share)} must turn an even "
            f"number of the {raw.get('head_dim')} dims of a head, at least 2"
        )
    return float(share)


def _checked_list(value: Any, count: int, where: str) -> tuple[float, ...]:
    """A factor for each pair of dims that turns."""
    factors = value if isinstance(value, list) else []
    if len(factors) != count or not all(map(_positive, factors)):
        raise ModelError(f"{where}: {shown(value)} must list {count} numbers above 0")
    return tuple(map(float, factors))


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e18


def write_ropes(row: Family, config: DecoderConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, the spelling that every version of transformers reads."""
    rope, local = config.rope, config.local_rope
    if rope is None or not row.ropes:
        return {}
    values = {ours: getattr(rope, ours) for ours in _FIELDS}
    scaling = {
        theirs: list(values[ours]) if ours in _LISTS else values[ours]
        for ours, (theirs, kinds) in _FIELDS.items()
        if rope.kind in kinds and values[ours] is not None
    }
    table = {"rope_type": rope.kind, **scaling} if rope.kind != "default" else None
    written = {"rope_theta": rope.theta, "rope_scaling": table}
    if "partial" in row.ropes:
        written["partial_rotary_factor"] = rope.share
    if rope.kind == "longrope":  # where transformers looks first
        written["original_max_position_embeddings"] = rope.original_max_positions
    if local is not None and "rope_local_base_freq" in row.assumed:
        written["rope_local_base_freq"] = local.theta
    elif local is not None:  # transformers 5 takes `rope_theta` for the other layers alone
        full = {"rope_theta": rope.theta, **(table or {"rope_type": "default"})}
        own = {"rope_theta": local.theta, "rope_type": local.kind}
        written["rope_parameters"] = {"full_attention": full, "sliding_attention": own}
    return written


def _check(kind: str, values: Mapping[str, Any], where: str) -> None:
    for ours, (theirs, kinds) in _FIELDS.items():
        if kind in kinds and ours in _REQUIRED and ours not in values:
            raise ModelError(f"{where}.{theirs}: missing; rope_type {kind} needs it")
    least = 2 if kind == "longrope" else 1  # its logarithm divides
    for ours, value in values.items():
        theirs = _FIELDS[ours][0] if ours in _FIELDS else "rope_theta"
        if ours == "share" or ours in _LISTS:
            continue
        if ours == "truncate":
            if not isinstance(value, bool):
                raise ModelError(f"{where}.{theirs}: {shown(value)} must be true or false")
        elif ours == "original_max_positions" and (not isinstance(value, int) or value < least):
            rule = f"must be a whole number of tokens, at least {least}"
            raise ModelError(f"{where}.{theirs}: {shown(value)} {rule}")
        elif not _positive(value):
            raise ModelError(f"{where}.{theirs}: {shown(value)} must be a number above 0")
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ModelError(
            f"{where}.high_freq_factor: {values['high_freq_factor']} must be above "
            f"low_freq_factor: {values['low_freq_factor']}"
        )
