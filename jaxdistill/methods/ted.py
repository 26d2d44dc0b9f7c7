"""TED: filters on chosen layers learn the task, then the student matches the teacher's."""

from typing import Unpack

from pydantic import Field

from jaxdistill.methods import signals
from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options
from jaxdistill.methods.knobs import LAYERS, Alpha, Layers, TemperatureKnob, WeightKnob, schedules


class Ted(Options):
    """TED: filters on chosen layers learn the task, then the student matches the teacher's."""

    alpha: Alpha = Field(0.5, description="Weight of the hard labels.")
    temperature: TemperatureKnob = Field(2.0, description="T of the KL; the paper's is 2.")
    layers: Layers = Field(4, description=LAYERS)
    feature_weight: WeightKnob = Field(
        1.0, description="Weight of the filters' distance; a number or {schedule, start, end}."
    )
    filter_steps: float = Field(
        0.3, gt=0, lt=1, description="Share of the run in which the filters alone learn."
    )
    filter_lr: float = Field(1e-3, gt=0, le=10, description="Highest learning rate of the filters.")


def objective(
    *,
    layers: tuple[tuple[int, ...], tuple[int, ...]],
    widths: tuple[int, int],
    **head: Unpack[Head],
) -> Objective:
    """TED: filters of both models learn the task, then the student matches the teacher's.

        stage 1: mean_k CE(head_T(f_k(h_k))), of each model's filters, f_k(h_k) of unit size
        stage 2: alpha * CE + (1 - alpha) * T^2 * KL + feature_weight * mean_k MSE(f_S,k, f_T,k)

    In stage 1 nothing flows to the student, in stage 2 nothing to the teacher's filters;
    `Built.trained` keeps decay and momentum from moving them too.
    Knobs: alpha, temperature, feature_weight, stage.

    Args:
      layers: of student and teacher, from `losses.layer_map`.
      widths: of the student's and the teacher's hidden states.
      head: see `Head`.

    Reference: Liang et al. 2023, arXiv 2210.01351, section 3; one head for all filters is ours.
    """
    import jax
    import jax.numpy as jnp

    from jaxdistill import losses
    from jaxdistill.methods.head_loss import from_heads
    from jaxdistill.sharding import current_mesh
    from jaxdistill.types import Mean

    pairs, (narrow, wide) = len(layers[0]), widths
    unit = lambda x: x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)

    def init(key):
        return {
            "student_filters": losses.init_filters(key, pairs, narrow, wide),
            "teacher_filters": losses.init_filters(key, pairs, wide),
        }

    def apply(params, student, signal, batch, knobs):
        ours, theirs = params["student_filters"], params["teacher_filters"]
        taps, wanted, mask = student.taps, signal.outputs.taps, batch.mask
        means = from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], temperature=knobs["temperature"],
        )  # fmt: skip
        rows = signal.outputs.head[: head["vocab"]]
        fused = {"norm": unit, "chunk": head.get("chunk"), "mesh": current_mesh()}
        fused["student_softcap"] = signal.outputs.softcap
        task = lambda own, taps: losses.ted_stage1(own, taps, rows, batch.targets, mask, **fused)
        first = lambda: task(ours, taps).total + task(theirs, wanted).total
        second = lambda: losses.ted_stage2(ours, theirs, taps, wanted, mask, normalise=True).total
        learning = knobs["stage"] < 2
        own = jax.lax.cond(learning, first, second)
        total = jnp.where(learning, own, means["loss"].total + knobs["feature_weight"] * own)
        count, logged = means["loss"].count, jax.lax.stop_gradient(own)
        on = {"loss/filters": learning, "loss/features": ~learning}
        means |= {name: Mean(logged * active, count) for name, active in on.items()}
        return means | {"loss": Mean(total, count)}

    return Objective(init, apply, student_taps=layers[0], teacher_taps=layers[1])


def build(options: Ted, facts: Facts) -> Built:
    """The method of a run: the filters alone in the first steps, then the student."""
    import jax.numpy as jnp

    from jaxdistill import losses

    student, teacher = facts.student, facts.teacher
    first = min(max(1, round(options.filter_steps * facts.steps)), facts.steps)
    knobs = schedules(options, facts.steps, "alpha", "temperature", "feature_weight")
    return Built(
        objective(
            layers=losses.layer_map(student.layers, teacher.layers, options.layers),
            widths=(student.embed, teacher.embed),
            **options.head(facts),
        ),
        knobs | {"stage": lambda step: jnp.where(step < first, 1.0, 2.0)},
        measuring={"stage": 2.0},
        learning_rate=options.filter_lr,
        trained={"student": (first, None), "objective/teacher_filters": (0, first)},
    )


METHOD = Method(Ted, build, reads=lambda options: signals.LAYERS, measured=True)
