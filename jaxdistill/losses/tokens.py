"""What a row of logits says of tokens and sets of tokens: log-probability, entropy, mass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.kernels.linear_logprobs.sets import Sets, columns_of
from jaxdistill.kernels.statistics import LOWEST
from jaxdistill.losses import given
from jaxdistill.ranges import COMMON


def entropy(logits: ArrayLike, *, temperature: ArrayLike = 1.0) -> Array:
    """-sum_v q_v log q_v with q = softmax(logits / T).

    Args:
      logits: [..., V], any float dtype; -inf marks an impossible entry. A row that holds NaN, +inf
        or nothing but -inf has the value NaN, and a slope of exactly 0 where it is masked.
      temperature: T > 0, one number, or [...].

    Returns:
      [...], float32 (float64 for float64 logits), nats.

    Raises:
      ConfigError: if V is 0, or one temperature for all is not positive, or of another shape. A
        position whose own temperature is not positive has the value NaN.

    >>> import jax.numpy as jnp
    >>> print(round(float(entropy(jnp.zeros(4))), 4))
    1.3863
    """
    log_q, finished = _log_softmax(logits, temperature)
    return finished(-jnp.sum(jnp.exp(log_q) * log_q, axis=-1))


def log_mass(logits: ArrayLike, sets: Sets, *, temperature: ArrayLike = 1.0) -> Array:
    """Log of the mass that q = softmax(logits / T) gives to each of M sets of tokens.

    log sum_{v in S} q_v

    Args:
      logits: [..., V], as in `entropy`.
      sets: each the ascending ids of its tokens, or a bool [V]; or all as bool [M, V]. They may
        overlap.
      temperature: T > 0, one number, or [...].

    Returns:
      [..., M], float32 (float64 for float64 logits), at most 0.

    Raises:
      ConfigError: for a set that is empty, not ascending or not of different tokens of the
        vocabulary, or a temperature as in `entropy`. Of a traced set an id counts once, one that is
        no token is left out, and a set of none has the log-mass -inf.

    >>> import jax.numpy as jnp
    >>> print(log_mass(jnp.log(jnp.array([0.5, 0.3, 0.2])), [[0], [1, 2]]).round(4))
    [-0.6931 -0.6931]
    """
    log_q, finished = _log_softmax(logits, temperature)
    columns = columns_of(sets, log_q.shape[-1], shared=False)
    within = [jnp.where(columns[:, m], log_q, LOWEST) for m in range(columns.shape[1])]
    parts = [finished(jax.nn.logsumexp(one, axis=-1)) for one in within]
    # A set that is found empty as the program runs has no mass, and no slope.
    return jnp.where(jnp.any(columns, axis=0), jnp.stack(parts, axis=-1), -jnp.inf)


def _log_softmax(
    logits: ArrayLike, temperature: ArrayLike
) -> tuple[Array, Callable[[Array], Array]]:
    """log q, an impossible entry finite in it, and what marks the values of spoiled rows."""
    came = given.wide(checks.array("logits", logits))
    if came.ndim == 0:
        raise ConfigError("logits []: must be [..., V]")
    given.some_tokens("logits", came)
    t = given.column("temperature", temperature, came, COMMON["temperature"])
    t, usable = given.usable(t)
    spoiled = given.unsound(came) | ~usable
    clean = jnp.where(spoiled[..., None], 0.0, jnp.maximum(came, LOWEST))
    return jax.nn.log_softmax(clean / t), lambda values: given.marked(values, spoiled, came)
