"""KL from a teacher of whom only the most likely tokens are known, such as one that was cached."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.losses import given

TAILS = ("ghost", "drop", "renormalise")
_LOWEST = -1e30
# A teacher's rest below this is what float32 lost of its kept tokens, not mass of others.
_LEAST_REST = 1e-7


def topk_kl(
    student_logits: ArrayLike, ids: ArrayLike, logprobs: ArrayLike, *, tail: str = "ghost"
) -> Array:
    """KL(teacher || student) from the teacher's K most likely tokens.

        ghost:        sum_K p (log p - log q) + p_rest (log p_rest - log q_rest)
        drop:         sum_K p (log p - log q)
        renormalise:  sum_K p' (log p' - log q'),    p', q' normalised over the K tokens

    q is normalised over the whole vocabulary. "ghost" takes all other tokens as one: it never
    exceeds the KL over the vocabulary, grows with K and equals it from K = V - 1 on. "drop" pulls
    the student to p / sum_K p, more certain than the teacher is; "renormalise" ignores what the
    student gives to other tokens.

    Args:
      student_logits: [..., V].
      ids: int [..., K], different tokens; a negative one is none (fewer than K are known).
      logprobs: [..., K], log p at T = 1, normalised over the vocabulary. They cannot be brought to
        another temperature: what its normaliser needs of the other tokens is not known.
      tail: "ghost", "drop" or "renormalise".

    Returns:
      [...], float32 (float64 for float64 logits), nats.

    Raises:
      ConfigError: for another tail, shapes that do not fit, or "renormalise" with K = 1, which is 0
        whatever the student says.

    >>> import jax, jax.numpy as jnp
    >>> student, teacher = jnp.array([0.0, 1.0, 2.0]), jnp.array([2.0, 1.0, 0.0])
    >>> logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), 2)
    >>> print(round(float(topk_kl(student, ids, logprobs)), 4))
    1.1504

    Reference: arXiv 2503.16870 (what each tail does to the student).
    """
    came, ids, log_p = _checked(student_logits, ids, logprobs, tail)
    clamped = jnp.maximum(came, _LOWEST)
    unknown = jnp.any((ids >= 0) & jnp.isnan(log_p), axis=-1)
    spoiled = given.unsound(clamped) | unknown
    logits = jnp.where(spoiled[..., None], 0.0, clamped)
    log_p = jnp.where(spoiled[..., None], _LOWEST, log_p)
    log_q = jax.nn.log_softmax(logits)
    known = (ids >= 0) & (log_p > _LOWEST / 2)
    picked = jnp.take_along_axis(log_q, jnp.maximum(ids, 0), axis=-1)
    picked = jnp.where(known, jnp.maximum(picked, _LOWEST), 0.0)
    log_p = jnp.where(known, log_p, _LOWEST)
    if tail == "renormalise":
        log_p = log_p - jax.nn.logsumexp(log_p, axis=-1, keepdims=True)
        inside = jnp.where(known, picked, _LOWEST)
        picked = picked - jax.nn.logsumexp(inside, axis=-1, keepdims=True)
    value = jnp.sum(jnp.where(known, jnp.exp(log_p) * (log_p - picked), 0.0), axis=-1)
    finished = lambda value: given.marked(value, spoiled, came)
    if tail != "ghost" or ids.shape[-1] >= logits.shape[-1]:
        return finished(value)
    rest_q = jax.nn.logsumexp(jnp.where(_kept(ids, known, logits), _LOWEST, log_q), axis=-1)
    rest_p = 1.0 - jnp.sum(jnp.where(known, jnp.exp(log_p), 0.0), axis=-1)
    some = rest_p > _LEAST_REST
    rest_p = jnp.where(some, rest_p, 1.0)
    return finished(value + jnp.where(some, rest_p * (jnp.log(rest_p) - rest_q), 0.0))


def _kept(ids: Array, known: Array, logits: Array) -> Array:
    """Which of the V tokens are among the known ones, bool [..., V]."""
    vocab = logits.shape[-1]
    columns = jnp.where(known, ids, vocab).reshape(-1, ids.shape[-1])
    rows = jnp.arange(len(columns))[:, None]
    none = jnp.zeros((len(columns), vocab), bool)
    return none.at[rows, columns].set(True, mode="drop").reshape(logits.shape)


def _checked(logits, ids, logprobs, tail) -> tuple[Array, Array, Array]:
    logits, ids, logprobs = jnp.asarray(logits), jnp.asarray(ids), jnp.asarray(logprobs)
    if tail not in TAILS:
        raise ConfigError(f"tail = {tail!r}: must be one of {', '.join(TAILS)}")
    fits = ids.shape == logprobs.shape and ids.shape[:-1] == logits.shape[:-1]
    if not fits or ids.ndim == 0 or not 1 <= ids.shape[-1] <= logits.shape[-1]:
        raise ConfigError(
            f"student_logits {list(logits.shape)}, ids {list(ids.shape)}, logprobs "
            f"{list(logprobs.shape)}: must be [..., V], [..., K] and [..., K], K from 1 to V"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ConfigError(f"ids are {ids.dtype}: they must be integers, the index of a token")
    if tail == "renormalise" and ids.shape[-1] == 1:
        raise ConfigError("tail = renormalise with K = 1 is 0 for any student: keep more, or ghost")
    logits = given.wide(logits)
    return logits, ids, logprobs.astype(logits.dtype)
