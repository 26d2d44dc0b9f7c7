"""DistiLLM-2: towards the teacher's responses, away from the student's own, each a mean."""

import dataclasses
from typing import Any, Unpack

from pydantic import Field

from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options, no_parameters
from jaxdistill.methods.knobs import Alpha, Balance, schedules
from jaxdistill.ranges import SKEW


class Distillm2(Options):
    """DistiLLM-2: towards the teacher's responses, away from the student's own, each a mean."""

    alpha: Alpha = Field(0.0, description="Weight of the hard labels.")
    skew: float = Field(
        SKEW.default,
        ge=SKEW.least,
        le=SKEW.most,
        description="Weight of the model that is compared.",
    )
    balance: Balance = Field(
        1.0,
        description="Weight of the student's responses; 2 - balance is that of the teacher's. A "
        "number or {schedule, start, end}.",
    )


def objective(*, skew: float = SKEW.default, **head: Unpack[Head]) -> Objective:
    """DistiLLM-2: towards the teacher's responses, away from the student's own, each a mean.

        (2 - balance) mean_y KL(p || a p + (1 - a) q)     y written by teacher or data
          +   balance mean_y KL(q || (1 - a) p + a sg(q)) y written by the student

    mean_y is over responses, each the mean of its tokens; all means are of the whole batch.
    Knobs: alpha (of CE, in both), balance.

    Args:
      skew: a, weight of the model whose own distribution is compared.
      head: see `Head`.

    Reference: Ko et al. 2025, arXiv 2503.07067; the constant q in the mixture is its code's.
    """
    import jax.numpy as jnp

    from jaxdistill import losses
    from jaxdistill.losses import whole_rows
    from jaxdistill.methods.head_loss import from_heads
    from jaxdistill.types import STUDENT, Mean

    def sides(batch):
        weights = losses.sequence_weights(batch.mask, batch.segment_ids)
        own = 0.0 if batch.origin is None else (batch.origin == STUDENT).astype(jnp.float32)
        return weights * (1 - own), weights * own

    def prepare(batch):
        return dict(zip(("chosen", "rejected"), map(jnp.sum, sides(batch)), strict=True))

    def apply(params, student, signal, batch, knobs):
        sums = knobs if "chosen" in knobs else prepare(batch)
        balance, both = knobs["balance"], sums["chosen"] + sums["rejected"]
        kinds: tuple[dict[str, Any], ...] = (
            {"kind": "skew_forward_kl", "parameters": (skew,)},
            {"kind": whole_rows.bound("detached_skew_reverse_kl", skew=skew)},
        )
        chosen, rejected = (
            from_heads(
                head, student, signal.outputs, dataclasses.replace(batch, mask=weights), knobs,
                alpha=knobs["alpha"], **kind,
            )
            for weights, kind in zip(sides(batch), kinds, strict=True)
        )  # fmt: skip
        means = {name: chosen[name] + rejected[name] for name in chosen}
        each = lambda side, share, n: share * both / jnp.maximum(n, 1.0) * side["loss"].total
        total = each(chosen, 2 - balance, sums["chosen"])
        total += each(rejected, balance, sums["rejected"])
        return means | {"loss": Mean(total, means["loss"].count)}

    return Objective(no_parameters, apply, prepare=prepare, token_means=False)


def build(options: Distillm2, facts: Facts) -> Built:
    """The method of a run."""
    return Built(
        objective(skew=options.skew, **options.head(facts)),
        schedules(options, facts.steps, "alpha", "balance"),
    )


METHOD = Method(Distillm2, build, sides=(("student",), ("teacher", "data")))
