"""Hidden states beside logits: a distance of chosen layers joins the KL."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Unpack

from pydantic import Field

from jaxdistill.errors import ConfigError
from jaxdistill.methods import signals
from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options
from jaxdistill.methods.knobs import LAYERS, Alpha, Layers, TemperatureKnob, WeightKnob, schedules
from jaxdistill.section import Problem

Distance = Literal["cosine", "mse"]
Share = Annotated[float, Field(ge=0, le=1e6)]


class Hidden(Options):
    """Hidden states beside logits: a distance of chosen layers joins the KL."""

    alpha: Alpha = Field(0.0, description="Weight of the hard labels.")
    temperature: TemperatureKnob = Field(1.0, description="T of the KL.")
    layers: Layers = Field("even", description=LAYERS)
    distance: Distance = Field("cosine", description="Of two hidden states.")
    distances: Annotated[dict[Distance, Share], Field(min_length=1)] | None = Field(
        None,
        description="Several distances at once in place of `distance`, each with a weight: "
        "{cosine: 1.0, mse: 0.1}.",
    )
    layer_weights: Annotated[list[Share], Field(min_length=1)] | None = Field(
        None, description="A weight for each pair of layers; null: 1 for all."
    )
    feature_weight: WeightKnob = Field(
        1.0, description="Weight of the distance; a number or {schedule, start, end}."
    )
    balance: bool = Field(
        False, description="Keep the distance as large as the divergence, times feature_weight."
    )
    projector_lr: float = Field(
        1e-3, gt=0, le=10, description="Highest learning rate of the projectors between widths."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: no setting without effect."""
        if self.distances is not None and self.distance != "cosine":
            yield ("distance",), "has no effect beside distances: remove it"


def objective(
    *,
    layers: tuple[tuple[int, ...], tuple[int, ...]],
    widths: tuple[int, int],
    distances: Mapping[str, float] | None = None,
    layer_weights: Sequence[float] | None = None,
    **head: Unpack[Head],
) -> Objective:
    """Hidden states beside logits: alpha CE + (1 - alpha) T^2 KL + weight features.

        features = mean_k w_k sum_d v_d distance_d(student's layer k, teacher's layer k)

    Of the k-th pair of layers the student's states are projected where widths differ; the tokens
    are those that the loss counts. A knob feature_balance, where there is one, multiplies the
    weight. Knobs: alpha, temperature, feature_weight, feature_balance.

    Args:
      layers: of student and teacher, from `losses.layer_map`.
      widths: of the student's and the teacher's hidden states.
      distances: v_d by name, "cosine" or "mse" (of normalised states); None: the cosine alone.
      layer_weights: w_k, one for each pair; None: 1.
      head: see `Head`.

    Raises:
      ConfigError: for another number of weights than pairs.

    Reference: Jiao et al. 2020 (TinyBERT), arXiv 1909.10351; Sanh et al. 2019, arXiv 1910.01108.
    """
    import jax
    import jax.numpy as jnp

    from jaxdistill import losses
    from jaxdistill.methods.head_loss import from_heads
    from jaxdistill.types import Mean

    measures = {"cosine": losses.hidden_cosine, "mse": losses.hidden_mse}
    chosen = {"cosine": 1.0} if distances is None else dict(distances)
    pairs, (narrow, wide) = len(layers[0]), widths
    shares = [1.0] * pairs if layer_weights is None else list(layer_weights)
    if len(shares) != pairs:
        raise ConfigError(
            f"method.layer_weights = {shares}: must be {pairs} numbers, one for each pair of layers"
        )

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
        theirs = signal.outputs.taps
        apart = sum(share * measures[name](ours, theirs) for name, share in chosen.items())
        apart = jnp.tensordot(jnp.asarray(shares) / pairs, apart, axes=1)
        features = losses.masked_mean(apart, batch.mask)
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
    chosen = options.distances or {options.distance: 1.0}
    return Built(
        objective(
            layers=losses.layer_map(student.layers, teacher.layers, options.layers),
            widths=(student.embed, teacher.embed),
            distances={str(name): share for name, share in chosen.items()},
            layer_weights=options.layer_weights,
            **options.head(facts),
        ),
        knobs,
        learning_rate=options.projector_lr,
    )


METHOD = Method(Hidden, build, reads=lambda options: signals.LAYERS, measured=True)
