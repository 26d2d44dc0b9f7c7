"""Updates made in float32, and parameters of fewer bits rounded at random so that none is lost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class RoundingState(NamedTuple):
    """The state where some parameter has fewer bits than float32.

    Attributes:
      step: int32, updates made; what is drawn depends on nothing else, so a run can be repeated.
      inner: the state of the transformation itself, float32.
    """

    step: Array
    inner: Any


def in_float32(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The same transformation on float32 copies, so that its state and its sums are float32.

    A parameter of fewer bits is moved to one of the two numbers that its type has beside
    p + update, the nearer the likelier: the mean of what is drawn is p + update itself.

    Reference: Gupta et al. 2015, arXiv 1502.02551 (stochastic rounding).
    """

    def raised(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        state = inner.init(raised(params))
        rounds = any(map(_is_short, jax.tree.leaves(params)))
        return RoundingState(jnp.int32(0), state) if rounds else state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if not isinstance(state, RoundingState):
            return inner.update(raised(updates), state, raised(params), **extra)
        moved, after = inner.update(raised(updates), state.inner, raised(params), **extra)
        moved = _drawn(moved, params, jax.random.fold_in(jax.random.key(0), state.step))
        return moved, RoundingState(jnp.asarray(optax.safe_increment(state.step)), after)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_short(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4


def _drawn(updates: Any, params: Any, key: Array) -> Any:
    """Updates that lead to numbers of the parameters' own types."""
    leaves, structure = jax.tree.flatten(updates)
    before = structure.flatten_up_to(params)
    keys = jax.random.split(key, len(leaves))
    pairs = zip(leaves, before, keys, strict=True)
    return structure.unflatten(
        [_to_a_neighbour(u, p, k) if _is_short(p) else u for u, p, k in pairs]
    )


def _to_a_neighbour(update: Array, before: Array, key: Array) -> Array:
    """The update to one of the two neighbours of before + update, each in proportion."""
    exact = before.astype(jnp.float32) + update
    near = exact.astype(before.dtype)
    away = jnp.where(exact > near.astype(jnp.float32), jnp.inf, -jnp.inf).astype(before.dtype)
    low, high = (x.astype(jnp.float32) for x in (near, jnp.nextafter(near, away)))
    share = jnp.where(high == low, 0.0, (exact - low) / (high - low))
    takes_far = jax.random.uniform(key, exact.shape) < share
    # An infinite neighbour is none; what is not finite stays what it is.
    reached = jnp.where(takes_far & jnp.isfinite(high), high, low)
    return reached - before.astype(jnp.float32)
