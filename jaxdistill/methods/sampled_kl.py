"""Reverse KL at the sampled tokens alone, as a policy gradient: one number of the teacher each."""

from collections.abc import Iterator
from typing import Unpack

from pydantic import Field

from jaxdistill.methods import signals
from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options, no_parameters
from jaxdistill.methods.knobs import WeightKnob, schedules
from jaxdistill.section import Problem


class SampledKl(Options):
    """Reverse KL at the tokens that the student drew: one number of the teacher for each."""

    weight: WeightKnob = Field(
        1.0,
        description="Of the advantage, log p - log q at the drawn token (teacher_kl_coef, "
        "opd_kl_coef); a number or {schedule, start, end}.",
    )
    temperature: float = Field(
        1.0, ge=0.01, le=1000, description="T of both models: that of rollout.temperature."
    )
    max_ratio: float = Field(
        2.0,
        ge=1,
        le=1e6,
        description="The importance weight q / mu of a drawn token is cut there (is_clip), mu "
        "being the distribution that it was drawn from.",
    )
    early: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="IW-OPD's gamma: tokens before most of an answer's advantage count up to "
        "1 + gamma times; 0.5 in the paper.",
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: something is learned."""
        if self.weight == 0:
            yield ("weight",), "nothing would be learned: use a positive number"


def objective(
    *, temperature: float = 1.0, max_ratio: float = 2.0, early: float = 0.0, **head: Unpack[Head]
) -> Objective:
    """The policy gradient of the reverse KL at each drawn token y.

        l = log q(y) - log p(y)      A = -weight (1 + early (1 - u)) sg(l)
        loss = -min(sg(q(y)) / mu(y), max_ratio) A q(y) / sg(q(y))

    u is the share of an answer's sum of |l| that lies before the token. In expectation over y ~ mu
    = q the gradient is that of KL(q || p) at each position, with more variance: where the teacher
    gives whole rows, `reverse_kd` has the same gradient without any.
    Knobs: weight.

    Args:
      temperature: T of q, p and mu.
      max_ratio: the largest importance weight.
      early: gamma of the position weights.
      head: see `Head`.

    Reference: Thinking Machines 2025, "On-policy distillation"; position weights: IW-OPD, arXiv
    2606.22600.
    """
    import jax

    from jaxdistill import losses
    from jaxdistill.methods.head_loss import said, said_by_teacher
    from jaxdistill.types import Mean

    def apply(params, student, signal, batch, knobs):
        mask = batch.mask
        mine, entropy = said(head, student, batch, temperature=temperature)
        now = jax.lax.stop_gradient(mine)
        theirs = said_by_teacher(head, signal, batch, temperature=temperature)
        assert batch.sampler_logprobs is not None, "the row says that its feed fills it"
        ratio = losses.sampler_weights(
            now, batch.sampler_logprobs, mask, upper=max_ratio, segment_ids=batch.segment_ids
        )
        gain = losses.teacher_advantages(now, theirs, mask, weight=knobs["weight"])
        if early:
            gain *= losses.early_weights(gain, mask, early, batch.segment_ids)
        means = losses.policy_loss(
            mine, now, gain, mask, weights=ratio.weights, segment_ids=batch.segment_ids
        )
        tokens = means["loss"].count
        over = lambda values: Mean(jax.lax.stop_gradient((values * mask).sum()), tokens)
        return {
            "loss": means["loss"],
            "loss/sampled_kl": over(now - theirs),
            "student/entropy": over(entropy),
            "policy/at_bound": ratio.at_bound,
            "policy/sampler_kl": ratio.mismatch,
        }

    return Objective(no_parameters, apply, token_means=False)


def build(options: SampledKl, facts: Facts) -> Built:
    """The method of a run."""
    made = objective(
        temperature=options.temperature,
        max_ratio=options.max_ratio,
        early=options.early,
        **options.head(facts),
    )
    return Built(made, schedules(options, facts.steps, "weight"))


METHOD = Method(SampledKl, build, reads=lambda options: signals.DRAWN, reads_sampler=True)
