"""Methods that compare what models say: KD in all its divergences, TAID, CTKD, and the control."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from jaxdistill import losses
from jaxdistill.kernels.operands import DivergenceFunction
from jaxdistill.losses import whole_rows
from jaxdistill.objectives.base import CONTROL, Head, Objective, from_heads, no_parameters
from jaxdistill.types import STUDENT, Mean


def sft(**head: Unpack[Head]) -> Objective:
    """Supervised fine-tuning: cross-entropy of the data, no teacher."""

    def apply(params, student, signal, batch, knobs):
        return from_heads(head, student, None, batch, knobs, alpha=1.0)

    return Objective(no_parameters, apply, needs_teacher=False)


def kd(
    *,
    divergence: str | DivergenceFunction = "forward_kl",
    parameters: tuple[float | str, ...] = (),
    scale_by_t2: bool = True,
    label_smoothing: float | None = None,
    **head: Unpack[Head],
) -> Objective:
    """Knowledge distillation: alpha * CE + (1 - alpha) * T^2 * D(teacher, student).

    Knobs: alpha, temperature, and those that `parameters` names.

    Args:
      divergence: a kind of `kernels.rows.KINDS`, `forward_kl` is KL(teacher || student); or a
        function of whole rows, such as `losses.whole_rows` makes.
      parameters: the kind's own numbers, or names of knobs that hold them.
      scale_by_t2: multiply the divergence by T^2.
      label_smoothing: eps of the cross-entropy.
      head: see `Head`.

    Reference: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.
    """
    moving = tuple(one for one in parameters if isinstance(one, str))

    def apply(params, student, signal, batch, knobs):
        return from_heads(
            head,
            student,
            signal.outputs,
            batch,
            knobs,
            kind=divergence,
            parameters=tuple(knobs[one] if isinstance(one, str) else one for one in parameters),
            alpha=knobs["alpha"],
            temperature=knobs["temperature"],
            scale_by_t2=scale_by_t2,
            label_smoothing=label_smoothing,
        )

    return Objective(no_parameters, apply, ("alpha", "temperature", *moving))


def taid(**head: Unpack[Head]) -> Objective:
    """TAID: alpha * CE + (1 - alpha) * KL(softmax((1 - t) sg(student) + t teacher) || student).

    The target mixes logits, the student in it is a constant, there is no temperature; t is the
    adaptive knob `optim.taid`, which reads the cross-entropy form of the loss, KL + H(target).
    Knobs: alpha, taid_t.

    Reference: Shing et al. 2025, arXiv 2501.16937, and its code (SakanaAI/TAID).
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

    Reference: Li et al. 2022, arXiv 2211.16231, and its code (zhengli97/CTKD) for numbers.
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


def distillm2(*, skew: float = 0.1, **head: Unpack[Head]) -> Objective:
    """DistiLLM-2: towards the teacher's responses, away from the student's own, each a mean.

        (2 - balance) mean_y KL(p || a p + (1 - a) q)     y written by teacher or data
          +   balance mean_y KL(q || (1 - a) p + a sg(q)) y written by the student

    mean_y is over responses, each the mean of its tokens; all means are of the whole batch.
    Knobs: alpha (of CE, in both), balance.

    Args:
      skew: a, weight of the model whose own distribution is compared.
      head: see `Head`.

    Reference: Ko et al. 2025, arXiv 2503.07067; the constant q in the mixture is its code's.
    """

    def sides(batch):
        weights = losses.sequence_weights(batch.mask, batch.segment_ids)
        own = 0.0 if batch.origin is None else (batch.origin == STUDENT).astype(jnp.float32)
        return weights * (1 - own), weights * own

    def prepare(batch):
        return dict(zip(("chosen", "rejected"), map(jnp.sum, sides(batch)), strict=True))

    def apply(params, student, signal, batch, knobs):
        told = knobs if "chosen" in knobs else {**knobs, **prepare(batch)}
        balance, both = knobs["balance"], told["chosen"] + told["rejected"]
        kinds = (
            {"kind": "skew_forward_kl", "parameters": (skew,)},
            {"kind": whole_rows.bound("detached_skew_reverse_kl", skew=skew)},
        )
        chosen, rejected = (
            from_heads(
                head, student, signal.outputs, dataclasses.replace(batch, mask=weights), knobs,
                alpha=knobs["alpha"], **kind,
            )
            for weights, kind in zip(sides(batch), kinds, strict=True)
        )  # fmt: skip
        means = {name: chosen[name] + rejected[name] for name in chosen}
        each = lambda side, share, n: share * both / jnp.maximum(n, 1.0) * side["loss"].total
        total = each(chosen, 2 - balance, told["chosen"])
        total += each(rejected, balance, told["rejected"])
        return means | {"loss": Mean(total, means["loss"].count)}

    return Objective(no_parameters, apply, ("alpha", "balance"), prepare=prepare, token_means=False)
