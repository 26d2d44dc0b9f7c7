"""The operands that both operations take beside logits, and the checks of what a caller passes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.kernels.statistics import LOWEST, Scales

# A share of LOWEST is below this, be it what rounding leaves or what a temperature divides; a logit
# never is.
FARTHEST = -(2.0**60)

# A divergence of the caller's own: (student logits / T, teacher logits / T, labels) -> [n].
DivergenceFunction = Callable[[Array, Array, Array | None], Array]


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """What is computed; static, so it is known when a program is compiled.

    Attributes:
      kind: the divergence: a key of `rows.KINDS`, a function of whole rows, or None for none.
      labels: whether there is a cross-entropy.
      scale_by_t2: whether the divergence is multiplied by T^2.
      vocab_axes: mesh axes that share the vocabulary of a row.
      at_one: whether the temperature is known to be 1, so that one set of sums serves the
        divergence, cross-entropy and the metrics.
    """

    kind: str | DivergenceFunction | None
    labels: bool
    scale_by_t2: bool = True
    vocab_axes: tuple[str, ...] = ()
    at_one: bool = False


class Coefficients(NamedTuple):
    """The numbers of the formula, float32 and possibly traced; an absent one is None.

    Attributes:
      alpha: weight of the cross-entropy, [].
      temperature: T, [] or one for each token.
      parameters: of the divergence, such as (beta,), each [].
      taid_t: t of TAID's target (1 - t) student + t teacher, [].
      smoothing: eps of label smoothing, [].
    """

    alpha: Any
    temperature: Any
    parameters: Any = ()
    taid_t: Any = None
    smoothing: Any = None

    @property
    def scales(self) -> Scales:
        """1 / T and 1, the factors of the statistics."""
        return Scales(1.0 / self.temperature, 1.0)

    @property
    def has_scalar_temperature(self) -> bool:
        """Whether one temperature serves all tokens."""
        return self.temperature.ndim == 0

    def specs(self, per_token: PartitionSpec) -> "Coefficients":
        """How the coefficients lie on a mesh whose tokens lie as `per_token` says."""
        specs = jax.tree.map(lambda _: PartitionSpec(), self)
        return specs if self.has_scalar_temperature else specs._replace(temperature=per_token)


class VocabularyShard(NamedTuple):
    """The columns of the vocabulary on one device; all of them where no axis shares it.

    Attributes:
      axes: mesh axes that share the vocabulary.
      offset: index of the first token here.
      size: number of tokens here.
      padded: whether columns of no token may follow them.
    """

    axes: tuple[str, ...]
    offset: Any
    size: Any
    padded: bool = False

    def column(self, labels: Array) -> Array:
        """The labels' columns on this device, -1 for a label of another device."""
        index = labels - self.offset
        return jnp.where((index >= 0) & (index < self.size), index, -1)

    def sum(self, part: Array) -> Array:
        """The sum over all shards."""
        return jax.lax.psum(part, self.axes) if self.axes else part

    def max(self, part: Array) -> Array:
        """The maximum over all shards."""
        return jax.lax.pmax(part, self.axes) if self.axes else part


def coefficients(
    alpha: ArrayLike,
    temperature: ArrayLike,
    parameters: Sequence[ArrayLike],
    taid_t: ArrayLike | None,
    label_smoothing: ArrayLike | None,
) -> Coefficients:
    """The caller's numbers as float32 arrays; all but alpha and T are constants."""
    number = lambda x: jnp.asarray(x, jnp.float32)
    constant = lambda x: None if x is None else jax.lax.stop_gradient(number(x))
    return Coefficients(
        number(alpha),
        number(temperature),
        tuple(map(constant, parameters)),
        constant(taid_t),
        constant(label_smoothing),
    )


def per_token(
    labels: ArrayLike | None, mask: ArrayLike | None, dims: Sequence[int]
) -> tuple[Array | None, Array]:
    """The caller's labels, and each token's float32 weight: its mask, 0 where its label is -100.

    Raises:
      ConfigError: unless both are [...] as the tokens are, of their types.
    """
    weights = jnp.ones(dims) if mask is None else checks.array("mask", mask)
    checks.per_token("mask", weights, dims, jnp.bool_, jnp.integer, jnp.floating)
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    if labels is None:
        return None, weights
    labels = checks.indices("labels", labels)
    checks.per_token("labels", labels, dims, jnp.integer)
    return labels, jnp.where(labels == checks.IGNORED, 0.0, weights)


def check_numbers(
    alpha: ArrayLike,
    temperature: ArrayLike,
    taid_t: ArrayLike | None,
    label_smoothing: ArrayLike | None,
    parameters: Sequence[ArrayLike],
    dims: Sequence[int],
    some: np.ndarray | None,
) -> None:
    """Raises where a number of the formula is out of its range, or has dims that it must not have.

    `some` is which tokens have a weight, of `checks.counted`.

    Raises:
      ConfigError: naming the number.
    """
    checks.temperature(temperature, dims, some)
    checks.number("alpha", alpha)  # None too, which the others may be
    checks.numbers({"alpha": alpha, "taid_t": taid_t, "label_smoothing": label_smoothing})
    for value in parameters:
        if jnp.ndim(value):
            raise ConfigError(f"parameters {list(jnp.shape(value))}: must be numbers, [] each")


def check_alpha(alpha: ArrayLike, labels: ArrayLike | None) -> None:
    """Raises where alpha may weigh a cross-entropy and there are no labels.

    Raises:
      ConfigError: naming alpha.
    """
    if labels is None and checks.known(alpha) != 0:
        raise ConfigError(f"alpha={alpha} weighs cross-entropy, which needs labels; labels is None")


def check_manual_axes(operands: Any) -> None:
    """Raises inside a shard_map with check_vma=True, which would sum gradients a second time.

    Raises:
      ConfigError: naming the remedy.
    """
    kinds = (getattr(jax.typeof(x), "manual_axis_type", None) for x in jax.tree.leaves(operands))
    if any(getattr(kind, "varying", None) for kind in kinds):
        raise ConfigError(
            "called inside a shard_map with check_vma=True: pass check_vma=False to the shard_map, "
            "and add up the gradients of arrays that are the same on several devices (psum)"
        )


def taid_target(student: Array, teacher: Array, taid_t: Any) -> Array:
    """TAID's target, (1 - t) student + t teacher, of logits [n, V] or of a tile of them.

    Impossible where a model with a share of the mixture says so: `LOWEST` itself, whose products
    are exact. A model without one, at t = 0 or 1, says nothing.
    """
    mixed = (1 - taid_t) * student + taid_t * teacher
    return jnp.where(mixed <= FARTHEST, LOWEST, mixed)
