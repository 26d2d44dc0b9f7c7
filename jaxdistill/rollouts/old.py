"""What the training program says of sampled tokens before the first update: log q_old."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxdistill.methods.head_loss import said
from jaxdistill.rollouts.difference import ForwardPass
from jaxdistill.sharding import on_mesh
from jaxdistill.types import Batch


def of_batches(
    program: ForwardPass, head: Any, place: Callable[[Any], Any]
) -> Callable[[Any, Batch], np.ndarray]:
    """(parameters, rows of this process) -> float32 [all rows, L], log q of the targets.

    Args:
      program: of the step.
      head: as the method has it, see `methods.Head`.
      place: a tree of this process' rows -> global arrays on the mesh.
    """
    fixed = tuple(sorted(head.items()))

    def old_of(params: Any, batch: Batch) -> np.ndarray:
        with on_mesh(params):
            return np.asarray(_logprobs(program, fixed, params, place(batch)))

    return old_of


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logprobs(program: ForwardPass, head: tuple, params: Any, batch: Batch) -> Array:
    outputs = program.outputs(params, batch)
    found, _ = said(dict(head), outputs, batch)
    return jax.lax.with_sharding_constraint(found, jax.P())  # every process reads all of it
