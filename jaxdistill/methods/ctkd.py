"""CTKD: the temperature is learned against the student, at first softly."""

from typing import Unpack

from pydantic import Field

from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options
from jaxdistill.methods.knobs import Alpha, scheduled


class Ctkd(Options):
    """CTKD: the temperature is learned against the student, at first softly."""

    alpha: Alpha = Field(0.1, description="Weight of the hard labels.")
    t_start: float = Field(1.0, ge=0.1, le=100, description="The least temperature.")
    t_range: float = Field(20.0, gt=0, le=100, description="Its width: T < t_start + t_range.")
    ramp: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the run in which the reversal grows to its full size.",
    )
    per_token: bool = Field(False, description="A temperature for every token, from its state.")
    temperature_lr: float = Field(
        0.01, gt=0, le=10, description="Highest learning rate of the temperature."
    )


def objective(
    *,
    t_start: float = 1.0,
    t_range: float = 20.0,
    width: int | None = None,
    **head: Unpack[Head],
) -> Objective:
    """CTKD: the temperature is learned against the student, T = t_start + t_range sigmoid(w).

        alpha * CE + (1 - alpha) * T^2 * KL(teacher || student),    dw = reversal * d loss / dw

    `reversal` <= 0 grows from 0 to -1 on a cosine: w ascends the loss, softly at first. An adaptive
    optimizer divides its size out of the gradient, so a run multiplies the update by it too. With
    `width` (of the student's hidden states) every token has its own T, from w . hidden + b.
    Knobs: alpha, reversal.

    Reference: Li et al. 2022, arXiv 2211.16231, and its code (zhengli97/CTKD) for numbers.
    """
    import jax
    import jax.numpy as jnp

    from jaxdistill import losses
    from jaxdistill.methods.head_loss import from_heads
    from jaxdistill.types import Mean

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
        total = jax.lax.stop_gradient(jnp.sum(temperature * counted))
        return means | {"loss/temperature": Mean(total, jnp.sum(counted))}

    return Objective(init, apply)


def build(options: Ctkd, facts: Facts) -> Built:
    """The method of a run."""
    from jaxdistill import optim

    reversal = optim.schedule("cosine", 0.0, -1.0, max(2, round(options.ramp * facts.steps)))
    return Built(
        objective(
            t_start=options.t_start,
            t_range=options.t_range,
            width=facts.student.embed if options.per_token else None,
            **options.head(facts),
        ),
        knobs={
            "alpha": scheduled(options.alpha, facts.steps),
            "reversal": reversal,
        },
        # AdamW divides a gradient's size out, and with it the curriculum: the update takes it on.
        scaled={"objective/temperature": lambda step: abs(reversal(step))},
        learning_rate=options.temperature_lr,
    )


METHOD = Method(Ctkd, build, measured=True)
