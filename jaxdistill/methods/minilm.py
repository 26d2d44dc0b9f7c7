"""MiniLMv2: how tokens relate in one layer, by queries, keys and values, beside the KL."""

from typing import Annotated, Unpack

from pydantic import Field

from jaxdistill.errors import ConfigError
from jaxdistill.methods import signals
from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options, no_parameters
from jaxdistill.methods.knobs import Alpha, TemperatureKnob, WeightKnob, schedules
from jaxdistill.section import Count


class Minilm(Options):
    """MiniLMv2: how tokens relate in one layer, by queries, keys and values, beside the KL."""

    alpha: Alpha = Field(0.0, description="Weight of the hard labels.")
    temperature: TemperatureKnob = Field(1.0, description="T of the KL.")
    student_layer: Annotated[int, Field(ge=0)] | None = Field(
        None, description="The student's layer, from 0; null: its last."
    )
    teacher_layer: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="The teacher's layer, from 0; null: its last. The paper takes one below it of "
        "large teachers.",
    )
    heads: Count | None = Field(
        None,
        description="Relation heads; must divide the widths of queries, keys and values of both "
        "models; null: the most that do, up to the student's heads.",
    )
    feature_weight: WeightKnob = Field(
        1.0, description="Weight of the relations; a number or {schedule, start, end}."
    )


def objective(
    *,
    layers: tuple[int, int],
    heads: int,
    **head: Unpack[Head],
) -> Objective:
    """MiniLMv2: how tokens relate in one layer, whatever the models' widths and heads.

        alpha * CE + (1 - alpha) * T^2 * KL + feature_weight * (R_Q + R_K + R_V) / 3
        R_X = mean over heads and tokens of KL(softmax(X_T X_T^T / sqrt d) || the student's)

    X: queries, keys or values of the layer, before rotation, split into `heads` relation heads of
    width d. A token relates to those it sees: those before it in its own document (ours; the paper
    is about encoders). Knobs: alpha, temperature, feature_weight.

    Args:
      layers: of student and teacher, from 0.
      heads: relation heads; must divide the widths of queries, keys and values of both models.
      head: see `Head`.

    Reference: Wang et al. 2021, arXiv 2012.15828, section 3.
    """
    import jax

    from jaxdistill import losses
    from jaxdistill.methods.head_loss import from_heads
    from jaxdistill.types import Mean

    def apply(params, student, signal, batch, knobs):
        means = from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], temperature=knobs["temperature"],
        )  # fmt: skip
        pairs = zip(student.relations[0], signal.outputs.relations[0], strict=True)
        each = [losses.relation_kl(s, t, batch.segment_ids, heads=heads) for s, t in pairs]
        features = losses.masked_mean(sum(each) / len(each), batch.mask)
        total = means["loss"].total + knobs["feature_weight"] * features.total
        features = Mean(jax.lax.stop_gradient(features.total), features.count)
        return means | {"loss": Mean(total, means["loss"].count), "loss/features": features}

    return Objective(
        no_parameters, apply, student_relations=layers[:1], teacher_relations=layers[1:]
    )


def build(options: Minilm, facts: Facts) -> Built:
    """The method of a run.

    Raises:
      ConfigError: for a layer that a model does not have, or heads that divide no width.
    """
    student = _layer("student", options.student_layer, facts.student)
    teacher = _layer("teacher", options.teacher_layer, facts.teacher)
    return Built(
        objective(layers=(student, teacher), heads=_heads(options, facts), **options.head(facts)),
        schedules(options, facts.steps, "alpha", "temperature", "feature_weight"),
    )


def _layer(who, layer, model) -> int:
    """The layer that is compared: the one asked for, or the last."""
    if layer is not None and layer >= model.layers:
        raise ConfigError(
            f"method.{who}_layer = {layer}: the {who} has layers 0 to {model.layers - 1}"
        )
    return model.layers - 1 if layer is None else layer


def _heads(options: Minilm, facts: Facts) -> int:
    """The relation heads: those asked for, or the most that divide all widths."""
    widths = [
        count * model.head_dim
        for model in (facts.student, facts.teacher)
        for count in (model.heads, model.kv_heads)
    ]
    fits = lambda heads: all(width % heads == 0 for width in widths)
    heads = options.heads or max(filter(fits, range(1, facts.student.heads + 1)))
    if not fits(heads):
        raise ConfigError(
            f"method.heads = {heads}: must divide the widths of queries and keys, "
            f"{', '.join(map(str, sorted(set(widths))))}; leave it out to let it be chosen"
        )
    return heads


METHOD = Method(Minilm, build, reads=lambda options: signals.LAYERS, measured=True)
