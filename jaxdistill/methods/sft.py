"""Supervised fine-tuning: cross-entropy only, the control every distillation is measured by."""

from typing import Unpack

from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options, no_parameters


class Sft(Options):
    """Supervised fine-tuning: cross-entropy only, the control every distillation is measured by."""


def objective(**head: Unpack[Head]) -> Objective:
    """Cross-entropy of the data, no teacher."""
    from jaxdistill.methods.head_loss import from_heads

    def apply(params, student, signal, batch, knobs):
        return from_heads(head, student, None, batch, knobs, alpha=1.0)

    return Objective(no_parameters, apply, needs_teacher=False)


def build(options: Sft, facts: Facts) -> Built:
    """The method of a run; it has no knobs."""
    return Built(objective(**options.head(facts)))


METHOD = Method(Sft, build, needs_teacher=lambda options: False, is_control=True, measured=True)
