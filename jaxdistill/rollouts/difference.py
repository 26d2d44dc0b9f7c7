"""How far the sampler's log-probabilities are from those of the program that trains."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.evaluate.scoring import token_scores
from jaxdistill.models import DecoderConfig
from jaxdistill.sharding import on_mesh
from jaxdistill.types import Batch


def difference(
    config: DecoderConfig,
    vocab: int,
    dtype: DTypeLike,
    params: Any,
    batch: Batch,
    logprobs: Array,
) -> dict[str, float]:
    """Of d = trainer - sampler, over targets that count: mean |d|, largest |d|, mean e^d - d - 1.

    Where answers are older than the parameters, d holds their age too.

    Args:
      config: the student's.
      vocab: rows of its head that are tokens.
      dtype: that it computes in.
      params: its parameters.
      batch: on the mesh.
      logprobs: float32 [B, L], the sampler's log q of the targets.
    """
    with on_mesh(params):
        scores, _ = token_scores(
            config, vocab, dtype, params, batch.tokens, batch.segment_ids, batch.targets
        )
        mean, largest, kl = _summary(scores, logprobs, batch.mask)
    return {
        "rollout/sampler_difference": float(mean),
        "rollout/sampler_difference_max": float(largest),
        "rollout/sampler_kl": float(kl),
    }


@jax.jit
def _summary(scores_BL: Array, logprobs_BL: Array, mask_BL: Array) -> tuple[Array, Array, Array]:
    apart_BL = jnp.where(mask_BL, scores_BL - logprobs_BL, 0.0)
    count = jnp.maximum(jnp.sum(mask_BL), 1)
    size_BL = jnp.abs(apart_BL)
    kl_BL = jnp.expm1(apart_BL) - apart_BL
    return jnp.sum(size_BL) / count, jnp.max(size_BL), jnp.sum(kl_BL) / count


def of_batches(config: DecoderConfig, vocab: int, dtype: DTypeLike, place: Any) -> Any:
    """(parameters, rows of this process, the sampler's log q) -> the numbers of `difference`.

    Args:
      config: as `difference` takes it.
      vocab: as `difference` takes it.
      dtype: as `difference` takes it.
      place: a tree of this process' rows -> global arrays on the mesh.
    """
    measure = functools.partial(difference, config, vocab, dtype)
    return lambda params, batch, logprobs: measure(params, place(batch), place(logprobs))
