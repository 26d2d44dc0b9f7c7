"""How far the sampler's log-probabilities are from those of the program that trains."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.compress import quantize
from jaxdistill.evaluate.scoring import target_scores
from jaxdistill.models import DecoderConfig, decoder
from jaxdistill.models.vocabulary import only_tokens
from jaxdistill.sharding import on_mesh
from jaxdistill.types import Batch


@dataclasses.dataclass(frozen=True)
class Program:
    """How a step computes the student: what `train.step.make_loss` is given.

    Attributes:
      config: the student's.
      vocab: rows of its head at most that are tokens.
      dtype: that it computes in.
      attention: the kernel of its attention, or None.
      quantization: the scheme that it will be quantised by, or None.
    """

    config: DecoderConfig
    vocab: int
    dtype: np.dtype
    attention: str | None = None
    quantization: str | None = None


def difference(program: Program, params: Any, batch: Batch, logprobs: Array) -> dict[str, float]:
    """Of d = trainer - sampler, over targets that count: mean |d|, largest |d|, mean e^d - d - 1.

    Where answers are older than the parameters, d holds their age too.

    Args:
      program: of the step.
      params: the student's; both programs draw no token that has no row.
      batch: on the mesh.
      logprobs: float32 [B, L], the sampler's log q of the targets.
    """
    with on_mesh(params):
        mean, largest, kl = _summary(program, params, batch, logprobs)
    return {
        "rollout/sampler_difference": float(mean),
        "rollout/sampler_difference_max": float(largest),
        "rollout/sampler_kl": float(kl),
    }


@functools.partial(jax.jit, static_argnums=0)
def _summary(
    program: Program, params: Any, batch: Batch, logprobs_BL: Array
) -> tuple[Array, Array, Array]:
    scheme = program.quantization
    outputs = decoder.apply(
        program.config,
        params if scheme is None else quantize.aware(params, scheme),
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        compute_dtype=program.dtype,
        attention=program.attention,
    )
    scores_BL, _ = target_scores(outputs, program.vocab, batch.targets)
    apart_BL = jnp.where(batch.mask, scores_BL - logprobs_BL, 0.0)
    count = jnp.maximum(jnp.sum(batch.mask), 1)
    size_BL = jnp.abs(apart_BL)
    kl_BL = jnp.expm1(apart_BL) - apart_BL
    return jnp.sum(size_BL) / count, jnp.max(size_BL), jnp.sum(kl_BL) / count


def of_batches(program: Program, tokenizer: Any, place: Callable[[Any], Any]) -> Any:
    """(parameters, rows of this process, the sampler's log q) -> the numbers of `difference`.

    Args:
      program: of the step.
      tokenizer: as `writing.Writer` takes it.
      place: a tree of this process' rows -> global arrays on the mesh.
    """
    return lambda params, batch, logprobs: difference(
        program, only_tokens(params, tokenizer), place(batch), place(logprobs)
    )
