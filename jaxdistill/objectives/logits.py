"""Methods that compare what models say: KD in all its divergences, TAID, CTKD, and the control."""

from typing import Unpack

import jax
import jax.numpy as jnp

from jaxdistill import losses
from jaxdistill.kernels.row_loss import Function
from jaxdistill.objectives.base import CONTROL, Head, Objective, from_heads, no_parameters
from jaxdistill.types import Mean


def sft(**head: Unpack[Head]) -> Objective:
    """Supervised fine-tuning: cross-entropy of the data, no teacher."""

    def apply(params, student, signal, batch, knobs):
        return from_heads(head, student, None, batch, knobs, alpha=1.0)

    return Objective(no_parameters, apply, needs_teacher=False)


def kd(
    *,
    divergence: str | Function = "forward_kl",
    parameters: tuple[float, ...] = (),
    scale_by_t2: bool = True,
    label_smoothing: float | None = None,
    **head: Unpack[Head],
) -> Objective:
    """Knowledge distillation: alpha * CE + (1 - alpha) * T^2 * D(teacher, student).

    Knobs: alpha, temperature.

    Args:
      divergence: a kind of `kernels.rows.KINDS`, `forward_kl` is KL(teacher || student); or a
        function of whole rows, such as `losses.whole_rows` makes.
      parameters: the kind's own numbers.
      scale_by_t2: multiply the divergence by T^2.
      label_smoothing: eps of the cross-entropy.
      head: see `Head`.

    Reference: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.
    """

    def apply(params, student, signal, batch, knobs):
        return from_heads(
            head,
            student,
            signal.outputs,
            batch,
            knobs,
            kind=divergence,
            parameters=parameters,
            alpha=knobs["alpha"],
            temperature=knobs["temperature"],
            scale_by_t2=scale_by_t2,
            label_smoothing=label_smoothing,
        )

    return Objective(no_parameters, apply, ("alpha", "temperature"))


def taid(**head: Unpack[Head]) -> Objective:
    """TAID: alpha * CE + (1 - alpha) * KL(softmax((1 - t) sg(student) + t teacher) || student).

    The target mixes logits, the student in it is a constant, there is no temperature; t is the
    adaptive knob `optim.taid`, which reads the cross-entropy form of the loss, KL + H(target).
    Knobs: alpha, taid_t.

    Reference: Shing et al. 2025, arXiv 2501.16937, equations 2 to 5.
    """

    def apply(params, student, signal, batch, knobs):
        means = from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], taid_t=knobs["taid_t"],
        )  # fmt: skip
        divergence, entropy = means["loss/divergence"], means["loss/target_entropy"]
        return means | {CONTROL: Mean(divergence.total + entropy.total, divergence.count)}

    return Objective(no_parameters, apply, ("alpha", "taid_t"))


def ctkd(
    *,
    t_start: float = 1.0,
    t_range: float = 20.0,
    width: int | None = None,
    **head: Unpack[Head],
) -> Objective:
    """CTKD: the temperature is learned against the student, T = t_start + t_range sigmoid(w).

        alpha * CE + (1 - alpha) * T^2 * KL(teacher || student),    dw = reversal * d loss / dw

    `reversal` <= 0 grows from 0 to -1 on a cosine: w ascends the loss, softly at first. With
    `width` (of the student's hidden states) every token has its own T, from w . hidden + b.
    Knobs: alpha, reversal.

    Reference: Li et al. 2022, arXiv 2211.16231, equations 5 to 9.
    """

    def init(key):
        return {"temperature": losses.init_temperature_head(width)}

    def apply(params, student, signal, batch, knobs):
        w = losses.temperature_head(params["temperature"], student.hidden)
        w = losses.reverse_gradient(w, knobs["reversal"])
        temperature = losses.ctkd_temperature(w, t_start=t_start, t_range=t_range)
        means = from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], temperature=temperature,
        )  # fmt: skip
        counted = batch.mask.astype(jnp.float32)
        shown = jax.lax.stop_gradient(jnp.sum(temperature * counted))
        return means | {"loss/temperature": Mean(shown, jnp.sum(counted))}

    return Objective(init, apply, ("alpha", "reversal"))
