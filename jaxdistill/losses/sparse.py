"""Divergences from a teacher of whom only some tokens are known: cached, served, or sampled.

`kernels.linear_divergence(..., teacher_ids=...)` computes the same from hidden states and head.
All take logits at the temperature at which the teacher's log-probabilities were taken: divide them
by it first. Traced numbers are not looked at, nor are log-probabilities beside traced ids: one
above 0 is 0, probabilities that sum above 1 leave no rest, an id that stands twice counts once, and
an id of V or more makes its row NaN. A token of log-probability -inf is as one that is not listed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.kernels.sparse.checks import known_teacher
from jaxdistill.kernels.sparse.definition import KINDS as _KINDS
from jaxdistill.kernels.sparse.definition import SparseTeacher, entries, is_known, silence
from jaxdistill.kernels.sparse.reference import divergence
from jaxdistill.losses import given

TAILS = ("ghost", "drop", "renormalise")
_LOWEST = -1e30


def topk_kl(
    student_logits: ArrayLike,
    teacher_ids: ArrayLike,
    teacher_logprobs: ArrayLike,
    *,
    teacher_rest: ArrayLike | None = None,
    tail: str = "ghost",
) -> Array:
    """KL(teacher || student) from K tokens of the teacher, such as its most likely ones.

        ghost:        sum_K p (log p - log q) + p_rest (log p_rest - log q_rest)
        drop:         sum_K p (log p - log q)
        renormalise:  sum_K p' (log p' - log q'),    p', q' normalised over the K tokens

    q is normalised over the whole vocabulary. "ghost" takes all other tokens as one: it never
    exceeds the KL over the vocabulary, grows with K and equals it from K = V - 1 on. "drop" pulls
    the student to p / sum_K p, more certain than the teacher is; "renormalise" ignores what the
    student gives to other tokens.

    Args:
      student_logits: [..., V].
      teacher_ids: int [..., K], different tokens; a negative one is none (fewer than K are known).
      teacher_logprobs: [..., K], log p normalised over the vocabulary. They cannot be brought to
        another temperature: what its normaliser needs of the other tokens is not known.
      teacher_rest: [...], the mass of all other tokens; None takes what the K leave.
      tail: "ghost", "drop" or "renormalise".

    Returns:
      [...], float32 (float64 for float64 logits), nats.

    Raises:
      ConfigError: for another tail, shapes that do not fit, "renormalise" with K = 1, which is 0
        whatever the student says; where the numbers are known, for ids beyond the vocabulary or
        twice in a row, log-probabilities above 0 and probabilities that sum to more than 1.

    >>> import jax, jax.numpy as jnp
    >>> student, teacher = jnp.array([0.0, 1.0, 2.0]), jnp.array([2.0, 1.0, 0.0])
    >>> logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), 2)
    >>> print(round(float(topk_kl(student, ids, logprobs)), 4))
    1.1504

    Reference: arXiv 2503.16870 (what each tail does to the student).
    """
    if tail not in TAILS:
        raise ConfigError(f"tail = {tail!r}: must be one of {', '.join(TAILS)}")
    logits, known, finished = _checked(
        "forward_kl", student_logits, teacher_ids, teacher_logprobs, teacher_rest
    )
    if tail == "ghost":
        return finished(divergence("forward_kl", logits, known))
    if tail == "renormalise" and known.ids.shape[-1] == 1:
        raise ConfigError("tail = renormalise with K = 1 is 0 for any student: keep more, or ghost")
    counts = is_known(known)
    log_q = jax.nn.log_softmax(jnp.maximum(logits, _LOWEST))
    ids = jnp.where(counts, known.ids, 0)
    picked = jnp.take_along_axis(log_q, ids, axis=-1, mode="fill", fill_value=jnp.nan)
    if tail == "renormalise":
        normalised = lambda log: (
            log
            - jax.nn.logsumexp(
                jnp.where(counts, jnp.maximum(log, _LOWEST), _LOWEST), axis=-1, keepdims=True
            )
        )
        known = known._replace(logprobs=normalised(known.logprobs))
        picked = normalised(picked)
    return finished(jnp.sum(entries(_KINDS["forward_kl"], known, counts, picked)[0], axis=-1))


def topk_generalized_kl(
    student_logits: ArrayLike,
    teacher_ids: ArrayLike,
    teacher_logprobs: ArrayLike,
    *,
    reverse: bool = False,
) -> Array:
    """The generalised KL over K tokens: never negative, 0 only where q = p on all of them.

        forward:  sum_K p (log p - log q) - p + q
        reverse:  sum_K q (log q - log p) - q + p

    Neither side is renormalised. Whatever tokens are known, the optimum is right, where a plain
    truncated sum lets q leave the K tokens or pass beyond p.

    Args:
      student_logits: [..., V].
      teacher_ids: int [..., K], different tokens; a negative one is none.
      teacher_logprobs: [..., K], log p normalised over the vocabulary.
      reverse: the direction of KL(q || p).

    Returns:
      [...], float32 (float64 for float64 logits), nats.

    Raises:
      ConfigError: for what `topk_kl` refuses.

    >>> import jax, jax.numpy as jnp
    >>> student, teacher = jnp.array([1.0, 0.5, 0.0, -1.0]), jnp.array([0.2, 1.2, -0.5, 0.3])
    >>> logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), 2)
    >>> print(round(float(topk_generalized_kl(student, ids, logprobs)), 4))
    0.1709

    Reference: arXiv 2606.30406, eq. 5.
    """
    kind = "generalized_reverse_kl" if reverse else "generalized_forward_kl"
    logits, known, finished = _checked(kind, student_logits, teacher_ids, teacher_logprobs)
    return finished(divergence(kind, logits, known))


def sampled_cross_entropy(
    student_logits: ArrayLike, teacher_ids: ArrayLike, teacher_logprobs: ArrayLike
) -> Array:
    """-sum_K p log q of tokens that were drawn from the teacher, p their share of the draws.

    Over the draws its mean, and that of its gradient, is the cross-entropy from the teacher's whole
    row.

    Args:
      student_logits: [..., V].
      teacher_ids: int [..., K], different tokens; a negative one is none.
      teacher_logprobs: [..., K], log of the share of the draws, log(count / draws).

    Returns:
      [...], float32 (float64 for float64 logits), nats.

    Raises:
      ConfigError: for what `topk_kl` refuses.

    Reference: arXiv 2503.16870, section 3 (random sampling).
    """
    logits, known, finished = _checked(
        "cross_entropy", student_logits, teacher_ids, teacher_logprobs
    )
    return finished(divergence("cross_entropy", logits, known))


def sampled_reverse_kl(
    student_logits: ArrayLike,
    teacher_ids: ArrayLike,
    teacher_logprobs: ArrayLike,
    sampled_ids: ArrayLike,
    sampled_logprobs: ArrayLike,
) -> Array:
    """KL(student || teacher) from the teacher's numbers for K tokens and for one drawn token.

        value     sum_K q l + [y not in K] l_y
        gradient  sum_K l grad q + [y not in K] l_y grad log q_y,     l = log q - log p

    Over y ~ q both have the mean of the whole KL, for any K; with the student's own most likely
    tokens little is left to chance.

    Args:
      student_logits: [..., V].
      teacher_ids: int [..., K], different tokens, such as the student's most likely; a negative one
        is none.
      teacher_logprobs: [..., K], log p normalised over the vocabulary.
      sampled_ids: int [...], y, drawn from softmax(student_logits).
      sampled_logprobs: [...], log p of it.

    Returns:
      [...], float32 (float64 for float64 logits), nats.

    Raises:
      ConfigError: for what `topk_kl` refuses.
    """
    kind = "generalized_reverse_kl"
    sampled = (sampled_ids, sampled_logprobs)
    logits, known, finished = _checked(
        kind, student_logits, teacher_ids, teacher_logprobs, None, *sampled
    )
    return finished(divergence(kind, logits, known))


def _checked(
    kind: str,
    student_logits: ArrayLike,
    ids: ArrayLike,
    logprobs: ArrayLike,
    rest: ArrayLike | None = None,
    sampled: ArrayLike | None = None,
    sampled_logprobs: ArrayLike | None = None,
) -> tuple[Array, SparseTeacher, Callable[[Array], Array]]:
    """Float logits, what is known of the teacher, and what marks the values of spoiled rows."""
    logits = checks.array("student_logits", student_logits)
    if logits.ndim == 0:
        raise ConfigError("student_logits []: must be [..., V]")
    given.some_tokens("student_logits", logits)
    sparse: dict[str, ArrayLike | None] = {
        "teacher_ids": ids,
        "teacher_logprobs": logprobs,
        "teacher_rest": rest,
        "sampled_ids": sampled,
        "sampled_logprobs": sampled_logprobs,
    }
    dims = logits.shape[:-1]
    known = known_teacher(kind, dims, logits.shape[-1], sparse, checks.counted(dims, None))
    came = given.wide(logits)
    unknown = jnp.any(is_known(known) & jnp.isnan(known.logprobs), axis=-1)
    if known.rest is not None:
        unknown |= jnp.isnan(known.rest)
    if known.sampled is not None and known.sampled_logprobs is not None:
        unknown |= (known.sampled >= 0) & jnp.isnan(known.sampled_logprobs)
    spoiled = given.unsound(jnp.maximum(came, _LOWEST)) | unknown
    logits = jnp.where(spoiled[..., None], 0.0, came)
    return logits, silence(known, ~spoiled), lambda value: given.marked(value, spoiled, came)
