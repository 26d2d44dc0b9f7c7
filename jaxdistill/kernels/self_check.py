"""Compares the kernels that a run will use with the reference, on one small problem, before it."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice
from jaxdistill.kernels.divergence import divergence

_TOKENS, _VOCAB = 128, 512


def self_check(dtype: str = "bfloat16", implementation: str | None = None) -> str:
    """Compares value and gradient of the chosen implementation with the reference's.

    Args:
      dtype: of the logits.
      implementation: as in `divergence`.

    Returns:
      The implementation that ran.

    Raises:
      ConfigError: if they differ by more than the dtype's rounding; the message says by how much
        and how to go on without the kernel.
    """
    chosen = choice.choose(implementation, _VOCAB, dtype)
    keys = jax.random.split(jax.random.key(0), 2)
    student, teacher = (
        3 * jax.random.normal(key, (_TOKENS, _VOCAB), jnp.float32).astype(dtype) for key in keys
    )

    def total(student, teacher, implementation):
        return jnp.sum(divergence(student, teacher, temperature=2.0, implementation=implementation))

    run = jax.jit(jax.value_and_grad(total), static_argnums=2)
    value, slope = run(student, teacher, chosen)
    expected, expected_slope = run(student, teacher, choice.REFERENCE)
    off = abs(float(value) / float(expected) - 1)
    far = np.abs(np.float32(slope) - np.float32(expected_slope)).max()
    most = 2 * float(jnp.finfo(dtype).eps) * float(np.abs(np.float32(expected_slope)).max())
    if not (off <= 1e-5 and far <= max(most, 1e-5)):
        raise ConfigError(
            f"the kernel {chosen} computes something else than its reference on this device: value "
            f"off by {off:.1e} (allowed 1e-5), gradient by {far:.1e} (allowed {most:.1e}). Set "
            "method.implementation: xla to go on without it, and please report it with the output "
            "of `jaxdistill bench kernels`"
        )
    return chosen
