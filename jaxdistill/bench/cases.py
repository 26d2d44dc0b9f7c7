"""What is measured: a divergence of logits, and the head loss, each ours and as others write it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxdistill import kernels
from jaxdistill.bench.shapes import Shape
from jaxdistill.kernels import choice

TEMPERATURE, ALPHA = 2.0, 0.5


class Case(NamedTuple):
    """One problem and the functions that solve it.

    Attributes:
      arguments: of every function.
      functions: name -> function of the arguments that returns (value, gradients).
      algorithm_bytes: what must be read and written at least.
      flops: of the products.
      per_token: which arguments have a row for each token.
      value64: the value in float64, from arguments in float64.
      naive: the function whose time the others' is divided by.
    """

    arguments: tuple[Any, ...]
    functions: dict[str, Callable[..., Any]]
    algorithm_bytes: float
    flops: float
    per_token: tuple[int, ...]
    value64: Callable[..., float]
    naive: str = "naive log_softmax"


def dense(shape: Shape) -> Case:
    """T^2 KL(teacher || student) of logits: value, and gradient of the student's logits."""
    keys = jax.random.split(jax.random.key(0), 2)
    student, teacher = (
        3 * jax.random.normal(key, (shape.tokens, shape.vocab), jnp.dtype(shape.dtype))
        for key in keys
    )
    per_row: dict[str, Callable[[Array, Array], Array]] = {
        "naive log_softmax": _naive,
        "hand-written VJP": _by_hand,
        "optax": _optax,
    }
    for name in _ours(shape.vocab, shape.dtype):
        per_row[f"jaxdistill {name}"] = lambda s, t, name=name: kernels.divergence(
            s, t, temperature=TEMPERATURE, implementation=name
        )
    functions = {
        name: jax.value_and_grad(lambda s, t, rows=rows: jnp.mean(rows(s, t)))
        for name, rows in per_row.items()
    }
    # The floor with statistics first: both logits twice, the gradient once.
    size = jnp.dtype(shape.dtype).itemsize
    pairs = shape.tokens * shape.vocab
    return Case((student, teacher), functions, 5.0 * size * pairs, 0.0, (0, 1), _dense64)


def head(shape: Shape) -> Case:
    """alpha * CE + (1 - alpha) * T^2 * KL from hidden states and heads, and their gradients."""
    keys = jax.random.split(jax.random.key(0), 5)
    dtype = jnp.dtype(shape.dtype)
    normal = lambda key, *dims: jax.random.normal(key, dims, dtype)
    scaled = lambda key, *dims: (normal(key, *dims) / np.sqrt(dims[-1])).astype(dtype)
    arguments = (
        normal(keys[0], shape.tokens, shape.student),
        scaled(keys[1], shape.vocab, shape.student),
        normal(keys[2], shape.tokens, shape.teacher),
        scaled(keys[3], shape.vocab, shape.teacher),
        jax.random.randint(keys[4], (shape.tokens,), 0, shape.vocab),
    )

    def materialised(divergence: Callable[[Array, Array], Array]) -> Callable[..., Array]:
        def loss(hs, ws, ht, wt, labels):
            product = lambda h, w: jnp.einsum("nd,vd->nv", h, w, preferred_element_type=jnp.float32)
            s, t = product(hs, ws), product(ht, wt)
            ce = optax.softmax_cross_entropy_with_integer_labels(s, labels)
            return jnp.mean(ALPHA * ce + (1 - ALPHA) * divergence(s, t))

        return loss

    losses: dict[str, Callable[..., Array]] = {
        "naive log_softmax": materialised(_naive),
        "hand-written VJP": materialised(_by_hand),
        "optax": materialised(_optax),
    }
    for name in _ours(shape.vocab + -shape.vocab % 64, shape.dtype):
        losses[f"jaxdistill {name}"] = lambda hs, ws, ht, wt, y, name=name: (
            kernels.linear_divergence(
                hs, ws, ht, wt, labels=y, alpha=ALPHA, temperature=TEMPERATURE, implementation=name
            )[0]
        )
    functions = {name: jax.value_and_grad(loss, argnums=(0, 1)) for name, loss in losses.items()}
    flops = 2.0 * shape.tokens * shape.vocab * (shape.teacher + 3 * shape.student)
    hidden = shape.tokens * (2 * shape.student + shape.teacher)
    heads = shape.vocab * (2 * shape.student + shape.teacher)
    least = float(dtype.itemsize * (hidden + heads))
    return Case(arguments, functions, least, flops, (0, 2, 4), _head64)


def exact(case: Case, rows: int = 8) -> tuple[float, Case]:
    """The value in float64 on the first rows, and the case cut down to them."""
    cut = [x[:rows] if i in case.per_token else x for i, x in enumerate(case.arguments)]
    wide = [np.asarray(x) for x in cut]
    wide = [x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float64) for x in wide]
    return case.value64(*wide), case._replace(arguments=tuple(cut))


def _dense64(student: np.ndarray, teacher: np.ndarray) -> float:
    log_q, log_p = log_softmax64(student / TEMPERATURE), log_softmax64(teacher / TEMPERATURE)
    return float((TEMPERATURE**2 * (np.exp(log_p) * (log_p - log_q)).sum(1)).mean())


def _head64(hs, ws, ht, wt, labels) -> float:
    ce = -log_softmax64(hs @ ws.T)[np.arange(len(hs)), labels].mean()
    return float(ALPHA * ce + (1 - ALPHA) * _dense64(hs @ ws.T, ht @ wt.T))


def log_softmax64(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def _ours(vocab: int, dtype: str) -> list[str]:
    return [name for name, state in choice.support(vocab, dtype).items() if state.runs]


def _tempered(logits: Array) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32) / TEMPERATURE)


def _naive(student: Array, teacher: Array) -> Array:
    log_q, log_p = _tempered(student), _tempered(teacher)
    return TEMPERATURE**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _optax(student: Array, teacher: Array) -> Array:
    log_q, log_p = _tempered(student), _tempered(teacher)
    return TEMPERATURE**2 * optax.losses.kl_divergence_with_log_targets(log_q, log_p)


@jax.custom_vjp
def _by_hand(student: Array, teacher: Array) -> Array:
    return _naive(student, teacher)


def _by_hand_fwd(student: Array, teacher: Array):
    return _naive(student, teacher), (student, teacher)


def _by_hand_bwd(logits, cotangent: Array):
    student, teacher = logits
    q, p = jnp.exp(_tempered(student)), jnp.exp(_tempered(teacher))
    slope = TEMPERATURE * cotangent[:, None] * (q - p)
    return slope.astype(student.dtype), jnp.zeros_like(teacher)


_by_hand.defvjp(_by_hand_fwd, _by_hand_bwd)
