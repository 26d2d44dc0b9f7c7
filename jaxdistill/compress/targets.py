"""How small a pruned model gets: explicit sizes, or a budget of parameters, memory or latency."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.typing import DTypeLike

from jaxdistill.budgets import amount
from jaxdistill.errors import ConfigError
from jaxdistill.formats.families import FAMILIES
from jaxdistill.models import DecoderConfig, count_parameters
from jaxdistill.models.architecture import picked

AXES = ("layers", "embed", "mlp", "heads", "kv_heads", "experts")
# Sizes that matrix units like; Minitron's manual targets are multiples of 64 too.
MULTIPLES: Mapping[str, int] = {
    "layers": 1, "embed": 64, "mlp": 64, "heads": 1, "kv_heads": 1, "experts": 1
}  # fmt: skip


def resize(config: DecoderConfig, sizes: Mapping[str, int]) -> DecoderConfig:
    """The configuration with these sizes, as far as they can be cut out of the model.

    Args:
      config: of the large model.
      sizes: of the axes `AXES`; those that are not named stay, but heads follow kv_heads.

    Raises:
      ConfigError: for a size above the model's, below 1, or below what a token passes of experts;
        heads that do not divide into groups; or what cannot be cut out of this family.
    """
    for name, size in sizes.items():
        have, least = _size(config, name), _least(config, name)
        if not least <= size <= have:
            passes = f", a token passes {least} of them" if least > 1 else ""
            raise ConfigError(
                f"prune.{name} = {size}: the model has {have}{passes}: give {least} to {have} "
                "(pruning cannot enlarge it)"
            )
    per_group = config.heads // config.kv_heads
    groups = sizes.get("kv_heads", config.kv_heads)
    heads = sizes.get("heads", groups * per_group)
    if heads % groups or heads // groups > per_group:
        raise ConfigError(
            f"prune.heads = {heads}: must be a multiple of kv_heads ({groups}) and at most "
            f"{groups * per_group} ({per_group} a group): heads that share keys stay together"
        )
    experts = config.experts
    if experts is not None and "experts" in sizes:
        experts = dataclasses.replace(experts, count=sizes["experts"])
    # Which layers stay is known when they are chosen: until then the first ones.
    small = dataclasses.replace(
        picked(config, range(sizes.get("layers", config.layers))),
        embed=sizes.get("embed", config.embed),
        mlp=sizes.get("mlp", config.mlp),
        heads=heads,
        kv_heads=groups,
        experts=experts,
    )
    _check_family(config, small)
    return small


def sizes_of(config: DecoderConfig) -> dict[str, int]:
    """All sizes that a model has and pruning knows."""
    return {axis: _size(config, axis) for axis in AXES if axis != "experts" or config.experts}


def _check_family(config: DecoderConfig, small: DecoderConfig) -> None:
    """The student computes what the teacher would without these units, and its family says so."""
    if small.embed < config.embed and config.norm == "layer":
        raise ConfigError(
            f"prune.embed = {small.embed}: {config.family} models have LayerNorms, which subtract "
            f"the mean over all {config.embed} channels: with fewer it is another, even where "
            "those left out are zero: prune layers or mlp"
        )
    longrope = config.rope is not None and config.rope.kind == "longrope"
    if longrope and small.heads * small.head_dim != small.embed:
        raise ConfigError(
            f"prune.heads = {small.heads}: transformers counts longrope's factors by hidden_size / "
            f"heads: heads * {small.head_dim} must stay embed ({small.embed}): prune layers or mlp"
        )
    fixed = "head_dim" in FAMILIES[config.family].absent
    if fixed and small.heads * small.head_dim != small.embed:
        raise ConfigError(
            f"prune.heads = {small.heads}: the configuration of {config.family} models has no "
            f"head_dim: heads * {small.head_dim} must stay embed ({small.embed}): prune layers or "
            "mlp"
        )


def _size(config: DecoderConfig, axis: str) -> int:
    """One of the sizes that pruning knows."""
    if axis not in AXES:
        raise ConfigError(f"prune.{axis}: is no size to prune: use {', '.join(AXES)}")
    if axis != "experts":
        return getattr(config, axis)
    if config.experts is None:
        raise ConfigError(
            f"prune.experts: {config.family} models have no routed experts: prune mlp instead"
        )
    return config.experts.count


def _least(config: DecoderConfig, axis: str) -> int:
    """The smallest number of units that is still such a model."""
    return config.experts.chosen if axis == "experts" and config.experts else 1


def fit(
    config: DecoderConfig,
    *,
    parameters: str | int | None = None,
    memory: str | None = None,
    axes: Sequence[str] = ("embed", "mlp"),
    dtype: DTypeLike = "bfloat16",
    multiples: Mapping[str, int] = MULTIPLES,
) -> DecoderConfig:
    """The largest model within a budget whose `axes` all shrink by the same share.

    Each size is the share r of the model's, rounded down to its multiple; the largest r that meets
    the budget is taken, and then the MLP, which tolerates pruning best, gives way last: it grows
    back as far as the budget allows.

    Args:
      config: of the large model.
      parameters: "60%" or "80M".
      memory: "4GiB" or "50%" of the weights held in `dtype`.
      axes: which sizes shrink.
      dtype: of the weights, for `memory`.
      multiples: the step of each size.

    Raises:
      ConfigError: unless one budget is given, or if it cannot be met; the message has the nearest.
    """
    if (parameters is None) == (memory is None):
        raise ConfigError("prune: give one budget: parameters or memory")
    _check_axes(axes)
    whole, width = count_parameters(config), np.dtype(dtype).itemsize
    if parameters is not None:
        budget, words = amount(parameters, whole), f"parameters = {parameters}"
    else:
        budget = amount(str(memory), whole * width, "memory") // width
        words = f"memory = {memory}"
    tried = [
        resized for resized in (_shrunk(config, axes, multiples, r / 1000) for r in range(1, 1001))
    ]
    fitting = [one for one in tried if count_parameters(one) <= budget]
    if not fitting:
        nearest = min(map(count_parameters, tried))
        raise ConfigError(
            f"prune.{words}: cannot be met by shrinking {', '.join(axes)}: the smallest such model "
            f"has {nearest:,} parameters, the budget is {budget:,}: raise it or add axes"
        )
    chosen = max(fitting, key=count_parameters)
    if "mlp" in axes:
        chosen = _grown(chosen, config.mlp, multiples["mlp"], budget)
    return chosen


def fit_latency(
    config: DecoderConfig,
    latency: str,
    measured: Callable[[DecoderConfig], float],
    *,
    axes: Sequence[str] = ("embed", "mlp"),
    multiples: Mapping[str, int] = MULTIPLES,
) -> tuple[DecoderConfig, dict[str, float]]:
    """The largest model that is fast enough, whose `axes` all shrink by the same share.

    A smaller share is taken to be no slower, so that bisection over forty shares needs about six
    measurements.

    Args:
      config: of the large model.
      latency: "60%" of the large model's, or "12ms".
      measured: a model's shape -> its latency in microseconds, on the machine at hand.
      axes: which sizes shrink.
      multiples: the step of each size.

    Returns:
      the student's shape, and in microseconds {"before", "budget", "after"}.

    Raises:
      ConfigError: if it cannot be met; the message has the nearest.
    """
    _check_axes(axes)
    before = measured(config)
    budget = amount(latency, before, "latency")
    shapes = [_shrunk(config, axes, multiples, share / 40) for share in range(1, 40)]
    if budget >= before:
        return config, {"before": before, "budget": budget, "after": before}
    fits, after = 0, measured(shapes[0])
    if after > budget:
        raise ConfigError(
            f"prune.latency = {latency}: cannot be met by shrinking {', '.join(axes)}: the "
            f"smallest such model takes {after / 1e3:.3g} ms here, the budget is "
            f"{budget / 1e3:.3g} ms of {before / 1e3:.3g} ms: raise it or add axes"
        )
    beyond = len(shapes)
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        took = measured(shapes[middle])
        if took <= budget:
            fits, after = middle, took
        else:
            beyond = middle
    return shapes[fits], {"before": before, "budget": budget, "after": after}


def _check_axes(axes: Sequence[str]) -> None:
    if not axes or any(axis not in AXES for axis in axes):
        raise ConfigError(f"prune.axes = {list(axes)}: must be some of {', '.join(AXES)}")


def _shrunk(
    config: DecoderConfig, axes: Sequence[str], multiples: Mapping[str, int], share: float
) -> DecoderConfig:
    """Every axis at a share of its size, rounded down to its multiple, at least one of it."""
    sizes = {}
    for axis in axes:
        have, step = _size(config, axis), multiples[axis]
        size = max(int(have * share) // step * step, step, _least(config, axis))
        sizes[axis] = have if share == 1 else min(have, size)
    if "heads" in sizes:  # whole groups: the same number of query heads for each
        groups = sizes.get("kv_heads", config.kv_heads)
        sizes["heads"] = max(sizes["heads"] // groups, 1) * groups
        sizes["heads"] = min(sizes["heads"], groups * (config.heads // config.kv_heads))
    return resize(config, sizes)


def _grown(config: DecoderConfig, most: int, step: int, budget: int) -> DecoderConfig:
    """The widest MLP, in steps, that the budget still allows."""
    while config.mlp + step <= most:
        wider = dataclasses.replace(config, mlp=config.mlp + step)
        if count_parameters(wider) > budget:
            break
        config = wider
    return config
