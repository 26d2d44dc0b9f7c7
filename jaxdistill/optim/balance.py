"""A knob that keeps one part of the loss as large as another."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from jaxdistill.errors import ConfigError
from jaxdistill.optim.schedules import NamedKnobState


class BalanceState(NamedTuple):
    """The weight of the next step, and whether any step has been seen."""

    step: Array
    value: Array


def balance(
    name: str, target: str, part: str, *, beta: float = 0.9, most: float = 1e4
) -> optax.GradientTransformationExtraArgs:
    """A weight that makes a part of the loss as large as another, by the means of earlier steps.

        w = beta w + (1 - beta) min(target / part, most);    the first step sets it, until then 1

    The means are the extra argument `metrics` of `update`: of the whole batch, over all devices and
    micro-batches. Updates pass through unchanged; means that are not finite change nothing.

    Args:
      name: how the objective asks for it.
      target: the metric to be as large as, such as "loss/divergence".
      part: the metric that is weighed, such as "loss/features".
      beta: of the running mean, in [0, 1).
      most: the largest weight.

    Raises:
      ConfigError: for beta outside [0, 1).
    """
    if not 0 <= beta < 1:
        raise ConfigError(f"beta = {beta}: must be in [0, 1)")

    def init(params: Any) -> NamedKnobState:
        return NamedKnobState({name: BalanceState(jnp.int32(0), jnp.float32(1))})

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, NamedKnobState]:
        if "metrics" not in extra:
            raise ConfigError(f"{name} is balanced by metrics: call update(..., metrics=means)")
        old = state.knobs[name]
        above, below = (jnp.asarray(extra["metrics"][m], jnp.float32) for m in (target, part))
        ratio = jnp.minimum(above / jnp.where(below == 0, 1.0, below), most)
        mixed = jnp.where(old.step == 0, ratio, beta * old.value + (1 - beta) * ratio)
        sound = jnp.isfinite(mixed) & (below > 0)
        step = jnp.where(sound, old.step + 1, old.step)
        return updates, NamedKnobState(
            {name: BalanceState(step, jnp.where(sound, mixed, old.value))}
        )

    return optax.GradientTransformationExtraArgs(init, update)
