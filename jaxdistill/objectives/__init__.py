"""One function per method, each with its paper and its equation.

An objective is a pair of pure functions, in Optax's manner:

    init(key) -> parameters of its own, trained with the student and dropped at export ({} for most)
    apply(params, student, signal, batch, knobs) -> {name: Mean}

`apply` gets the student's and the teacher's hidden states and heads, never logits, and returns sums
and counts over the batch's counted tokens; the mean named "loss" is optimised, the rest is shown.
`knobs` holds the numbers that may move during a run, by name.
"""

from collections.abc import Callable, Mapping

from jaxdistill.objectives.base import CONTROL, MONITOR, Apply, Head, Objective
from jaxdistill.objectives.features import hidden, minilm, ted
from jaxdistill.objectives.logits import ctkd, distillm2, kd, sft, taid
from jaxdistill.objectives.tasks import step_by_step

OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "kd": kd,
    "sft": sft,
    "taid": taid,
    "ctkd": ctkd,
    "distillm2": distillm2,
    "hidden": hidden,
    "minilm": minilm,
    "ted": ted,
    "step_by_step": step_by_step,
}

__all__ = [
    "CONTROL",
    "MONITOR",
    "OBJECTIVES",
    "Apply",
    "Head",
    "Objective",
    "ctkd",
    "distillm2",
    "hidden",
    "kd",
    "minilm",
    "sft",
    "step_by_step",
    "taid",
    "ted",
]
