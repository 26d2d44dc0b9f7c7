"""The average of past parameters, a teacher made of the student: the last transform of a chain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxdistill.errors import ConfigError


class EmaState(NamedTuple):
    """The average between two updates.

    Attributes:
      step: int32, updates made.
      average: of the parameters, float32, in their tree.
    """

    step: Array
    average: Any


def ema(decay: float, every: int = 1) -> optax.GradientTransformationExtraArgs:
    """The exponential moving average of the parameters; updates pass through unchanged.

        average(0) = p(0)
        average = decay * average + (1 - decay) * p         p behind each `every`-th update

    It takes what it is given for the update that is applied, so it stands last in a chain, behind
    whatever scales or rounds updates. The average is float32 whatever the parameters are: of
    bfloat16 an update below 1/256 of it would be lost. It is no less a part of the state than
    moments are: saved with it, laid out like its parameters, unchanged where a step is skipped.

        tx = optax.chain(optax.adamw(1e-4), optim.ema(0.95))
        teacher = optim.average(opt_state)

    Args:
      decay: of the average, in [0, 1]; 1 - decay is the rate at which it follows.
      every: updates between two moves of the average.

    Raises:
      ConfigError: for a number out of range.

    Reference: Tarvainen, Valpola 2017, arXiv 1703.01780.
    """
    if not 0.0 <= decay <= 1.0:
        raise ConfigError(f"decay = {decay}: must lie between 0 and 1")
    if every < 1:
        raise ConfigError(f"every = {every}: must be at least 1")

    def init(params: Any) -> EmaState:
        return EmaState(jnp.int32(0), jax.tree.map(lambda p: jnp.array(p, jnp.float32), params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, EmaState]:
        if params is None:
            raise ValueError("params = None: the average is of the parameters: give them")
        step = jnp.asarray(optax.safe_increment(state.step))
        rate = jnp.where(step % every == 0, 1.0 - decay, 0.0)

        def moved(average: Array, new: Array) -> Array:
            # Where it stands still it keeps its bits.
            return jnp.where(
                rate > 0, average + rate * (new.astype(jnp.float32) - average), average
            )

        new = optax.apply_updates(params, updates)
        return updates, EmaState(step, jax.tree.map(moved, state.average, new))

    return optax.GradientTransformationExtraArgs(init, update)


def average(opt_state: Any) -> Any:
    """The averaged parameters in the optimizer's state, at any depth; None where there are none."""
    is_ema = lambda node: isinstance(node, EmaState)
    averages = filter(is_ema, jax.tree.leaves(opt_state, is_leaf=is_ema))
    return next((state.average for state in averages), None)
