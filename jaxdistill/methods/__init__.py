"""A method is a row of one table: its options, its formula, and how a run builds it.

Each file here is one method, or a family. A method of your own needs one file too, imported before
the configuration is read:

    from jaxdistill import methods
    from jaxdistill.methods.head_loss import from_heads
    from jaxdistill.types import Mean

    class Toy(methods.Options):
        "The KL, weighed."

        strength: float = Field(1.0, ge=0, description="Of the loss.")

    def build(options, facts):
        def apply(params, student, signal, batch, knobs):
            head = options.head(facts)
            means = from_heads(head, student, signal.outputs, batch, knobs, alpha=0.0)
            total = knobs["strength"] * means["loss"].total
            return means | {"loss": Mean(total, means["loss"].count)}

        objective = methods.Objective(methods.no_parameters, apply)
        return methods.Built(objective, {"strength": options.strength})

    methods.add("toy", methods.Method(Toy, build))

Then `method: {name: toy, strength: 0.5}` stands in a configuration. `apply` gets hidden states and
heads, never logits, and returns sums and counts over the batch's counted tokens; the mean "loss" is
optimised, the others are logged.

Options are read before JAX is loaded: what computes is imported inside `objective` and `build`.
"""

from jaxdistill.methods.base import (
    CONTROL,
    MONITOR,
    Built,
    Facts,
    Head,
    Method,
    Objective,
    Options,
    no_parameters,
)
from jaxdistill.methods.table import METHODS, AnyMethod, add, build, control, of, rows

__all__ = [
    "CONTROL",
    "METHODS",
    "MONITOR",
    "AnyMethod",
    "Built",
    "Facts",
    "Head",
    "Method",
    "Objective",
    "Options",
    "add",
    "build",
    "control",
    "no_parameters",
    "of",
    "rows",
]
