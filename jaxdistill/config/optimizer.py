"""The options of the optimizer: its rule and its learning rate."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from jaxdistill.ranges import OPTIMIZER, UNREAD
from jaxdistill.section import Problem, Section, StepOrFraction

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """The rule that makes updates of gradients, and its learning rate."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = Field(
        "adamw",
        description="adamw; lion (one moment, a third of the learning rate or less); adafactor (a "
        "row and a column in place of moments); muon (of kernels; adamw of all else).",
    )
    lr: float = Field(1e-4, gt=0, le=10, description="Highest learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls after the warmup."
    )
    warmup: StepOrFraction = Field(
        0.03,
        description="Rise of the learning rate from 0: a whole number of steps, or a fraction of "
        "train.steps below 1.",
    )
    end_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="Learning rate at the last step, as a fraction of lr."
    )
    weight_decay: float = Field(
        0.1, ge=0, le=10, description="Decoupled weight decay; matrices only."
    )
    betas: tuple[Beta, Beta] = Field(
        OPTIMIZER["betas"], strict=False, description="Decay of the first and second moment."
    )
    moments: Literal["float32", "bfloat16"] = Field(
        OPTIMIZER["moments"], description="Type of the first moment; the second is float32."
    )
    eps: float = Field(
        OPTIMIZER["eps"], gt=0, le=1, description="Added to the root of the second moment."
    )
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        1.0, description="Largest global gradient norm; null: no clipping."
    )
    offload: bool = Field(
        False,
        description="Keep the moments in host memory between updates, where the device can address "
        "it: less device memory, more time.",
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: no setting without effect."""
        if self.schedule == "constant" and self.end_lr_ratio != 0.1:
            yield ("end_lr_ratio",), "has no effect with schedule: constant: remove it"
        for key in UNREAD.get(self.name, ()):
            if getattr(self, key) != OPTIMIZER[key]:
                yield (key,), f"has no effect with name: {self.name}: remove it"
