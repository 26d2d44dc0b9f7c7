"""The checks of what a caller passes: numbers by one table of ranges, arrays by their shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.ranges import COMMON, Range

IGNORED = -100  # the label of a token that counts nothing, as everywhere in this field


def known(value: Any) -> int | float | None:
    """A number whose value can be looked at; None for a traced one, and for an array of several.

    Numbers of Python, NumPy and JAX alike. What is under a mask may be anything, so the numbers of
    an array with dims are not looked at.
    """
    if isinstance(value, int | float):
        return value
    if isinstance(value, jax.core.Tracer) or not isinstance(
        value, np.generic | np.ndarray | jax.Array
    ):
        return None
    return float(value) if np.ndim(value) == 0 and _is_real(value.dtype) else None


def _is_real(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, one) for one in (jnp.floating, jnp.integer, jnp.bool_))


def array(name: str, value: ArrayLike) -> Array:
    """The caller's array.

    Raises:
      ConfigError: naming it, for what is none.
    """
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is no array: {error}") from error


def indices(name: str, value: ArrayLike | Sequence[int]) -> Array:
    """Ids or columns as the caller's array, whole numbers as int32.

    A narrow type would wrap beside V, a wide one on its way into JAX: a number beyond int32 becomes
    the nearest of int32, which is no token of a vocabulary either. Floats stay, to be refused.

    Raises:
      ConfigError: naming it, for what is no array.
    """
    given: Any = value
    if not isinstance(given, jax.Array):
        try:
            given = np.asarray(given)
        except (TypeError, ValueError):  # such as a list of tracers
            given = array(name, given)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        return array(name, given)
    if isinstance(given, jax.core.Tracer):
        return _as_int32(jnp, given)
    # What is known stays known inside a jit, where it can then be looked at.
    with jax.ensure_compile_time_eval():
        return jnp.asarray(_as_int32(jnp if isinstance(given, jax.Array) else np, given))


def _as_int32(xp: Any, whole: Any) -> Any:
    ends, own = jnp.iinfo(jnp.int32), jnp.iinfo(whole.dtype)
    if own.max > ends.max:
        whole = xp.clip(whole, max(int(own.min), int(ends.min)), int(ends.max))
    return whole.astype(np.int32)


def number(name: str, value: Any, allowed: Range | None = None, where: str = "") -> None:
    """Raises unless a number lies in its range; a traced one cannot be looked at.

    Args:
      name: of the number.
      value: a number, or an array.
      allowed: its range; None takes the common one of this name.
      where: what the message begins with, such as the name of a function and a colon.

    Raises:
      ConfigError: naming the number, its value and its range.
    """
    allowed = COMMON[name] if allowed is None else allowed
    if not isinstance(value, bool | int | float | np.generic | np.ndarray | jax.Array):
        raise ConfigError(f"{where}{name} = {value!r}: must be a number {allowed}".rstrip())
    found = known(value)
    if found is not None and found not in allowed:
        raise ConfigError(f"{where}{name} = {value}: must be {allowed}")
    if not _is_real(jnp.result_type(value)):
        raise ConfigError(f"{where}{name} is {jnp.result_type(value)}: must be {allowed}")


def numbers(values: Mapping[str, Any]) -> None:
    """Raises unless each number that is given lies in its common range, and is one number.

    Raises:
      ConfigError: naming the number.
    """
    for name, value in values.items():
        if value is not None:
            number(name, value)
            if jnp.ndim(value):
                raise ConfigError(f"{name} {list(jnp.shape(value))}: must be one number, []")


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raises unless a size is a whole number, from `least` to `most`.

    Raises:
      ConfigError: naming the size.
    """
    sound = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not sound or value < least or (most is not None and value > most):
        ends = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} = {value!r}: must be a whole number, {ends}")


def per_token(name: str, value: Array | None, dims: Sequence[int], *kinds: Any) -> None:
    """Raises unless an array has one entry for each token.

    Args:
      name: of the array.
      value: or None, which is none.
      dims: [N] or [B, L] of the tokens.
      kinds: what its entries may be: jnp.integer, jnp.floating, jnp.bool_.

    Raises:
      ConfigError: naming the array, its shape or type, and what it must be.
    """
    if value is None:
        return
    if value.shape != tuple(dims):
        raise ConfigError(
            f"{name} {list(value.shape)} must be {list(dims)}: one for each token, in their order"
        )
    if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        words = {jnp.integer: "integers", jnp.floating: "floats", jnp.bool_: "bool"}
        allowed = " or ".join(words[kind] for kind in kinds)
        raise ConfigError(f"{name} are {value.dtype}: must be {allowed}")


def counted(
    dims: Sequence[int], mask: ArrayLike | None, labels: ArrayLike | None = None
) -> np.ndarray | None:
    """Which tokens have a weight, bool [...]; None where that is traced.

    Both are as the caller gave them: what is computed of them inside a jit is traced.
    """
    if isinstance(mask, jax.core.Tracer) or isinstance(labels, jax.core.Tracer):
        return None
    some = np.ones(dims, bool) if mask is None else np.asarray(mask) != 0
    return some if labels is None else some & (np.asarray(labels) != IGNORED)


def temperature(value: ArrayLike, dims: Sequence[int], some: np.ndarray | None) -> None:
    """Raises unless T is positive, one number or one for each token that has a weight.

    Args:
      value: T.
      dims: of the tokens.
      some: which of them have a weight, of `counted`.

    Raises:
      ConfigError: naming the temperature.
    """
    number("temperature", value)
    if not jnp.ndim(value):
        return
    per_token("temperature", jnp.asarray(value), dims, jnp.floating, jnp.integer)
    if some is None or isinstance(value, jax.core.Tracer):
        return
    each = np.asarray(value)[some].astype(np.float64)
    wrong = each[~(np.isfinite(each) & (each > 0))]
    if wrong.size:
        raise ConfigError(f"temperature holds {wrong[0]}: must be {COMMON['temperature']}")


EXPLICIT_REMEDY = (
    "give every axis of the mesh the type Auto, as jaxdistill.sharding.make_mesh does and "
    "jax.make_mesh with axis_types=(jax.sharding.AxisType.Auto, ...)"
)


def automatic(name: str, value: Array) -> None:
    """Raises where an array is split over an axis whose type is Explicit, JAX's default.

    Every operation behind such an array must say how its result is split: the kernels leave that
    to the compiler.

    Raises:
      ConfigError: naming the array, the axis and the remedy.
    """
    spec = getattr(jax.typeof(value).sharding, "spec", ())
    if split := [axis for axis in spec if axis is not None]:
        raise ConfigError(
            f"{name} is split over {split[0]!r}, whose type is Explicit: {EXPLICIT_REMEDY}"
        )


def floating(name: str, value: Array) -> None:
    """Raises unless an array holds floats.

    Raises:
      ConfigError: naming the array.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ConfigError(f"{name} is {value.dtype}: must be of a float type")


def softcap(name: str, value: Any) -> None:
    """Raises unless a cap is positive, or None for none; it is part of the compiled program.

    Raises:
      ConfigError: naming the cap.
    """
    if value is not None:
        number(name, value)
        if known(value) is None:
            raise ConfigError(f"{name}: must be a number that is known when a program is compiled")
