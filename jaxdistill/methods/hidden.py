"""Hidden states beside logits: a distance of chosen layers joins the KL."""

from typing import Literal, Unpack

from pydantic import Field

from jaxdistill.methods import signals
from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options
from jaxdistill.methods.knobs import LAYERS, Alpha, Layers, Temperature, Weight, schedules


class Hidden(Options):
    """Hidden states beside logits: a distance of chosen layers joins the KL."""

    alpha: Alpha = Field(0.0, description="Weight of the hard labels.")
    temperature: Temperature = Field(1.0, description="T of the KL.")
    layers: Layers = Field("even", description=LAYERS)
    distance: Literal["cosine", "mse"] = Field("cosine", description="Of two hidden states.")
    feature_weight: Weight = Field(
        1.0, description="Weight of the distance; a number or {schedule, start, end}."
    )
    balance: bool = Field(
        False, description="Keep the distance as large as the divergence, times feature_weight."
    )
    projector_lr: float = Field(
        1e-3, gt=0, le=10, description="Highest learning rate of the projectors between widths."
    )


def objective(
    *,
    layers: tuple[tuple[int, ...], tuple[int, ...]],
    widths: tuple[int, int],
    distance: str = "cosine",
    **head: Unpack[Head],
) -> Objective:
    """Hidden states beside logits: alpha CE + (1 - alpha) T^2 KL + weight mean_k distance_k.

    distance_k compares the k-th pair of layers, the student's projected where widths differ, over
    the tokens that the loss counts. A knob feature_balance, where there is one, multiplies the
    weight. Knobs: alpha, temperature, feature_weight, feature_balance.

    Args:
      layers: of student and teacher, from `losses.layer_map`.
      widths: of the student's and the teacher's hidden states.
      distance: "cosine" or "mse" (of normalised states).
      head: see `Head`.

    Reference: Jiao et al. 2020 (TinyBERT), arXiv 1909.10351; Sanh et al. 2019, arXiv 1910.01108.
    """
    import jax
    import jax.numpy as jnp

    from jaxdistill import losses
    from jaxdistill.methods.head_loss import from_heads
    from jaxdistill.types import Mean

    measure = {"cosine": losses.hidden_cosine, "mse": losses.hidden_mse}[distance]
    pairs, (narrow, wide) = len(layers[0]), widths

    def init(key):
        if narrow == wide:
            return {}
        scale = narrow**-0.5
        return {"projectors": {"kernel": scale * jax.random.normal(key, (pairs, narrow, wide))}}

    def apply(params, student, signal, batch, knobs):
        means = from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], temperature=knobs["temperature"],
        )  # fmt: skip
        ours = student.taps.astype(jnp.float32)
        if params:
            ours = jnp.einsum("kbld,kde->kble", ours, params["projectors"]["kernel"])
        distances = jnp.mean(measure(ours, signal.outputs.taps), axis=0)
        features = losses.masked_mean(distances, batch.mask)
        weight = knobs["feature_weight"] * knobs.get("feature_balance", 1.0)
        total = means["loss"].total + weight * features.total
        features = Mean(jax.lax.stop_gradient(features.total), features.count)
        return means | {"loss": Mean(total, means["loss"].count), "loss/features": features}

    return Objective(init, apply, student_taps=layers[0], teacher_taps=layers[1])


def build(options: Hidden, facts: Facts) -> Built:
    """The method of a run."""
    from jaxdistill import losses, optim

    student, teacher = facts.student, facts.teacher
    knobs = schedules(options, facts.steps, "alpha", "temperature", "feature_weight")
    if options.balance:
        names = ("feature_balance", "loss/divergence", "loss/features")
        knobs["feature_balance"] = optim.balance(*names)
    return Built(
        objective(
            layers=losses.layer_map(student.layers, teacher.layers, options.layers),
            widths=(student.embed, teacher.embed),
            distance=options.distance,
            **options.head(facts),
        ),
        knobs,
        learning_rate=options.projector_lr,
    )


METHOD = Method(Hidden, build, reads=lambda options: signals.LAYERS, measured=True)
