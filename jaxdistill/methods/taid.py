"""TAID: the target moves from the student to the teacher; its t adapts to the loss."""

from collections.abc import Iterator
from typing import Annotated, Literal, Unpack

from pydantic import Field

from jaxdistill.methods.base import (
    CONTROL,
    Built,
    Facts,
    Head,
    Method,
    Objective,
    Options,
    no_parameters,
)
from jaxdistill.methods.knobs import Alpha, scheduled
from jaxdistill.ranges import TAID
from jaxdistill.section import Problem

_START, _END, _STEP, _BETA = (TAID[name] for name in ("t_start", "t_end", "step_size", "beta"))


class Taid(Options):
    """TAID: the target moves from the student to the teacher; its t adapts to the loss."""

    alpha: Alpha = Field(0.0, description="Weight of the hard labels; not TAID's own alpha.")
    mode: Literal["paper", "scaled", "linear"] = Field(
        "paper",
        description="How t moves: the paper's step size, which adapts in runs of more than 4,000 "
        "steps; one scaled to the run, which adapts in any; or the straight line alone.",
    )
    t_start: float = Field(
        _START.default, ge=_START.least, le=_START.most, description="t of the first step."
    )
    t_end: float = Field(
        _END.default,
        ge=_END.least,
        le=_END.most,
        description="The largest t; 1 is the teacher itself.",
    )
    step_size: Annotated[float, Field(gt=_STEP.least, le=_STEP.most)] | None = Field(
        None, description="The paper's alpha; null: 5e-4, or 15 / train.steps where mode is scaled."
    )
    beta: float = Field(
        _BETA.default,
        ge=_BETA.least,
        lt=_BETA.most,
        description="Momentum of the loss's relative change.",
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: t does not go back; no setting without effect."""
        if self.t_start > self.t_end:
            yield ("t_start",), f"{self.t_start}: must not be above t_end = {self.t_end}"
        if self.mode == "linear" and self.step_size is not None:
            yield ("step_size",), "has no effect with mode: linear: remove it"


def objective(**head: Unpack[Head]) -> Objective:
    """TAID: alpha * CE + (1 - alpha) * KL(softmax((1 - t) sg(student) + t teacher) || student).

    The target mixes logits, the student in it is a constant, there is no temperature; t is the
    adaptive knob `optim.taid`, which reads the cross-entropy form of the loss, KL + H(target).
    Knobs: alpha, taid_t.

    Reference: Shing et al. 2025, arXiv 2501.16937, and its code (SakanaAI/TAID).
    """
    from jaxdistill.methods.head_loss import from_heads
    from jaxdistill.types import Mean

    def apply(params, student, signal, batch, knobs):
        means = from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], taid_t=knobs["taid_t"],
        )  # fmt: skip
        divergence, entropy = means["loss/divergence"], means["loss/target_entropy"]
        return means | {CONTROL: Mean(divergence.total + entropy.total, divergence.count)}

    return Objective(no_parameters, apply)


def build(options: Taid, facts: Facts) -> Built:
    """The method of a run."""
    from jaxdistill import optim

    t = optim.taid(
        facts.steps,
        options.t_start,
        options.t_end,
        alpha=options.step_size,
        beta=options.beta,
        mode=options.mode,
    )
    knobs = {"alpha": scheduled(options.alpha, facts.steps), "taid_t": t}
    return Built(objective(**options.head(facts)), knobs)


METHOD = Method(Taid, build, measured=True)
