"""Losses between models that cut one text into different tokens: chunks by bytes, sorted rows."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.losses.likelihood import masked_mean
from jaxdistill.types import Mean

_EDGE = 1e-6  # keeps a chunk of probability 1 away from log 0


def chunk_sums(values: ArrayLike, groups: ArrayLike, count: int) -> Array:
    """The sum of token values over each aligned group: log-likelihoods of chunks.

    Args:
      values: [..., L], such as log q of each token; what lies in no group may be anything.
      groups: int [..., L], the group of each token, 1 to `count`; 0 for tokens of none.
      count: groups that a row may have.

    Returns:
      float32 [..., count]; 0 for groups that a row does not have.

    Raises:
      ConfigError: if the shapes differ.
    """
    values, groups = jnp.asarray(values), jnp.asarray(groups)
    if values.shape != groups.shape or values.ndim < 1:
        raise ConfigError(
            f"chunk_sums: values {list(values.shape)} and groups {list(groups.shape)} must have "
            "one shape, [..., L]"
        )
    kept = jnp.where(groups > 0, values.astype(jnp.float32), 0.0)
    one = lambda row, own: jax.ops.segment_sum(row, own, count + 1)[1:]
    length = values.shape[-1]
    sums = jax.vmap(one)(kept.reshape(-1, length), groups.reshape(-1, length))
    return sums.reshape(*values.shape[:-1], count)


def alm(
    student: ArrayLike, teacher: ArrayLike, weights: ArrayLike, *, temperature: float = 100.0
) -> dict[str, Mean]:
    """Approximate likelihood matching: each chunk's probability, against everything else.

        a = t / tau, b = s / tau,    f = -(e^a b + (1 - e^a) log(1 - e^b))

    The cross-entropy of the events {the chunk, anything else} at temperature tau. Its gradient
    times tau approaches t / s - 1 for large tau: chunks of any length pull alike.

    Args:
      student: [..., C], s, log-likelihoods of the chunks, not above 0 (`chunk_sums`).
      teacher: [..., C], t, the same; a constant.
      weights: [..., C], such as the number of the teacher's tokens; 0 leaves a chunk out.
      temperature: tau, above 0.

    Returns:
      "loss", the weighted mean of f, and "loss/divergence", that of f minus its smallest value.

    Raises:
      ConfigError: if shapes differ or the temperature is not above 0.

    Reference: Minixhofer, Vulic, Ponti 2025, arXiv 2503.20083.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature}: must be above 0")
    ours, theirs = (jnp.asarray(x).astype(jnp.float32) for x in (student, teacher))
    weights = jnp.asarray(weights)
    if not ours.shape == theirs.shape == weights.shape:
        raise ConfigError(
            f"alm: student {list(ours.shape)}, teacher {list(theirs.shape)} and weights "
            f"{list(weights.shape)} must have one shape, [..., chunks]"
        )
    scaled = lambda x: jnp.minimum(jnp.where(weights > 0, x, -1.0), 0.0) / temperature - _EDGE
    a, b = jax.lax.stop_gradient(scaled(theirs)), scaled(ours)
    cross = lambda b: -(jnp.exp(a) * b - jnp.expm1(a) * _log1mexp(b))
    values = cross(b)
    return {
        "loss": masked_mean(values, weights),
        "loss/divergence": masked_mean(jax.lax.stop_gradient(values - cross(a)), weights),
    }


def uld(student_logits: ArrayLike, teacher_logits: ArrayLike) -> Array:
    """Universal logit distillation: the distance of two sorted distributions, per position.

        sum_i |q_(i) - p_(i)|,  both sorted from large to small, the shorter one padded with 0

    It compares shapes only: two models that are equally sure of different tokens are at 0.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., W], of the position that predicts the same text; a constant.

    Returns:
      float32 [...], 0 to 2.

    Raises:
      ConfigError: if the positions differ.

    >>> import jax.numpy as jnp
    >>> ours, theirs = jnp.array([0.7, 0.2, 0.1]), jnp.array([0.5, 0.3, 0.15, 0.05])
    >>> print(f"{uld(jnp.log(ours), jnp.log(theirs)):.2f}")
    0.40

    Reference: Boizard et al. 2024, arXiv 2402.12030, with both sides shifted alike (its code
    compares positions that are one apart).
    """
    ours, theirs = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    _check_rows("uld", ours, theirs)
    rows = (jax.nn.softmax(x.astype(jnp.float32), axis=-1) for x in (ours, theirs))
    return sorted_distance(*rows)


def sorted_distance(student: ArrayLike, teacher: ArrayLike) -> Array:
    """sum_i |q_(i) - p_(i)| of masses that are sorted, the shorter row padded with 0.

    Args:
      student: [..., V], q, such as the probabilities of some tokens; need not sum to 1.
      teacher: [..., W], p; a constant.

    Returns:
      float32 [...].

    Raises:
      ConfigError: if the leading dims differ.
    """
    ours, theirs = (jnp.asarray(x).astype(jnp.float32) for x in (student, teacher))
    _check_rows("sorted_distance", ours, theirs)
    width = max(ours.shape[-1], theirs.shape[-1])

    def falling(rows: Array) -> Array:
        rows = jnp.sort(rows, axis=-1, descending=True)
        missing = [(0, 0)] * (rows.ndim - 1) + [(0, width - rows.shape[-1])]
        return jnp.pad(rows, missing)

    return jnp.abs(falling(ours) - jax.lax.stop_gradient(falling(theirs))).sum(-1)


def generalized_jsd_of_parts(student: ArrayLike, teacher: ArrayLike, *, beta: float = 0.5) -> Array:
    """The generalised Jensen-Shannon divergence of masses, such as those of some tokens alone.

        m = beta p + (1 - beta) q
        beta D(p || m) + (1 - beta) D(q || m),    D(a || b) = sum_v a log(a / b) - a + b

    D is never below 0, and 0 only where a = b; the plain KL of parts of two distributions can be
    negative. Divided by neither beta nor 1 - beta; beta = 0 is D(p || q), beta = 1 is D(q || p).

    Args:
      student: [..., V], log q.
      teacher: [..., V], log p; a constant.
      beta: 0 to 1.

    Returns:
      float32 [...].

    Raises:
      ConfigError: if shapes differ, or for another beta.

    Reference: Agarwal et al. 2024 (GKD), arXiv 2306.13649, eq. 4, for the mixture.
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta = {beta}: must be in [0, 1]")
    logq, logp = (jnp.asarray(x).astype(jnp.float32) for x in (student, teacher))
    if logq.shape != logp.shape:
        raise ConfigError(
            f"generalized_jsd_of_parts: student {list(logq.shape)} and teacher {list(logp.shape)} "
            "must have one shape, [..., V]"
        )
    logp = jax.lax.stop_gradient(logp)
    apart = lambda a, b: jnp.sum(jnp.exp(a) * (a - b) - jnp.exp(a) + jnp.exp(b), axis=-1)
    if beta == 0:
        return apart(logp, logq)
    if beta == 1:
        return apart(logq, logp)
    logm = jnp.logaddexp(logp + jnp.log(beta), logq + jnp.log1p(-beta))
    return beta * apart(logp, logm) + (1 - beta) * apart(logq, logm)


def _check_rows(name: str, ours: Array, theirs: Array) -> None:
    if ours.shape[:-1] != theirs.shape[:-1] or ours.ndim < 1:
        raise ConfigError(
            f"{name}: student {list(ours.shape)} and teacher {list(theirs.shape)} must have the "
            "same positions, [..., V] and [..., W]"
        )


def _log1mexp(x: Array) -> Array:
    """log(1 - e^x) for x below 0, exact near 0 and far from it."""
    near = x > -0.6931472
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
    )
