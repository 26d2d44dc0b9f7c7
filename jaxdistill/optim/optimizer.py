"""The chain: knobs, clipping, a rule with decay on matrices alone, masks, the average."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.errors import ConfigError
from jaxdistill.optim import rounding, rules
from jaxdistill.optim.ema import ema
from jaxdistill.optim.schedules import knob
from jaxdistill.ranges import OPTIMIZER

Knob = float | optax.Schedule | optax.GradientTransformation


def optimizer(
    learning_rate: float | optax.Schedule,
    *,
    name: str = "adamw",
    knobs: Mapping[str, Knob] | None = None,
    clip_norm: float | None = 1.0,
    betas: tuple[float, float] = OPTIMIZER["betas"],
    eps: float = OPTIMIZER["eps"],
    weight_decay: float = 0.1,
    moments: DTypeLike = OPTIMIZER["moments"],
    objective_lr_ratio: float = 1.0,
    trained: Mapping[str, tuple[int, int | None]] | None = None,
    scaled: Mapping[str, optax.Schedule] | None = None,
    last: optax.GradientTransformation | None = None,
    average: tuple[float, int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Knobs, then clipping by the global norm, then a rule, in float32 for parameters of any dtype.

    The rule is AdamW, or another of `optim.rules`. Parameters of fewer bits, such as bfloat16, are
    rounded at random, up or down in proportion to what lies between, so that on the mean they move
    as float32 would: rounded to the nearest, an update below 1/512 of its parameter would be lost.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p = p - lr (m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps) + weight_decay p)

    v is float32: in bfloat16, with b2 = 0.95, an update below 1/256 of it would be lost. m may be
    bfloat16: what is lost of it is small beside a gradient's own noise.

    Args:
      learning_rate: a number, or update number (from 0) -> number.
      name: of the rule: "adamw", "lion", "adafactor" or "muon".
      knobs: name -> number or schedule, see `schedules.knob`, or a transformation of its own that
        keeps the knob's state, such as `taid`.
      clip_norm: largest global norm of the gradient; None does not clip. Under "objective" nothing
        is clipped or counted: a learned temperature must not throttle the student.
      betas: decay of the first and second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled; for the leaves that `decays` names.
      moments: type of the first moment, float32 or bfloat16.
      objective_lr_ratio: learning rate under "objective" over that of the rest.
      trained: path into the parameters, such as "student" -> (first, end): the updates, from 0, in
        which it moves; outside of them it stands still, whatever decay and momentum say. An end of
        None is never. What no path names is trained throughout.
      scaled: path into the parameters -> update number (from 0) -> factor of the update, after
        the rule, which would divide a factor of the gradient out again.
      last: what comes behind the rule, such as `sparsity`.
      average: (decay, every) of `ema`, which then ends the chain; None: no average is kept.

    Returns:
      A transformation of the parameters' whole tree; it takes the loss as the extra argument
      `value`, for knobs that adapt to it.

    Raises:
      ConfigError: for a rule that is none, or an option that the rule does not read; and when it is
        initialised, if a path of `trained` or `scaled` names no parameter.

    Reference: Loshchilov, Hutter 2017, arXiv 1711.05101.
    """
    chain: list[optax.GradientTransformation] = [
        value if isinstance(value, optax.GradientTransformation) else knob(name, value)
        for name, value in (knobs or {}).items()
    ]
    if clip_norm is not None:
        clip = optax.clip_by_global_norm(clip_norm)
        chain.append(optax.masked(clip, lambda params: _under_objective(params, False)))
    chain.append(
        rules.rule(
            name, learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, moments=moments
        )
    )
    if objective_lr_ratio != 1.0:
        scale = optax.scale(objective_lr_ratio)
        chain.append(optax.masked(scale, lambda params: _under_objective(params, True)))
    windows = {path: _within(first, end) for path, (first, end) in (trained or {}).items()}
    for path, factor in (*(scaled or {}).items(), *windows.items()):
        moves = optax.scale_by_schedule(factor)
        chain.append(optax.masked(moves, functools.partial(_below, path)))
    if last is not None:
        chain.append(last)
    rule = rounding.in_float32(optax.chain(*chain))
    # Behind the rounding: what is averaged is what the student is.
    return rule if average is None else optax.chain(rule, ema(*average))


def _under_objective(params: Any, wanted: bool) -> Any:
    """A mask: the leaves that are the objective's own, or those that are not."""

    def one(path: tuple[Any, ...], leaf: Any) -> bool:
        return (bool(path) and getattr(path[0], "key", None) == "objective") == wanted

    return jax.tree_util.tree_map_with_path(one, params)


def _within(first: int, end: int | None) -> optax.Schedule:
    """1 for the updates from `first` to before `end`, else 0."""

    def factor(n: Any) -> Array:
        within = n >= first if end is None else (n >= first) & (n < end)
        return jnp.where(within, 1.0, 0.0)

    return factor


def _below(path: str, params: Any) -> Any:
    """A mask: the leaves whose path begins with the given one."""
    wanted = path.split("/")

    def one(keys: tuple[Any, ...], leaf: Any) -> bool:
        return [getattr(key, "key", None) for key in keys[: len(wanted)]] == wanted

    mask = jax.tree_util.tree_map_with_path(one, params)
    if not any(jax.tree.leaves(mask)):
        raise ConfigError(f"trained or scaled: there is no parameter {path!r}")
    return mask


def learning_rate(
    shape: str, peak: float, steps: int, *, warmup: int = 0, end_ratio: float = 0.1
) -> optax.Schedule:
    """Linear rise over `warmup` updates to `peak`, then constant, or down to end_ratio * peak.

    With n the number of an update, from 0, and x = (n - warmup) / (steps - 1 - warmup):

        n < warmup:  peak (n + 1) / warmup
        linear:      peak (1 - (1 - end_ratio) x)
        cosine:      peak (end_ratio + (1 - end_ratio) (1 + cos(pi x)) / 2)

    The first update moves already, and the last one, n = steps - 1, is made with end_ratio * peak.

    Args:
      shape: "constant", "linear" or "cosine".
      peak: the highest rate.
      steps: updates in the run.
      warmup: updates of the rise, below `steps`.
      end_ratio: last rate over peak; constant ignores it.

    Raises:
      ConfigError: for another shape, or a warmup that leaves no update.
    """
    if not 0 <= warmup < steps:
        raise ConfigError(f"optimizer.warmup = {warmup}: must be in [0, train.steps = {steps})")
    fall = max(steps - 1 - warmup, 1)
    falls = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end_ratio * peak, fall),
        "cosine": lambda: optax.cosine_decay_schedule(peak, fall, alpha=end_ratio),
    }
    if shape not in falls:
        raise ConfigError(f"optimizer.schedule = {shape!r}: must be one of {', '.join(falls)}")
    if not warmup:
        return falls[shape]()
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, falls[shape]()], [warmup])
