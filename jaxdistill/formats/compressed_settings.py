"""What a folder in the compressed-tensors format says of itself: which modules, which numbers.

config_groups   groups of modules with one scheme each: targets are names of modules, patterns
                behind "re:", or the class Linear, and count in this order
ignore          modules that stay as they are
format          of all groups: pack-quantized, int-quantized or float-quantized
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdistill.errors import ModelError
from jaxdistill.formats.tensor_table import tensor_rows
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.quantized import (
    Quantization,
    QuantizedKernel,
    Scheme,
    in_layer,
    projections,
)

METHOD = "compressed-tensors"
FORMS = ("pack-quantized", "int-quantized", "float-quantized")
_MOST_TARGETS = 1000
# Without brackets, and with two repetitions at most, no search for a pattern takes long.
_TARGET = re.compile(r"(re:)?[\w.*+?\\$^-]{1,200}")
_REPEATS = 2


def check_names(config: DecoderConfig) -> None:
    """Every projection is a tensor of its own in the family's files.

    Raises:
      ModelError: where it is not.
    """
    for ours, (name, _) in tensor_rows(config).items():
        if name.fused or name.stacked > 1 or (ours.endswith("up.kernel") and not name.transposed):
            raise ModelError(
                f"{config.family}: {ours} has no tensor [out, in] of its own in its files, and "
                f"{METHOD} has no form for that: export the model before it is quantised"
            )


def form(scheme: Scheme) -> str:
    """How tensors of a scheme are stored."""
    if scheme.kind == "float":
        return "float-quantized"
    return "int-quantized" if scheme.dynamic else "pack-quantized"


def write_settings(config: DecoderConfig, flat: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a quantised model.

    Most projections have the scheme of the class Linear, the others are named.

    Args:
      config: the model's.
      flat: parameters by dotted name.
    """
    schemes = {
        name: leaf.scheme if isinstance(leaf := flat[name], QuantizedKernel) else None
        for name in projections(config)
    }
    known = [scheme for scheme in schemes.values() if scheme is not None]
    usual = max(known, key=known.count)
    targets: dict[Scheme, list[str]] = {}
    ignored = ["lm_head"]
    for name, scheme in schemes.items():
        if scheme is None:
            ignored.append(_target(config, name))
        elif scheme != usual:
            targets.setdefault(scheme, []).append(_target(config, name))
    targets[usual] = ["Linear"]  # last: else compressed-tensors warns of the others, and reads them
    return {
        "quant_method": METHOD,
        "format": form(usual),
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": names, **_numbers(scheme)}
            for number, (scheme, names) in enumerate(targets.items())
        },
        "ignore": ignored,
    }


def _numbers(scheme: Scheme) -> dict[str, Any]:
    """How the numbers of a group are described."""
    number = {"num_bits": scheme.bits, "type": scheme.kind, "symmetric": True}
    strategy = "group" if scheme.group else "channel"
    inputs = {**number, "strategy": "token", "dynamic": True} if scheme.dynamic else None
    return {
        "weights": {**number, "strategy": strategy, "group_size": scheme.group, "dynamic": False},
        "input_activations": inputs,
        "output_activations": None,
    }


def _target(config: DecoderConfig, name: str) -> str:
    """The modules of a projection in every layer, as a pattern."""
    inside = tensor_rows(config)[name][0].pattern.partition("{}.")[2]
    return f"re:.*{re.escape(inside.removesuffix('.weight'))}$"


class CompressedSettings(NamedTuple):
    """What a quantization_config says.

    Attributes:
      groups: (targets, scheme).
      ignored: targets that stay as they are.
      where: the file.
    """

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignored: tuple[str, ...]
    where: str

    def of(self, config: DecoderConfig) -> Quantization:
        """The scheme of every projection.

        Raises:
          ModelError: where layers differ, which are one stack here, or for a family without a
            tensor for each projection.
        """
        check_names(config)
        found: list[tuple[str, Scheme | None]] = []
        rows = tensor_rows(config)
        for name, row in projections(config).items():
            module = rows[name][0].pattern.removesuffix(".weight")
            schemes = {self._scheme(module.format(layer)) for layer in range(row.shape[0])}
            if len(schemes) > 1:
                raise ModelError(
                    f"{self.where}: quantization_config: layers differ in the scheme of "
                    f"{in_layer(name)}, which are one array here: use the unquantised model"
                )
            found.append((in_layer(name), schemes.pop()))
        every = [scheme for _, scheme in found]
        usual = max(every, key=every.count)
        return Quantization(usual, tuple(pair for pair in found if pair[1] != usual))

    def _scheme(self, module: str) -> Scheme | None:
        if any(one in ("Linear", module) or _fits(one, module) for one in self.ignored):
            return None
        for counts in (lambda one: one == module, lambda one: _fits(one, module), "Linear".__eq__):
            for targets, scheme in self.groups:
                if any(map(counts, targets)):
                    return scheme
        return None


def _fits(target: str, module: str) -> bool:
    """Whether a pattern fits to the beginning of a module's name."""
    return target.startswith("re:") and re.match(target[3:], module) is not None


def read_settings(raw: Any, where: str) -> CompressedSettings | None:
    """What a quantization_config says; None where there is none.

    Raises:
      ModelError: for a form that is not read here.
    """
    if raw is None or (isinstance(raw, Mapping) and raw.get("quant_method") != METHOD):
        return None  # of other tools: `config_json_fields.check_quantised` has their remedies
    groups: list[tuple[tuple[str, ...], Scheme]] = []
    ignored: tuple[str, ...] = ()
    try:
        for group in raw["config_groups"].values():
            groups.append((_targets(group["targets"]), _read_scheme(group, raw["format"])))
        ignored = _targets(raw.get("ignore") or ())
    except (KeyError, TypeError, AttributeError, ValueError):
        groups = []
    if not groups:
        raise ModelError(
            f"{where}: quantization_config: only {METHOD} with symmetric int8, int4 or float8 "
            f"weights is read ({', '.join(FORMS)}): use the unquantised model"
        )
    return CompressedSettings(tuple(groups), ignored, where)


def _read_scheme(group: Mapping[str, Any], stored: str) -> Scheme:
    """The scheme of a group.

    Raises:
      ValueError: for one that is not read here.
    """
    weights, inputs = group["weights"], group.get("input_activations")
    kind = weights.get("type", "int")
    scheme = Scheme(weights["num_bits"], weights.get("group_size"), inputs is not None, kind)
    known = scheme.bits in (4, 8) if kind == "int" else scheme.bits == 8 and not scheme.group
    ours = _numbers(scheme)["weights"]
    same = all(weights.get(key, value) == value for key, value in ours.items())
    if kind not in ("int", "float") or not known or not same or stored != form(scheme):
        raise ValueError(stored)
    return scheme


def _targets(names: Sequence[Any]) -> tuple[str, ...]:
    """Names of modules, and patterns that are found in no time.

    Raises:
      ValueError: for others.
    """
    if not isinstance(names, list | tuple) or len(names) > _MOST_TARGETS:
        raise ValueError(names)
    for one in names:
        if not _TARGET.fullmatch(one) or sum(map(one.count, "*+?")) > _REPEATS:
            raise ValueError(one)
        try:
            re.compile(one.removeprefix("re:"))
        except re.error:
            raise ValueError(one) from None
    return tuple(names)
