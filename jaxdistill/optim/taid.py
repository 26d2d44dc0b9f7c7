"""TAID's adaptive t: how far the target has gone from the student to the teacher."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxdistill.errors import ConfigError
from jaxdistill.optim.schedules import NamedKnobState
from jaxdistill.ranges import TAID

MODES = ("paper", "scaled", "linear")
# alpha = 15 / steps moves t in a run of any length as 5e-4 does in one of 30,000 steps.
_SCALED = 15.0


class TaidState(NamedTuple):
    """t and what moves it.

    Attributes:
      step: int32, optimizer steps made.
      value: float32, t of the next step.
      previous: float32, the last finite loss; 0 before the first.
      momentum: float32, m.
    """

    step: Array
    value: Array
    previous: Array
    momentum: Array


def taid(
    num_steps: int,
    t_start: float = 0.4,
    t_end: float = 1.0,
    alpha: float | None = None,
    beta: float = 0.99,
    mode: str = "paper",
) -> optax.GradientTransformationExtraArgs:
    """TAID's interpolation t as optimizer state, by name "taid_t"; updates pass through unchanged.

    With J_n the loss of step n (from 0), after it

        m = beta m + (1 - beta) (J_{n-1} - J_n) / J_{n-1}
        t = min(t_end, max(t_start + (t_end - t_start) n / num_steps, t + alpha sigmoid(m) (1 - t)))

    and the first step only remembers its loss. J is the extra argument `value` of `update`: the
    cross-entropy form of TAID's loss, over all devices and micro-batches: of the means that
    `kernels.linear_divergence(taid_t=t)` returns, "loss/divergence" + "loss/target_entropy". A
    value that is not finite changes nothing. "linear" ends at t_end, however long it goes on.

    With the paper's alpha = 5e-4 the adaptive part passes the linear floor only in runs of more
    than 2 / alpha = 4,000 steps; below, t is the floor. "scaled" takes alpha = 15 / num_steps,
    which adapts in a run of any length; "linear" is the floor alone.

    Args:
      num_steps: of the run.
      t_start: t of the first step, in [0, 1].
      t_end: the largest t, in [t_start, 1].
      alpha: step size; default 5e-4, or 15 / num_steps in mode "scaled".
      beta: of the momentum, in [0, 1).
      mode: "paper", "scaled" or "linear".

    Returns:
      A transformation to put anywhere into a chain; read t with `optim.knobs(opt_state)`.

    Raises:
      ConfigError: for a number out of its range.

    >>> import jax.numpy as jnp, optax
    >>> from jaxdistill import optim
    >>> tx = optax.chain(optim.taid(100, mode="linear"), optax.sgd(0.1))
    >>> params = {"w": jnp.zeros(2)}
    >>> state = tx.init(params)
    >>> for divergence, target_entropy in ((0.5, 1.5), (0.4, 1.5), (0.35, 1.45)):
    ...     loss = jnp.float32(divergence + target_entropy)
    ...     updates, state = tx.update(params, state, params, value=loss)
    >>> print(optim.knobs(state)["taid_t"])
    0.412

    Flax's `TrainState.apply_gradients(grads=...)` has no place for `value`; these lines do what it
    does, and pass it on:

        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    Reference: Shing et al. 2025 (TAID), arXiv 2501.16937, in the order of its code.
    """
    _check(num_steps, t_start, t_end, alpha, beta, mode)
    step_size = (
        alpha
        if alpha is not None
        else _SCALED / num_steps
        if mode == "scaled"
        else TAID["step_size"].default
    )

    def init(params: Any) -> NamedKnobState:
        number = lambda value: jnp.asarray(value, jnp.float32)
        state = TaidState(jnp.int32(0), number(t_start), number(0.0), number(0.0))
        return NamedKnobState({"taid_t": state})

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, NamedKnobState]:
        if "value" not in extra:
            raise ConfigError(
                "taid adapts to the cross-entropy form of its loss: call update(..., value=J), J = "
                'the means "loss/divergence" + "loss/target_entropy" of `linear_divergence`'
            )
        value = extra["value"]
        return updates, NamedKnobState({"taid_t": moved(state.knobs["taid_t"], value)})

    def moved(old: TaidState, value: Any) -> TaidState:
        loss = jnp.asarray(value, jnp.float32)
        first = old.previous == 0  # a relative change from 0 would be none either
        previous = jnp.where(first, loss, old.previous)  # keeps the branch that is not taken finite
        relative = (previous - loss) / (previous + 1e-15)
        momentum = beta * old.momentum + (1 - beta) * relative
        floor = t_start + (t_end - t_start) * old.step.astype(jnp.float32) / num_steps
        ahead = old.value + step_size * jax.nn.sigmoid(momentum) * (1 - old.value)
        t = jnp.minimum(t_end, floor if mode == "linear" else jnp.maximum(floor, ahead))
        new = TaidState(old.step, t, loss, momentum)
        new = _choose(first, old._replace(previous=loss), new)
        new = _choose(jnp.isfinite(loss), new, old)
        return new._replace(step=jnp.asarray(optax.safe_increment(old.step)))

    return optax.GradientTransformationExtraArgs(init, update)


def _choose(condition: Array, yes: TaidState, no: TaidState) -> TaidState:
    return TaidState(*(jnp.where(condition, a, b) for a, b in zip(yes, no, strict=True)))


def _check(num_steps, t_start, t_end, alpha, beta, mode) -> None:
    if mode not in MODES:
        raise ConfigError(f"mode = {mode!r}: must be one of {', '.join(MODES)}")
    if num_steps < 1:
        raise ConfigError(f"num_steps = {num_steps}: must be at least 1")
    if t_start not in TAID["t_start"] or t_end not in TAID["t_end"] or t_start > t_end:
        raise ConfigError(
            f"t_start = {t_start}, t_end = {t_end}: must be 0 <= t_start <= t_end <= 1"
        )
    if alpha is not None and alpha not in TAID["step_size"]:
        rule = f"must be {TAID['step_size']}, or None for the mode's own"
        raise ConfigError(f"alpha = {alpha}: {rule}")
    if beta not in TAID["beta"]:
        raise ConfigError(f"beta = {beta}: must be {TAID['beta']}")
