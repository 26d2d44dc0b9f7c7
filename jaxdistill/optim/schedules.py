"""Every knob as an Optax transform with state: its value is read before a step and checkpointed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError


class KnobState(NamedTuple):
    """A knob between two steps.

    Attributes:
      step: int32, optimizer steps made.
      value: float32, what the next step uses.
    """

    step: Array
    value: Array


class NamedKnobState(NamedTuple):
    """The states of the knobs of one chain, by name; each holds its next `value`."""

    knobs: dict[str, Any]


def knob(name: str, value: float | optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """A number of the loss that is part of the optimizer state; updates pass through unchanged.

    Step n (counted from 0) uses value(n): the state holds it before the step is made, so the loss
    can read it with `knobs`, and a checkpoint resumes it.

    Args:
      name: how the objective asks for it.
      value: a number, or step -> number.

    Returns:
      A transformation to put anywhere into a chain; its state is found at any depth.
    """

    def at(step: Array) -> Any:
        return value(step) if callable(value) else value

    def before(step: Array) -> NamedKnobState:
        return NamedKnobState({name: KnobState(step, jnp.asarray(at(step), jnp.float32))})

    def init(params: Any) -> NamedKnobState:
        return before(jnp.int32(0))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, NamedKnobState]:
        return updates, before(jnp.asarray(optax.safe_increment(state.knobs[name].step)))

    return optax.GradientTransformationExtraArgs(init, update)


def knobs(opt_state: Any) -> dict[str, Array]:
    """Name -> the value that the next step uses, of every knob in the optimizer's state."""

    def is_knob(leaf: Any) -> bool:
        return isinstance(leaf, NamedKnobState)

    values: dict[str, Array] = {}
    for leaf in jax.tree.leaves(opt_state, is_leaf=is_knob):
        if is_knob(leaf):
            values |= {name: state.value for name, state in leaf.knobs.items()}
    return values


def schedule(shape: str, start: float, end: float, steps: int) -> optax.Schedule:
    """A value that moves from `start` at step 0 to `end` at the last of `steps` steps.

        linear:  start + (end - start) * x             x = min(step / (steps - 1), 1)
        cosine:  start + (end - start) * (1 - cos(pi x)) / 2

    Args:
      shape: "linear" or "cosine".
      start: value at step 0.
      end: value at step steps - 1 and after.
      steps: steps in the run.

    Raises:
      ConfigError: for another shape.
    """
    if shape not in ("linear", "cosine"):
        raise ConfigError(f"schedule = {shape!r}: must be linear or cosine")

    def at(step: ArrayLike) -> Array:
        x = jnp.clip(step / max(steps - 1, 1), 0.0, 1.0)
        if shape == "cosine":
            x = (1.0 - jnp.cos(jnp.pi * x)) / 2.0
        return start + (end - start) * x

    return at
