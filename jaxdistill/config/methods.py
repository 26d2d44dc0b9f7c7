"""The options of the methods, their scheduled knobs, and the optimizer."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from jaxdistill.config.section import Problem, Section


class AlphaSchedule(Section):
    """A weight that moves from start to end over train.steps."""

    schedule: Literal["linear", "cosine"] = Field(description="Shape of the way.")
    start: float = Field(ge=0, le=1, description="Value at the first step.")
    end: float = Field(ge=0, le=1, description="Value at the last step.")


class TemperatureSchedule(Section):
    """A temperature that moves from start to end over train.steps."""

    schedule: Literal["linear", "cosine"] = Field(description="Shape of the way.")
    start: float = Field(ge=0.01, le=1000, description="Value at the first step.")
    end: float = Field(ge=0.01, le=1000, description="Value at the last step.")


def _knob_kind(value: Any) -> str:
    """Tags are in <> so that the loader can tell them from keys in an error's location."""
    return "<schedule>" if isinstance(value, dict | Section) else "<number>"


Alpha = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("<number>")]
    | Annotated[AlphaSchedule, Tag("<schedule>")],
    Discriminator(_knob_kind),
]
Temperature = Annotated[
    Annotated[float, Field(ge=0.01, le=1000), Tag("<number>")]
    | Annotated[TemperatureSchedule, Tag("<schedule>")],
    Discriminator(_knob_kind),
]
Chunk = Annotated[
    Annotated[Literal["auto"], Tag("<auto>")]
    | Annotated[int, Field(ge=1, le=2**24), Tag("<tokens>")],
    Discriminator(lambda value: "<auto>" if isinstance(value, str) else "<tokens>"),
]
CHUNK = "Tokens whose logits exist at one time; auto chooses by vocabulary. Only memory changes."


class Kd(Section):
    """Knowledge distillation: alpha * CE + (1 - alpha) * T^2 * divergence(teacher, student)."""

    name: Literal["kd"] = Field(description="The method.")
    divergence: Literal["forward_kl", "reverse_kl"] = Field(
        "forward_kl", description="forward_kl is KL(teacher || student), reverse_kl the other way."
    )
    alpha: Alpha = Field(
        0.5,
        description="Weight of the hard labels, 0 to 1: alpha * CE + (1 - alpha) * divergence; a "
        "number or {schedule, start, end}.",
    )
    temperature: Temperature = Field(
        1.0, description="T, divides both models' logits; a number or {schedule, start, end}."
    )
    scale_by_t2: bool = Field(
        True, description="Multiply the divergence by T^2, so that T does not change its weight."
    )
    chunk: Chunk = Field("auto", description=CHUNK)


class Sft(Section):
    """Supervised fine-tuning: cross-entropy only, the control every distillation is measured by."""

    name: Literal["sft"] = Field(description="The method.")
    chunk: Chunk = Field("auto", description=CHUNK)


Method = Annotated[Kd | Sft, Field(discriminator="name")]
METHODS = {"kd": Kd, "sft": Sft}

Warmup = Annotated[
    Annotated[int, Field(ge=0, le=10**9), Tag("<steps>")]
    | Annotated[float, Field(ge=0, lt=1), Tag("<fraction>")],
    Discriminator(lambda value: "<fraction>" if isinstance(value, float) else "<steps>"),
]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW and its learning rate."""

    name: Literal["adamw"] = Field("adamw", description="The optimizer.")
    lr: float = Field(1e-4, gt=0, le=10, description="Highest learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls after the warmup."
    )
    warmup: Warmup = Field(
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
        (0.9, 0.95), strict=False, description="Decay of the first and second moment."
    )
    eps: float = Field(1e-8, gt=0, le=1, description="Added to the root of the second moment.")
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        1.0, description="Largest global gradient norm; null: no clipping."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: no setting without effect."""
        if self.schedule == "constant" and self.end_lr_ratio != 0.1:
            yield ("end_lr_ratio",), "has no effect with schedule: constant: remove it"
