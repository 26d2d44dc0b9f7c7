"""How good a student is on held-out text: perplexity, KL and agreement with the teacher, speed."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxdistill.measure.speed import leaf_bytes
from jaxdistill.models import DecoderConfig, count_non_embedding_parameters, count_parameters
from jaxdistill.objectives import sft
from jaxdistill.teachers import Teacher
from jaxdistill.train.step import Loss, make_loss
from jaxdistill.types import Batch, Mean, TeacherSignal

EvalStep = Callable[[Any, Any, Batch, Mapping[str, Array]], dict[str, Mean]]


def make_step(loss: Loss, teacher: Teacher) -> EvalStep:
    """step(params, teacher_params, batch, knobs) -> named means; the training loss, no gradient.

    Nothing that adapts in training moves here: knobs come in as numbers and do not come out.
    """

    def step(params, teacher_params, batch, knobs):
        return loss(params, teacher(teacher_params, None, batch), batch, knobs)

    return jax.jit(step)


def run(
    step: EvalStep,
    params: Any,
    teacher_params: Any,
    batches: Iterable[Batch],
    knobs: Mapping[str, Any],
    mesh: Mesh,
) -> dict[str, float]:
    """Means over all counted tokens of the batches: sums are added, then divided once.

    Returns:
      eval/loss, eval/ce, eval/perplexity = exp(eval/ce), eval/tokens and, with a teacher,
      eval/kl_t1, eval/agree_top1, eval/divergence and both entropies; nats per token.
    """
    totals: dict[str, np.ndarray] = {}
    pending: list[dict[str, Mean]] = []

    def drain(keep: int) -> None:
        while len(pending) > keep:
            for name, mean in jax.device_get(pending.pop(0)).items():
                pair = np.array([mean.total, mean.count], np.float64)
                totals[name] = totals.get(name, 0.0) + pair

    with jax.set_mesh(mesh):
        for batch in batches:
            pending.append(step(params, teacher_params, batch, knobs))
            drain(keep=1)  # one batch stays in flight while the next is read
        drain(keep=0)
    assert totals, "an evaluation set has at least one batch"
    means = {name: float(total / count) for name, (total, count) in totals.items()}
    result = {_NAMES[name]: value for name, value in means.items() if name in _NAMES}
    result["eval/perplexity"] = _exp(result["eval/ce"])
    result["eval/tokens"] = float(totals["loss"][1])
    return result


_NAMES = {
    "loss": "eval/loss",
    "loss/ce": "eval/ce",
    "loss/divergence": "eval/divergence",
    "loss/kl_t1": "eval/kl_t1",
    "agree/top1": "eval/agree_top1",
    "teacher/entropy": "eval/teacher_entropy",
    "student/entropy": "eval/student_entropy",
}


def _exp(nats: float) -> float:
    """exp that says inf where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def scoring_step(
    config: DecoderConfig,
    vocab: int,
    *,
    compute_dtype: DTypeLike = jnp.bfloat16,
    chunk: int | None = None,
) -> EvalStep:
    """A model alone: cross-entropy of the data, for a teacher's own row and for timing."""
    loss = make_loss(config, sft(vocab=vocab, chunk=chunk), compute_dtype=compute_dtype)

    def step(params, teacher_params, batch, knobs):
        params = {"student": params, "objective": {}}
        return loss(params, TeacherSignal(), batch, knobs)

    return jax.jit(step)


def tokens_per_second(
    step: EvalStep, params: Any, batch: Batch, mesh: Mesh, repeats: int = 3
) -> float:
    """Scored tokens a second, padding not counted: the median of `repeats` after a warm-up."""
    tokens = int(jnp.sum(batch.segment_ids > 0))
    seconds = []
    with jax.set_mesh(mesh):
        jax.block_until_ready(step(params, None, batch, {}))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(step(params, None, batch, {}))
            seconds.append(time.perf_counter() - start)
    return tokens / statistics.median(seconds)


def size(config: DecoderConfig, params: Any) -> dict[str, int]:
    """Parameters, those outside embedding and head, and bytes as they are held."""
    return {
        "parameters": count_parameters(config),
        "parameters_non_embedding": count_non_embedding_parameters(config),
        "bytes": sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(params)),
    }
