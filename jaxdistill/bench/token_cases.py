"""What else the head is asked for: log-probabilities of tokens, and a teacher known in part."""

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

    losses = {"log q, naive log_softmax": naive, "log q, jaxdistill": ours}
    # The logits are made a second time on the way back.
    pairs, width = shape.tokens * shape.vocab, shape.student
    least = jnp.dtype(shape.dtype).itemsize * 2 * width * (shape.tokens + shape.vocab)
    functions = _with_gradients(losses)
    return Case(
        (hidden, head, ids, advantage), functions, float(least), 2.0 * 3 * pairs * width,
        (0, 2, 3), value64, "log q, naive log_softmax",
    )  # fmt: skip


def known_tokens(shape: Shape) -> Case:
    """KL from a teacher's 64 most likely tokens and the ghost of the others, with gradients."""
    hidden, head, _, _ = _policy(shape)
    keys = jax.random.split(jax.random.key(2), 2)
    count = min(KNOWN, shape.vocab)
    start = jax.random.randint(keys[0], (shape.tokens, 1), 0, shape.vocab)
    ids = (start + jnp.arange(count)[None, :] * 37) % shape.vocab
    given = 3 * jax.random.normal(keys[1], (shape.tokens, count))
    log_p = jax.nn.log_softmax(given) + jnp.log(0.95)

    def naive(hidden, head, ids, log_p):
        log_q = jax.nn.log_softmax(_logits(hidden, head))
        picked = jnp.take_along_axis(log_q, ids, axis=1)
        p, q = jnp.exp(log_p), jnp.exp(picked)
        rest_p, rest_q = 1 - p.sum(1), 1 - q.sum(1)
        ghost = rest_p * (jnp.log(rest_p) - jnp.log(rest_q))
        return jnp.mean(jnp.sum(p * (log_p - picked), axis=1) + ghost)

    def ours(hidden, head, ids, log_p):
        return kernels.linear_divergence(hidden, head, teacher_ids=ids, teacher_logprobs=log_p)[0]

    def value64(hidden, head, ids, log_p) -> float:
        picked = np.take_along_axis(log_softmax64(hidden @ head.T), ids, 1)
        p, q = np.exp(log_p), np.exp(picked)
        rest_p, rest_q = 1 - p.sum(1), 1 - q.sum(1)
        ghost = rest_p * (np.log(rest_p) - np.log(rest_q))
        return float(((p * (log_p - picked)).sum(1) + ghost).mean())

    losses = {f"top {count}, naive log_softmax": naive, f"top {count}, jaxdistill": ours}
    pairs, width = shape.tokens * shape.vocab, shape.student
    least = jnp.dtype(shape.dtype).itemsize * 2 * width * (shape.tokens + shape.vocab)
    functions = _with_gradients(losses)
    return Case(
        (hidden, head, ids, log_p), functions, float(least), 2.0 * 3 * pairs * width,
        (0, 2, 3), value64, f"top {count}, naive log_softmax",
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
