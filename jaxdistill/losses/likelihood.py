"""Cross-entropy with label smoothing, per-token log-probability, and the one masked mean."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.losses import given
from jaxdistill.types import Mean


def cross_entropy(
    student_logits: ArrayLike, labels: ArrayLike, *, label_smoothing: ArrayLike = 0.0
) -> Array:
    """Cross-entropy of the labels under the student, each position apart.

    -(1 - eps) log q_y - eps mean_v log q_v, the mean over the entries that are not -inf.

    Args:
      student_logits: [..., V], any float dtype; -inf marks an impossible entry.
      labels: int [...]. A negative label (the field's -100) is no label and gives 0: leave it out
        of the mean with `masked_mean(values, labels >= 0)`. A label of V or more gives NaN.
      label_smoothing: eps in [0, 1].

    Returns:
      [...], float32 (float64 for float64 logits), nats, unreduced.

    Raises:
      ConfigError: if the shapes do not fit, V is 0, or label_smoothing lies outside [0, 1].

    >>> import jax.numpy as jnp
    >>> print(cross_entropy(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([1])))
    [0.2877]

    Reference: Szegedy et al. 2015, arXiv 1512.00567, section 7 (label smoothing).
    """
    came, labels = _checked(student_logits, labels)
    checks.numbers({"label_smoothing": label_smoothing})
    given.some_tokens("logits", came)
    spoiled = given.unsound(came) & (labels >= 0)
    logits = jnp.where(given.unsound(came)[..., None], 0.0, came)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    values = normalizer - _pick(logits, labels)
    if checks.known(label_smoothing) != 0:
        possible = logits > -jnp.inf
        uniform = normalizer - jnp.where(possible, logits, 0.0).sum(-1) / possible.sum(-1)
        eps = jnp.asarray(label_smoothing, values.dtype)
        values = (1.0 - eps) * values + eps * uniform
    return given.marked(jnp.where(labels < 0, 0.0, values), spoiled, came)


def token_log_probability(logits: ArrayLike, tokens: ArrayLike) -> Array:
    """Log-probability of each token, log softmax(logits)[token].

    Args:
      logits: [..., V].
      tokens: int [...], or [..., K] for K tokens of each row; a negative token gives 0, one of V or
        more NaN.

    Returns:
      The shape of `tokens`, float32 (float64 for float64 logits), nats, never positive.

    Raises:
      ConfigError: if the shapes do not fit, V is 0, or tokens are no integers.
    """
    logits, tokens = checks.array("logits", logits), checks.indices("tokens", tokens)
    several = tokens.ndim == logits.ndim
    dims = logits.shape[:-1]
    if (
        not logits.ndim
        or tokens.shape[: tokens.ndim - several] != dims
        or not all(tokens.shape[len(dims) :])
    ):
        raise ConfigError(
            f"tokens {list(tokens.shape)}: must be {list(dims)} or {[*dims, 'K']}, K at least 1, "
            f"as the logits {list(logits.shape)} have it"
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ConfigError(f"tokens are {tokens.dtype}: they must be integers, the index of a token")
    if not several:
        return -cross_entropy(logits, tokens)
    return -jnp.stack([cross_entropy(logits, one) for one in jnp.moveaxis(tokens, -1, 0)], axis=-1)


def masked_mean(values: ArrayLike, mask: ArrayLike) -> Mean:
    """Sum and count of the masked entries; the parts of one batch add up exactly.

    total = sum(mask * values), count = sum(mask)

    Args:
      values: [...], unreduced losses; what lies under a zero mask may be anything, NaN too: nothing
        flows back to it, and through the losses of this package exactly 0 to what it was made of.
      mask: bool or float [...], the same shape: which entries count, or their weights.

    Returns:
      Mean(total, count), both float32 scalars; its `value` is 0 when nothing counts.

    Raises:
      ConfigError: if the shapes differ.

    >>> import jax.numpy as jnp
    >>> print(masked_mean(jnp.array([1.0, 5.0, 3.0]), jnp.array([True, False, True])).value)
    2.0
    """
    values, mask = jnp.asarray(values), jnp.asarray(mask)
    if values.shape != mask.shape:
        raise ConfigError(
            f"masked_mean: values {list(values.shape)} and mask {list(mask.shape)} must have one "
            "shape, or padding would be counted"
        )
    weights = mask.astype(jnp.float32)
    counted = jnp.where(weights == 0, 0.0, values.astype(jnp.float32))
    return Mean((weights * counted).sum(), weights.sum())


def _checked(logits: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    logits, labels = jnp.asarray(logits), checks.indices("labels", labels)
    if logits.shape[:-1] != labels.shape or logits.ndim == 0:
        raise ConfigError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} do not fit: they must be "
            "[..., V] and [...], one token index for each row of logits"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ConfigError(f"labels are {labels.dtype}: they must be integers, the index of a token")
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), labels


def _pick(logits: Array, labels: Array) -> Array:
    index = jnp.maximum(labels, 0)[..., None]
    return jnp.take_along_axis(logits, index, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
