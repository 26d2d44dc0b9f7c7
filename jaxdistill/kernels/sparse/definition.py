"""What a student is drawn to by a teacher of whom K tokens are known in each row.

With p the teacher's probabilities of the known tokens K, p_rest what it gives to all others
together, and q the student's, normalised over the whole vocabulary,

    forward_kl               sum_K p (log p - log q) + p_rest (log p_rest - log q_rest)
    generalized_forward_kl   sum_K p (log p - log q) - p + q
    generalized_reverse_kl   sum_K q (log q - log p) - q + p
    cross_entropy            -sum_K p log q

The first takes the other tokens as one, a ghost: it is at most KL(p || q) over the vocabulary and
grows with K. The generalised forms are sums of entries that are 0 where p = q and positive
elsewhere, so their optimum is right for any K; they are at most the ghost's. Cross-entropy is for
tokens that were drawn from p: p is then their share of the draws, and its mean that of p itself.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels import rows
from jaxdistill.kernels.statistics import LOWEST

# A teacher's rest below this is what float32 lost of its known tokens, not mass of others.
LEAST_REST = 1e-7


class SparseTeacher(NamedTuple):
    """What is known of a teacher, per token; an absent array is None.

    Attributes:
      ids: int [..., K]; a negative one is none.
      logprobs: log p, [..., K].
      rest: mass of all other tokens, [...].
      sampled: int [...], one token that the student has drawn.
      sampled_logprobs: log p of it, [...].
    """

    ids: Array
    logprobs: Array
    rest: Array | None = None
    sampled: Array | None = None
    sampled_logprobs: Array | None = None


class SparseKind(NamedTuple):
    """A divergence of known tokens, entry by entry; functions take (log_p, log_q).

    Attributes:
      value: the entry's share.
      dlogq: its derivative by log q.
      ghost: whether all other tokens count as one more entry, so that it is the KL of two
        distributions and never below 0.
    """

    value: rows.Elementwise
    dlogq: rows.Elementwise
    ghost: bool = False


def _generalized(log_a: Array, log_b: Array) -> Array:
    """a (log a - log b) - a + b, not negative."""
    gap = log_a - log_b
    near = jnp.abs(gap) <= 1
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    small = jnp.where(near, gap, 0.0)
    # Where a is nearly b the three terms cancel; expm1 keeps what is left.
    close = a * jnp.maximum(small + jnp.expm1(-small), 0.0)
    return jnp.where(near, close, jnp.where(a == 0, 0.0, a * gap) - a + b)


KINDS: Mapping[str, SparseKind] = {
    "forward_kl": SparseKind(rows.FORWARD_KL.value, rows.FORWARD_KL.dlogq, ghost=True),
    "generalized_forward_kl": SparseKind(
        _generalized, lambda log_p, log_q: jnp.exp(log_q) - jnp.exp(log_p)
    ),
    "generalized_reverse_kl": SparseKind(
        lambda log_p, log_q: _generalized(log_q, log_p),
        lambda log_p, log_q: rows.FORWARD_KL.value(log_q, log_p),
    ),
    "cross_entropy": SparseKind(
        lambda log_p, log_q: -jnp.exp(log_p) * log_q, lambda log_p, log_q: -jnp.exp(log_p)
    ),
}


def silence(known: SparseTeacher, counted: Array) -> SparseTeacher:
    """What is known where a token counts, and nothing of the teacher elsewhere."""
    ids = jnp.where(counted[..., None], known.ids, -1)
    where = lambda array, other: None if array is None else jnp.where(counted, array, other)
    return known._replace(ids=ids, rest=where(known.rest, 0.0), sampled=where(known.sampled, -1))


def is_known(known: SparseTeacher) -> Array:
    """Which of the K are tokens of their row, bool [..., K].

    None is a negative id, one whose log-probability is -inf, and one that stood before in the row.
    """
    given = (known.ids >= 0) & ~(known.logprobs <= LOWEST / 2)
    ids = jnp.where(given, known.ids, -1)
    order = jnp.argsort(ids, axis=-1, stable=True)
    in_order = jnp.take_along_axis(ids, order, axis=-1)
    first = jnp.ones_like(given[..., :1])
    new = jnp.concatenate([first, in_order[..., 1:] != in_order[..., :-1]], axis=-1)
    return given & jnp.take_along_axis(new, jnp.argsort(order, axis=-1), axis=-1)


def rest_of(known: SparseTeacher, counts: Array, vocab: int) -> Array:
    """p_rest, [...]: as given, or what the known tokens leave; NaN stays what it is.

    0 where that is rounding, or where all V tokens are known and none is left to have it.
    """
    rest = known.rest
    if rest is None:
        rest = 1.0 - jnp.sum(jnp.where(counts, jnp.exp(known.logprobs), 0.0), axis=-1)
    none = (rest <= LEAST_REST) | (jnp.sum(counts, axis=-1) >= vocab)
    return jnp.where(none, 0.0, jnp.minimum(rest, 1.0))


def entries(
    kind: SparseKind, known: SparseTeacher, counts: Array, log_q: Array
) -> tuple[Array, Array]:
    """The known tokens' shares of the divergence and their derivatives by log q, [..., K] each."""
    log_p = jnp.where(counts, known.logprobs, 0.0)
    log_q = jnp.where(counts, jnp.maximum(log_q, LOWEST), 0.0)
    inside = lambda array: jnp.where(counts, array, 0.0)
    return inside(kind.value(log_p, log_q)), inside(kind.dlogq(log_p, log_q))


def ghost(rest_p: Array, log_rest_q: Array) -> Array:
    """p_rest (log p_rest - log q_rest), and 0 where the teacher leaves nothing: [...]."""
    some = ~(rest_p <= 0)
    log_p = jnp.log(jnp.where(some, rest_p, 1.0))
    return jnp.where(some, rest_p * (log_p - jnp.maximum(log_rest_q, LOWEST)), 0.0)


def sampled_tail(
    known: SparseTeacher, counts: Array, log_q: Array, mass_q: Array, mass_p: Array
) -> Array:
    """What one drawn token adds to `generalized_reverse_kl`: a value with a gradient by log_q.

    With l = log q - log p of the drawn token y, a constant, and [y not in K] the cases that count,

        value  [y not in K] l + q(K) - p(K)        gradient  [y not in K] l grad log q_y

    Over y ~ q the sum over K and this have KL(q || p) and its gradient as their mean.

    Args:
      known: with its drawn token; a negative one is none.
      counts: of `is_known`.
      log_q: of the drawn token, [...].
      mass_q: q(K), [...].
      mass_p: p(K), [...].
    """
    assert known.sampled is not None and known.sampled_logprobs is not None, "there is one"
    among = jnp.any(counts & (known.ids == known.sampled[..., None]), axis=-1)
    drawn = known.sampled >= 0
    # Where none was drawn its number may be anything: 0 * NaN must not reach a slope.
    log_p = jnp.where(drawn, jnp.maximum(known.sampled_logprobs, LOWEST), 0.0)
    gap = jax.lax.stop_gradient(log_q) - log_p
    once = 1.0 + log_q - jax.lax.stop_gradient(log_q)  # 1, with the gradient of log q
    tail = jnp.where(drawn & ~among, gap * once, 0.0)
    return tail + jnp.where(drawn, jax.lax.stop_gradient(mass_q) - mass_p, 0.0)
