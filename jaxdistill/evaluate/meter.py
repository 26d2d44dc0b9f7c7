"""The meter of all measurements on text: a program's sums over batches, and their names.

    program                   measures                                      used by
    `make_step`               the training loss, without a gradient         a run, while it trains
    `scoring_step`            cross-entropy of a model alone                a teacher's row, timing
    `teacher_scoring_step`    the same of a stored teacher, or of several   its row
    `distributions.step`      all of `NAMES` but the training loss          `eval`, `compare`

A program returns {name: Mean}. Programs give a quantity the same name, so `run` reports it by the
same key, whichever of them measured it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxdistill.errors import DataError
from jaxdistill.methods import measuring, routed
from jaxdistill.methods.routed import Routed
from jaxdistill.models import DecoderConfig
from jaxdistill.teachers import TeacherFunction
from jaxdistill.train.step import Loss, make_loss
from jaxdistill.types import Batch, Mean, TeacherSignal

MeterStep = Callable[[Any, Any, Batch, Mapping[str, Array]], dict[str, Mean]]

# What a program calls a mean over tokens, or over pairs of answers -> its key.
NAMES = {
    "loss": "eval/loss",
    "loss/ce": "eval/ce",
    "loss/divergence": "eval/divergence",
    "loss/kl_t1": "eval/kl_t1",
    "loss/reverse_kl": "eval/reverse_kl",
    "agree/top1": "eval/agree_top1",
    "agree/top5": "eval/agree_top5",
    "agree/acceptance": "eval/acceptance",
    "agree/top_k": "eval/agree_top_k",
    "teacher/kept_mass": "eval/teacher_kept_mass",
    "teacher/entropy": "eval/teacher_entropy",
    "student/entropy": "eval/student_entropy",
    "reward/margin": "eval/reward_margin",
    "reward/accuracy": "eval/reward_accuracy",
}
CALIBRATION = "calibration"  # a total of [bins, 3], see `reliability`


def make_step(loss: Loss, teacher: TeacherFunction | Routed) -> MeterStep:
    """step(params, teacher_params, batch, knobs) -> named means; the training loss, no gradient.

    Nothing that adapts in training moves here: knobs come in as numbers and do not come out. Of
    several teachers a batch is for one.
    """

    def step(params, teacher_params, batch, knobs):
        def of_one(
            one: TeacherFunction, its_params: Any, part: Batch
        ) -> tuple[dict[str, Mean], Any]:
            return loss(params, one(its_params, None, part), part, knobs), ()

        return routed.asked(teacher, teacher_params, batch, of_one)(batch)[0]

    return jax.jit(step)


def scoring_step(
    config: DecoderConfig,
    vocab: int,
    *,
    compute_dtype: DTypeLike = jnp.bfloat16,
    chunk: int | None = None,
) -> MeterStep:
    """Cross-entropy of the data by a model alone; `params` are the model's own."""
    loss = make_loss(
        config, measuring.cross_entropy(vocab=vocab, chunk=chunk), compute_dtype=compute_dtype
    )

    def step(params, teacher_params, batch, knobs):
        params = {"student": params, "objective": {}}
        return loss(params, TeacherSignal(), batch, knobs)

    return jax.jit(step)


def teacher_scoring_step(teacher: TeacherFunction | Routed, vocab: int) -> MeterStep:
    """Cross-entropy of the data by what teachers say of it: a stored one, or each of several."""
    objective = measuring.cross_entropy(vocab=vocab)

    def step(params, teacher_params, batch, knobs):
        def of_one(
            one: TeacherFunction, its_params: Any, part: Batch
        ) -> tuple[dict[str, Mean], Any]:
            outputs = one(its_params, None, part).outputs
            assert outputs is not None, "only asked for where whole rows are known"
            return objective.apply({}, outputs, TeacherSignal(), part, {}), ()

        return routed.asked(teacher, teacher_params, batch, of_one)(batch)[0]

    return jax.jit(step)


def run(
    step: MeterStep,
    params: Any,
    teacher_params: Any,
    batches: Iterable[Batch],
    knobs: Mapping[str, Any],
    mesh: Mesh,
    *,
    text_bytes: int | None = None,
) -> dict[str, Any]:
    """Means over all counted tokens of the batches: sums are added, then divided once.

    Args:
      step: a program of the table above.
      params: as the program takes them.
      teacher_params: likewise; None without a teacher.
      batches: on the mesh.
      knobs: numbers that the training loss reads; {} for the other programs.
      mesh: of parameters and batches.
      text_bytes: bytes of text that the counted tokens stand for.

    Returns:
      `NAMES` of what the program measures, in nats or shares per token; eval/tokens, how many
      counted; eval/perplexity = exp(eval/ce). With `text_bytes` eval/bits_per_byte =
      eval/ce * tokens / log(2) / bytes. If the program measures calibration, eval/ece and
      eval/reliability. Of several teachers, eval/teachers/NAME/... of each on its own rows.

    Raises:
      DataError: if no token counts.
    """
    sums: dict[str, Mean] = {}
    pending: list[dict[str, Mean]] = []

    def drain(keep: int) -> None:
        while len(pending) > keep:
            for name, mean in jax.device_get(pending.pop(0)).items():
                part = jax.tree.map(lambda number: np.asarray(number, np.float64), mean)
                sums[name] = sums[name] + part if name in sums else part

    with jax.set_mesh(mesh):
        for batch in batches:
            pending.append(step(params, teacher_params, batch, knobs))
            drain(keep=1)  # one batch stays in flight while the next is read
        drain(keep=0)
    tokens = float(sums["loss/ce"].count) if sums else 0.0
    if not tokens:
        raise DataError("evaluation: no token of the held-out data counts in the loss")
    result: dict[str, Any] = {
        key: float(sums[name].total / sums[name].count)
        for name, key in NAMES.items()
        if name in sums
    }
    ce = result["eval/ce"]
    result |= {"eval/perplexity": _exp(ce), "eval/tokens": tokens}
    result |= _of_each_teacher(sums)
    if text_bytes:
        result["eval/bits_per_byte"] = ce * tokens / math.log(2) / text_bytes
    if CALIBRATION in sums:
        bars, result["eval/ece"] = reliability(np.asarray(sums[CALIBRATION].total))
        result["eval/reliability"] = bars
    return result


def _of_each_teacher(sums: Mapping[str, Mean]) -> dict[str, float]:
    """What is measured of each of several teachers that has tokens, by key."""
    result: dict[str, float] = {}
    for name, mean in sums.items():
        if not name.startswith(routed.PREFIX) or not mean.count:
            continue
        of, _, what = name.rpartition("/")
        result[f"eval/{name}"] = value = float(mean.total / mean.count)
        if what == "ce":
            result[f"eval/{of}/perplexity"] = _exp(value)
            result[f"eval/{of}/tokens"] = float(mean.count)
    return result


def _exp(nats: float) -> float:
    """exp, and inf where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def reliability(bins: np.ndarray) -> tuple[list[Mapping[str, float]], float]:
    """The bars of a reliability diagram, and the expected calibration error.

        ECE = sum over bins of (count / all) * |hits / count - confidence / count|

    Args:
      bins: [K, 3] of count, sum of confidence and hits.

    Returns:
      ({share, confidence, accuracy} of each bin that is not empty, ECE).

    Reference: Guo et al. 2017, arXiv 1706.04599.
    """
    total = bins[:, 0].sum()
    bars: list[Mapping[str, float]] = [
        {"share": n / total, "confidence": confidence / n, "accuracy": hits / n}
        for n, confidence, hits in bins.tolist()
        if n
    ]
    gaps = [bar["share"] * abs(bar["accuracy"] - bar["confidence"]) for bar in bars]
    return bars, float(sum(gaps))
