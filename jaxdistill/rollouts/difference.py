"""What is measured of a recorded batch: how far sampler and trainer, student and teacher are."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.compress import quantize
from jaxdistill.methods.head_loss import statistics
from jaxdistill.models import DecoderConfig, decoder
from jaxdistill.models.quantized import Quantization
from jaxdistill.models.vocabulary import only_tokens
from jaxdistill.sharding import on_mesh
from jaxdistill.teachers import TeacherFunction
from jaxdistill.types import Batch, Outputs

TOP = 8  # most likely tokens of each model that are compared


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """How a step computes the student: what `train.step.make_loss` is given; and the teacher.

    Attributes:
      config: the student's.
      vocab: rows of its head at most that are tokens.
      dtype: that it computes in.
      attention: the kernel of its attention, or None.
      quantization: how it will be quantised, or None.
      teacher: says whole rows of the same tokens, at T = 1; None: it is not asked.
    """

    config: DecoderConfig
    vocab: int
    dtype: np.dtype
    attention: str | None = None
    quantization: Quantization | None = None
    teacher: TeacherFunction | None = None

    def outputs(self, params: Any, batch: Batch) -> Outputs:
        """What the student makes of a batch, quantised as it will be."""
        return decoder.apply(
            self.config,
            params if self.quantization is None else quantize.aware(params, self.quantization),
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            compute_dtype=self.dtype,
            attention=self.attention,
        )


def difference(
    program: ForwardPass, params: Any, teacher_params: Any, batch: Batch, logprobs: Array
) -> dict[str, float]:
    """Of the targets that count: sampler and trainer, and the teacher's likely tokens.

        d = log q of the trainer - log q of the sampler: mean |d|, largest |d|, mean e^d - d - 1
        overlap = |student's 8 most likely tokens that are the teacher's too| / 8, the mean

    Where answers are older than the parameters, d holds their age too.

    Args:
      program: of the step.
      params: the student's; both programs draw no token that has no row.
      teacher_params: None where there is no `program.teacher`.
      batch: on the mesh.
      logprobs: float32 [B, L], the sampler's log q of the targets.
    """
    with on_mesh(params):
        summary = _summary(program, params, teacher_params, batch, logprobs)
    return {f"rollout/{name}": float(value) for name, value in summary.items()}


@functools.partial(jax.jit, static_argnums=0)
def _summary(
    program: ForwardPass, params: Any, teacher_params: Any, batch: Batch, logprobs_BL: Array
) -> dict[str, Array]:
    outputs = program.outputs(params, batch)
    top = 0 if program.teacher is None else min(TOP, program.vocab)
    scores_BL, likely_BLK = _said(program, outputs, batch, top)
    apart_BL = jnp.where(batch.mask, scores_BL - logprobs_BL, 0.0)
    count = jnp.maximum(jnp.sum(batch.mask), 1)
    mean = lambda values_BL: jnp.sum(jnp.where(batch.mask, values_BL, 0.0)) / count
    found = {
        "sampler_difference": mean(jnp.abs(apart_BL)),
        "sampler_difference_max": jnp.max(jnp.abs(apart_BL)),
        "sampler_kl": mean(jnp.expm1(apart_BL) - apart_BL),
    }
    if program.teacher is not None:
        theirs = program.teacher(teacher_params, None, batch).outputs
        assert theirs is not None, "it says whole rows"
        _, theirs_BLK = _said(program, theirs, batch, top)
        both_BLKK = likely_BLK[..., :, None] == theirs_BLK[..., None, :]
        found["overlap"] = mean(jnp.sum(both_BLKK, (-2, -1)) / top)
    return found


def _said(program: ForwardPass, outputs: Outputs, batch: Batch, top: int) -> tuple[Array, Any]:
    """(log q of the targets [B, L], the most likely tokens [B, L, top])."""
    head = {"vocab": program.vocab, "logits_dtype": jnp.float32}
    said = statistics(head, outputs, batch.targets, batch.mask, top_k=top)
    assert said.logprobs is not None, "ids are given"
    return said.logprobs, said.top_ids


def of_batches(
    program: ForwardPass, teacher_params: Any, tokenizer: Any, place: Callable[[Any], Any]
) -> Any:
    """(parameters, rows of this process, the sampler's log q) -> the numbers of `difference`.

    Args:
      program: of the step.
      teacher_params: as `difference` takes them.
      tokenizer: as `writing.Writer` takes it.
      place: a tree of this process' rows -> global arrays on the mesh.
    """
    return lambda params, batch, logprobs: difference(
        program, only_tokens(params, tokenizer), teacher_params, place(batch), place(logprobs)
    )
