"""What a row of logits says of tokens and sets of tokens: log-probability, entropy, mass."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels.linear_logprobs.sets import Sets, columns_of

_LOWEST = -1e30


def entropy(logits: ArrayLike, *, temperature: ArrayLike = 1.0) -> Array:
    """-sum_v q_v log q_v with q = softmax(logits / T).

    Args:
      logits: [..., V], any float dtype; -inf marks an impossible entry.
      temperature: T > 0.

    Returns:
      [...], float32 (float64 for float64 logits), nats.

    Raises:
      ConfigError: if the temperature is not positive.

    >>> import jax.numpy as jnp
    >>> print(round(float(entropy(jnp.zeros(4))), 4))
    1.3863
    """
    log_q = _log_softmax(logits, temperature)
    return -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)


def log_mass(logits: ArrayLike, sets: Sets, *, temperature: ArrayLike = 1.0) -> Array:
    """Log of the mass that q = softmax(logits / T) gives to each of M sets of tokens.

    log sum_{v in S} q_v

    Args:
      logits: [..., V].
      sets: each the ascending ids of its tokens, or a bool [V]; or all as bool [M, V]. They may
        overlap.
      temperature: T > 0.

    Returns:
      [..., M], float32 (float64 for float64 logits), at most 0.

    Raises:
      ConfigError: for a set that is empty, not ascending or not of different tokens of the
        vocabulary, or a temperature that is not positive. Of a traced set an id counts once and one
        that is no token is left out.

    >>> import jax.numpy as jnp
    >>> print(log_mass(jnp.log(jnp.array([0.5, 0.3, 0.2])), [[0], [1, 2]]).round(4))
    [-0.6931 -0.6931]
    """
    log_q = _log_softmax(logits, temperature)
    columns = columns_of(sets, log_q.shape[-1], shared=False)
    parts = [jnp.where(columns[:, m], log_q, -jnp.inf) for m in range(columns.shape[1])]
    return jnp.stack([jax.nn.logsumexp(part, axis=-1) for part in parts], axis=-1)


def _log_softmax(logits: ArrayLike, temperature: ArrayLike) -> Array:
    """log q of float logits in which an impossible entry is a finite one."""
    logits = jnp.asarray(logits)
    if logits.ndim == 0:
        raise ConfigError("logits []: must be [..., V]")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ConfigError(f"temperature = {temperature}: must be positive")
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jax.nn.log_softmax(jnp.maximum(wide, _LOWEST) / jnp.asarray(temperature, wide.dtype))
