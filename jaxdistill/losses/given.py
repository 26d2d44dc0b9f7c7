"""What a loss is given: logits of one shape, numbers in range, and rows that are no distribution.

A row that holds NaN or an infinite logit has the value NaN, whose slope would be NaN even where a
mask gives the row no weight, for 0 * NaN is NaN. Such rows are computed from zeros, and marked at
the end: their slope is exactly 0 where nothing flows back, and infinite where something does.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.ranges import COMMON, Range

_LARGE = 1e38  # its third power times any float32 but 0 is infinite


class Logits(NamedTuple):
    """Two models' logits as a divergence takes them.

    Attributes:
      student: [..., V] at least float32, 0 in spoiled rows.
      teacher: [..., V].
      temperature: positive and finite, [] or [..., 1].
      spoiled: bool [...], rows that hold no distribution.
      given: the student's and the teacher's logits as they came.
    """

    student: Array
    teacher: Array
    temperature: Array
    spoiled: Array
    given: tuple[Array, Array]

    def finished(self, values: Array, scale_by_t2: bool) -> Array:
        """values [...] times T^2 where asked for, and NaN in spoiled rows."""
        if scale_by_t2:
            t2 = jnp.square(self.temperature)
            values = values * (t2[..., 0] if t2.ndim else t2)
        return marked(values, self.spoiled, *self.given)


def logits(
    where: str,
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike,
    lowest: float | None = None,
) -> Logits:
    """The checked operands of a divergence.

    Args:
      where: what messages begin with: the name of the function and a colon, or "".
      student_logits: [..., V].
      teacher_logits: [..., V].
      temperature: T, one number, or [...], one for each position.
      lowest: smallest logit, at which others are held; None leaves -inf, an impossible entry.

    Raises:
      ConfigError: if shapes differ, V is 0, one temperature for all is not positive, or is of
        another shape. A position whose own temperature is not positive is a spoiled row.
    """
    student, teacher = (wide(jnp.asarray(x)) for x in (student_logits, teacher_logits))
    if student.shape != teacher.shape or student.ndim == 0:
        raise ConfigError(
            f"{where}student_logits {list(student.shape)} and teacher_logits "
            f"{list(teacher.shape)} must have one shape [..., V]; slice padded vocabulary off first"
        )
    some_tokens(f"{where}logits", student)
    t = column("temperature", temperature, student, COMMON["temperature"], where)
    given = student, teacher
    if lowest is not None:
        student, teacher = (jnp.maximum(x, lowest) for x in given)
    t, sound_t = usable(t)
    bad = unsound(student) | unsound(teacher) | ~sound_t
    sound = lambda x: jnp.where(bad[..., None], 0.0, x)
    return Logits(sound(student), sound(teacher), t, bad, given)


def some_tokens(name: str, logits: Array) -> None:
    """Raises unless there is an entry in every row of logits [..., V].

    Raises:
      ConfigError: naming the logits.
    """
    if not logits.shape[-1]:
        raise ConfigError(f"{name} {list(logits.shape)}: must be [..., V] with V of at least 1")


def usable(temperature: Array) -> tuple[Array, Array]:
    """Temperatures [] or [..., 1], 1 where one is none; and which are some, bool [] or [...]."""
    some = (temperature > 0) & jnp.isfinite(temperature)
    return jnp.where(some, temperature, 1.0), some[..., 0] if some.ndim else some


def wide(x: Array) -> Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unsound(x: Array) -> Array:
    """Which rows hold NaN, an entry of +inf, or nothing but -inf, bool [...]."""
    return ~jnp.isfinite(jnp.max(x, axis=-1))


def column(name: str, value: ArrayLike, like: Array, allowed: Range, where: str = "") -> Array:
    """A number of a loss, one [] for all positions or one for each, as [..., 1].

    Args:
      name: of the number.
      value: [], or [...] as the positions of `like`, or [..., 1].
      like: logits [..., V].
      allowed: its range.
      where: what the message begins with.

    Raises:
      ConfigError: for a number out of its range, or another shape.
    """
    checks.number(name, value, allowed, where)
    value = jnp.asarray(value)
    value = value.astype(jnp.promote_types(value.dtype, like.dtype))
    positions, shape = like.shape[:-1], value.shape
    if shape == () or (len(shape) == like.ndim and _spreads(shape, (*positions, 1))):
        return value
    if shape == positions:
        return value[..., None]
    raise ConfigError(
        f"{where}{name} {list(shape)}: must be one number, or {list(positions)}, one for each "
        "position"
    )


def _spreads(shape: Sequence[int], over: Sequence[int]) -> bool:
    return all(a in (1, b) for a, b in zip(shape, over, strict=True)) and shape[-1] == 1


@jax.custom_jvp
def marked(values: Array, spoiled: Array, *arrays: Array) -> Array:
    """NaN in spoiled rows, else the values, [...].

    Args:
      values: [...].
      spoiled: bool [...].
      arrays: [..., D] that the rows came from, whose slopes there are 0 or infinite.
    """
    return jnp.where(spoiled, jnp.nan, values)


@marked.defjvp
def _marked_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    values, spoiled, *arrays = primals
    moved, _, *along = tangents
    ones = jnp.ones_like(values)
    slope = sum(endless(jnp.sum(x, axis=-1).astype(values.dtype), ones, spoiled) for x in along)
    return marked(values, spoiled, *arrays), jnp.where(spoiled, slope, moved)


def endless(along: Array, slope: Array, where: Array) -> Array:
    """slope * along; where marked it is infinite, yet exactly 0 where `along` is, in both modes."""
    large = jnp.where(where, _LARGE, 1.0).astype(slope.dtype)
    return along * jnp.where(where, 1.0, slope) * large * large * large
