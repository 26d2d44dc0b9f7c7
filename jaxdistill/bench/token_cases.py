"""What else the head is asked for: log-probabilities, sets, and a teacher known in part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill import kernels
from jaxdistill.bench.cases import Case, log_softmax64
from jaxdistill.bench.shapes import Shape

KNOWN = 64  # tokens of a teacher, as caches keep them


def logprobs(shape: Shape) -> Case:
    """A policy's loss, mean_i a_i log q_i of given tokens: value, and gradients of both arrays."""
    hidden, head, ids, advantage = _policy(shape)

    def naive(hidden, head, ids, advantage):
        log_q = jax.nn.log_softmax(_logits(hidden, head))
        return jnp.mean(advantage * jnp.take_along_axis(log_q, ids[:, None], axis=1)[:, 0])

    def ours(hidden, head, ids, advantage):
        return jnp.mean(advantage * kernels.linear_logprobs(hidden, head, ids).logprobs)

    def value64(hidden, head, ids, advantage) -> float:
        log_q = log_softmax64(hidden @ head.T)[np.arange(len(ids)), ids]
        return float((advantage * log_q).mean())

    arrays = (hidden, head, ids, advantage)
    return _case(shape, "log q", naive, ours, arrays, (0, 2, 3), value64)


def masses(shape: Shape) -> Case:
    """mean_i of the log-masses of three sets of a hundredth of the vocabulary each."""
    hidden, head, _, _ = _policy(shape)
    size = max(1, shape.vocab // 100)
    sets = [np.arange(m * size, (m + 1) * size) for m in range(3)]

    def naive(hidden, head):
        log_q = jax.nn.log_softmax(_logits(hidden, head))
        return jnp.mean(sum(jax.nn.logsumexp(log_q[:, one], axis=1) for one in sets))

    def ours(hidden, head):
        log_masses = kernels.linear_logprobs(hidden, head, sets=sets).log_masses
        assert log_masses is not None, "sets are given"
        return jnp.mean(jnp.sum(log_masses, axis=1))

    def value64(hidden, head) -> float:
        q = np.exp(log_softmax64(hidden @ head.T))
        return float(np.sum([np.log(q[:, one].sum(1)) for one in sets], axis=0).mean())

    return _case(shape, "3 sets", naive, ours, (hidden, head), (0,), value64)


def known_tokens(shape: Shape) -> Case:
    """KL from a teacher's 64 most likely tokens and the ghost of the others, with gradients."""

    def per_token(xp, p, q, log_p, log_q, _):
        rest_p, rest_q = 1 - p.sum(1), 1 - q.sum(1)
        ghost = rest_p * (xp.log(rest_p) - xp.log(rest_q))
        return (p * (log_p - log_q)).sum(1) + ghost

    return _known(shape, "top 64", "forward_kl", per_token)


def generalized(shape: Shape) -> Case:
    """The generalised forward KL over 64 tokens of the teacher, with gradients."""

    def per_token(xp, p, q, log_p, log_q, _):
        return (p * (log_p - log_q) - p + q).sum(1)

    return _known(shape, "generalised 64", "generalized_forward_kl", per_token)


def sampled(shape: Shape) -> Case:
    """Reverse KL from the teacher's numbers for 64 tokens and for a drawn one, none of the 64."""

    def per_token(xp, p, q, log_p, log_q, drawn):
        gap = drawn - LOG_P_DRAWN
        if xp is np:
            return (q * (log_q - log_p)).sum(1) + gap
        constant = jax.lax.stop_gradient
        tail = constant(gap) * (1 + drawn - constant(drawn)) + constant(q.sum(1)) - p.sum(1)
        return (q * (log_q - log_p) - q + p).sum(1) + tail

    return _known(shape, "sampled tail 64", "generalized_reverse_kl", per_token, draws=True)


def columns(shape: Shape) -> Case:
    """KL over the half of the vocabulary that both heads have, in another order, with gradients."""
    hidden, head, _, _ = _policy(shape)
    keys = jax.random.split(jax.random.key(3), 2)
    draw = lambda key, *dims: jax.random.normal(key, dims, jnp.dtype(shape.dtype))
    taught = draw(keys[0], shape.tokens, shape.teacher)
    teacher = (draw(keys[1], shape.vocab, shape.teacher) / np.sqrt(shape.teacher)).astype(
        head.dtype
    )
    mine = np.arange(0, shape.vocab, 2)
    theirs = mine[::-1].copy()

    def naive(hidden, head, taught, teacher):
        log_q = jax.nn.log_softmax(_logits(hidden, head)[:, mine])
        log_p = jax.nn.log_softmax(_logits(taught, teacher)[:, theirs])
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1))

    def ours(hidden, head, taught, teacher):
        return kernels.linear_divergence(
            hidden, head, taught, teacher, student_columns=mine, teacher_columns=theirs
        )[0]

    def value64(hidden, head, taught, teacher) -> float:
        log_q = log_softmax64((hidden @ head.T)[:, mine])
        log_p = log_softmax64((taught @ teacher.T)[:, theirs])
        return float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())

    arrays = (hidden, head, taught, teacher)
    case = _case(shape, "half of V", naive, ours, arrays, (0, 2), value64)
    products = shape.tokens * shape.vocab * (3 * shape.student + shape.teacher)
    return case._replace(flops=2.0 * products)


LOG_P_DRAWN = float(np.log(1e-3))  # the teacher's, of what the student has drawn


def _known(
    shape: Shape, name: str, kind: str, per_token: Callable[..., Any], draws: bool = False
) -> Case:
    """A loss of known tokens: `per_token` of (array module, p, q, log p, log q, log q drawn)."""
    hidden, head, _, _ = _policy(shape)
    keys = jax.random.split(jax.random.key(2), 2)
    count = min(KNOWN, shape.vocab - 1)
    start = jax.random.randint(keys[0], (shape.tokens, 1), 0, shape.vocab)
    # Different ones, by a stride without a common divisor; the one behind them is drawn.
    stride = next(n for n in (37, 41, 43, 47, 53, 59) if np.gcd(n, shape.vocab) == 1)
    more = (start + jnp.arange(count + 1)[None, :] * stride) % shape.vocab
    ids, drawn = more[:, :count], more[:, count]
    given = 3 * jax.random.normal(keys[1], (shape.tokens, count))
    log_p = jax.nn.log_softmax(given) + jnp.log(0.95)

    def naive(hidden, head, ids, log_p, drawn):
        log_q = jax.nn.log_softmax(_logits(hidden, head))
        picked = jnp.take_along_axis(log_q, ids, axis=1)
        last = jnp.take_along_axis(log_q, drawn[:, None], axis=1)[:, 0]
        return jnp.mean(per_token(jnp, jnp.exp(log_p), jnp.exp(picked), log_p, picked, last))

    def ours(hidden, head, ids, log_p, drawn):
        known: dict[str, Any] = {"teacher_ids": ids, "teacher_logprobs": log_p}
        if draws:
            known |= {
                "sampled_ids": drawn,
                "sampled_logprobs": jnp.full(drawn.shape, LOG_P_DRAWN),
            }
        return kernels.linear_divergence(hidden, head, kind=kind, **known)[0]

    def value64(hidden, head, ids, log_p, drawn) -> float:
        log_q = log_softmax64(hidden @ head.T)
        picked, last = np.take_along_axis(log_q, ids, 1), log_q[np.arange(len(drawn)), drawn]
        return float(per_token(np, np.exp(log_p), np.exp(picked), log_p, picked, last).mean())

    arrays = (hidden, head, ids, log_p, drawn)
    return _case(shape, name, naive, ours, arrays, (0, 2, 3, 4), value64)


def _case(
    shape: Shape,
    name: str,
    naive: Callable[..., Array],
    ours: Callable[..., Array],
    arrays: tuple[Array, ...],
    per_token: tuple[int, ...],
    value64: Callable[..., float],
) -> Case:
    """A case of two losses, the naive one's logits all in memory, with gradients of two arrays."""
    losses = {f"{name}, naive log_softmax": naive, f"{name}, jaxdistill": ours}
    width = shape.student
    least = jnp.dtype(shape.dtype).itemsize * 2 * width * (shape.tokens + shape.vocab)
    # What the problem needs: logits and two gradients. Logits made a second time do not count.
    flops = 2.0 * 3 * shape.tokens * shape.vocab * width
    return Case(
        arrays, _with_gradients(losses), float(least), flops, per_token, value64,
        f"{name}, naive log_softmax",
    )  # fmt: skip


def _policy(shape: Shape) -> tuple[Array, Array, Array, Array]:
    """Hidden states, a head, tokens and their advantages."""
    keys = jax.random.split(jax.random.key(1), 4)
    dtype = jnp.dtype(shape.dtype)
    hidden = jax.random.normal(keys[0], (shape.tokens, shape.student), dtype)
    head = jax.random.normal(keys[1], (shape.vocab, shape.student), dtype)
    scaled = (head / np.sqrt(shape.student)).astype(dtype)
    ids = jax.random.randint(keys[2], (shape.tokens,), 0, shape.vocab)
    return hidden, scaled, ids, 1 + jax.random.normal(keys[3], (shape.tokens,)) / 4


def _logits(hidden: Array, head: Array) -> Array:
    return jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)


def _with_gradients(losses: dict[str, Callable[..., Array]]) -> dict[str, Callable[..., Any]]:
    return {name: jax.value_and_grad(loss, argnums=(0, 1)) for name, loss in losses.items()}
