"""Compares the kernels that a run will use with the reference, on small problems, before it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice
from jaxdistill.kernels.divergence import divergence
from jaxdistill.kernels.linear_logprobs import linear_logprobs

_TOKENS, _VOCAB = 128, 512


def self_check(dtype: str = "bfloat16", implementation: str | None = None) -> str:
    """Compares value and gradient of the chosen implementation with the reference's.

    A kernel's program follows from the numbers that it carries, so each set of them is a problem of
    its own: the divergence, the divergence beside cross-entropy, and the numbers of one model.

    Args:
      dtype: of the logits.
      implementation: as in `divergence`.

    Returns:
      The implementation that ran.

    Raises:
      ConfigError: if they differ by more than the dtype's rounding; the message says in what, by
        how much, and how to go on without the kernel.
    """
    chosen = choice.choose(implementation, _VOCAB, dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    student, teacher = (
        3 * jax.random.normal(key, (_TOKENS, _VOCAB), jnp.float32).astype(dtype) for key in keys[:2]
    )
    labels = jax.random.randint(keys[2], (_TOKENS,), 0, _VOCAB)
    for name, total in _PROBLEMS.items():
        _compare(name, total, (student, teacher, labels), chosen)
    return chosen


def _divergence(student: Array, teacher: Array, labels: Array, implementation: str) -> Array:
    return jnp.sum(divergence(student, teacher, temperature=2.0, implementation=implementation))


def _with_labels(student: Array, teacher: Array, labels: Array, implementation: str) -> Array:
    values = divergence(
        student, teacher, labels=labels, alpha=0.5, temperature=2.0, implementation=implementation
    )
    return jnp.sum(values)


def _one_model(student: Array, teacher: Array, labels: Array, implementation: str) -> Array:
    """Log-probabilities and entropy; the head is 1, so that the logits are the hidden states."""
    said = linear_logprobs(
        student, jnp.eye(_VOCAB, dtype=student.dtype), labels, temperature=2.0,
        logits_dtype=student.dtype, implementation=implementation,
    )  # fmt: skip
    assert said.logprobs is not None, "ids are given"
    lead = jax.lax.stop_gradient(said.argmax.astype(jnp.float32))
    return jnp.sum(said.entropy - said.logprobs) + jnp.sum(lead)


_PROBLEMS: dict[str, Callable[..., Array]] = {
    "the divergence": _divergence,
    "the divergence and cross-entropy": _with_labels,
    "the log-probabilities of one model": _one_model,
}


def _compare(name: str, total: Callable[..., Array], arrays: Any, chosen: str) -> None:
    """Raises where value or gradient by the student's logits differ."""
    run = jax.jit(jax.value_and_grad(total), static_argnums=3)
    value, slope = run(*arrays, chosen)
    expected, expected_slope = run(*arrays, choice.REFERENCE)
    off = abs(float(value) / float(expected) - 1)
    far = np.abs(np.float32(slope) - np.float32(expected_slope)).max()
    dtype = arrays[0].dtype
    most = 2 * float(jnp.finfo(dtype).eps) * float(np.abs(np.float32(expected_slope)).max())
    if not (off <= 1e-5 and far <= max(most, 1e-5)):
        raise ConfigError(
            f"the kernel {chosen} computes something else than its reference on this device. Of "
            f"{name} the value is off by {off:.1e} (allowed 1e-5), the gradient by {far:.1e} "
            f"(allowed {most:.1e}). Set method.implementation: xla to go on without it, and please "
            "report it with the output of `jaxdistill bench kernels`"
        )
