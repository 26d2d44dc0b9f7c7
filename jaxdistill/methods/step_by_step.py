"""Distilling Step-by-Step: labels and rationales as two tasks, each with a mean of its own."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Unpack

from pydantic import Field

from jaxdistill.errors import MismatchError
from jaxdistill.methods import signals
from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options, no_parameters
from jaxdistill.methods.knobs import Alpha, TemperatureKnob, schedules
from jaxdistill.section import Problem


class StepByStep(Options):
    """Distilling Step-by-Step: labels and rationales as two tasks, each with a mean of its own."""

    label_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="a of a * L_label + (1 - a) * L_rationale; the paper's lambda is (1 - a) / a.",
    )
    alpha: Alpha = Field(
        1.0, description="Weight of the hard labels within each task; below 1 a teacher adds a KL."
    )
    temperature: TemperatureKnob = Field(1.0, description="T of the teacher's KL.")

    @property
    def with_teacher(self) -> bool:
        """Whether a teacher takes part."""
        return self.alpha != 1.0

    def problems(self) -> Iterator[Problem]:
        """Rules: no setting without effect."""
        if not self.with_teacher and self.temperature != 1.0:
            yield ("temperature",), "has no effect with alpha: 1, where there is no teacher"


def objective(
    *,
    explains: tuple[int, int],
    label_weight: float = 0.5,
    with_teacher: bool = False,
    **head: Unpack[Head],
) -> Objective:
    """Distilling Step-by-Step: a * L_label + (1 - a) * L_rationale, each the mean of its tokens.

    Own means, over the whole batch, keep long rationales from drowning short labels; the paper's
    L_label + lambda * L_rationale is a = 1 / (1 + lambda). Both tasks are documents of one batch;
    one token of their prompts differs. Each token's loss is cross-entropy, or with a teacher that
    of `kd`; knobs are then alpha and temperature.

    Args:
      explains: (place, token): a document with this token there is a rationale, any other a label.
      label_weight: a, 0 to 1.
      with_teacher: add KL(teacher || student) on the same tokens.
      head: see `Head`.

    Reference: Hsieh et al. 2023, arXiv 2305.02301; a is its code's alpha.
    """
    import jax.numpy as jnp
    from jax import Array

    from jaxdistill.methods.head_loss import from_heads
    from jaxdistill.types import Batch, Mean

    place, token = explains

    def is_rationale(batch: Batch) -> Array:
        index = jnp.arange(batch.tokens.shape[1])[None, :] - batch.positions + place
        index = jnp.clip(index, 0, batch.tokens.shape[1] - 1)
        return jnp.take_along_axis(batch.tokens, index, axis=1) == token

    def prepare(batch: Batch) -> dict[str, Array]:
        counted, rationale = batch.mask.astype(jnp.float32), is_rationale(batch)
        return {
            "label_tokens": jnp.sum(jnp.where(rationale, 0.0, counted)),
            "rationale_tokens": jnp.sum(jnp.where(rationale, counted, 0.0)),
        }

    def apply(params, student, signal, batch, knobs):
        counts = knobs if "label_tokens" in knobs else prepare(batch)
        labels, rationales = counts["label_tokens"], counts["rationale_tokens"]
        each = lambda share, count: share * (labels + rationales) / jnp.maximum(count, 1.0)
        weight = jnp.where(
            is_rationale(batch), each(1 - label_weight, rationales), each(label_weight, labels)
        )
        counted = batch.mask.astype(jnp.float32)
        weighed = dataclasses.replace(batch, mask=counted * weight)
        soft = {name: knobs[name] for name in ("alpha", "temperature") if with_teacher}
        means = from_heads(
            head, student, signal.outputs if with_teacher else None, weighed, knobs,
            known=signal.known if with_teacher else None,
            sparse=signals.kind("forward_kl", signal.form) if with_teacher else None,
            **(soft or {"alpha": 1.0}),
        )  # fmt: skip
        return means | {"loss": Mean(means["loss"].total, jnp.sum(counted))}

    return Objective(
        no_parameters, apply, needs_teacher=with_teacher, prepare=prepare, token_means=False
    )


def build(options: StepByStep, facts: Facts) -> Built:
    """The method of a run; it has knobs only where a teacher takes part."""
    knobs = ("alpha", "temperature") if options.with_teacher else ()
    return Built(
        objective(
            explains=explain_token(facts.student_tokenizer),
            label_weight=options.label_weight,
            with_teacher=options.with_teacher,
            **options.head(facts),
        ),
        schedules(options, facts.steps, *knobs),
    )


def explain_token(tokenizer: Any) -> tuple[int, int]:
    """(place, token) by which an "explain: " prompt differs from a "predict: " one.

    Raises:
      MismatchError: if this tokenizer writes both prompts alike.
    """
    from jaxdistill.data import encode
    from jaxdistill.data.codec import prepare
    from jaxdistill.reasoning import rationales

    codec = prepare(tokenizer)
    prompts = encode.encode_text(codec, [rationales.EXPLAIN + "x", rationales.PREDICT + "x"])
    pairs = zip(*[tokens for tokens in prompts if not isinstance(tokens, str)], strict=False)
    for place, (explain, predict) in enumerate(pairs):
        if explain != predict:
            return len(codec.prefix) + place, int(explain)
    raise MismatchError("step_by_step: the tokenizer writes 'explain' and 'predict' alike")


METHOD = Method(
    StepByStep,
    build,
    needs_teacher=lambda options: options.with_teacher,
    reads=lambda options: "forward_kl",
    any_text=False,
)
