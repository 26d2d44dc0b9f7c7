"""GRPO and its forms: what earned more than the rest of its group becomes more likely."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, Unpack

from pydantic import Field

from jaxdistill.methods import signals
from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options, no_parameters
from jaxdistill.methods.knobs import WeightKnob, schedules
from jaxdistill.section import Problem


class Grpo(Options):
    """GRPO and its forms: what earned more than the rest of its group becomes more likely."""

    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "gspo_token", "cispo"] = Field(
        "dapo",
        description="Which clipped loss, and what it is a mean of (loss_type): grpo and gspo of "
        "sequences, dapo and cispo of tokens, dr_grpo of sequences of the longest length.",
    )
    lower: float | None = Field(
        None, ge=0, lt=1, description="Ratios below 1 - lower stop pushing down; null: as loss has."
    )
    upper: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Ratios above 1 + upper stop pushing up; of cispo the largest weight itself; "
        "null: as loss has.",
    )
    bound: float | None = Field(
        None, gt=1, le=1e6, description="The largest ratio that counts for bad answers; null: any."
    )
    correction: Literal["truncate", "mask", "sequence_mask", "geometric_mask"] = Field(
        "truncate",
        description="How q_old / mu is bounded, where the program that writes answers rounds "
        "otherwise than the one that trains (is_clip, importance sampling).",
    )
    correction_bound: float = Field(2.0, ge=1, le=1e6, description="The largest q_old / mu.")
    teacher_weight: WeightKnob = Field(
        0.0,
        description="Of the divergence from a teacher beside the reward (teacher_kl_coef, "
        "opd_kl_coef, distillation weight); 0: no teacher. A number or "
        "{schedule, start, end}.",
    )
    divergence: Literal["reverse_kl", "forward_kl", "sampled_kl"] = Field(
        "reverse_kl",
        description="From the teacher: exact over the vocabulary, or sampled_kl: log p - log q of "
        "each drawn token joins its advantage, for which a server (teacher.api) can be asked.",
    )
    distil: Literal["all", "wrong"] = Field(
        "all",
        description="Which answers the teacher teaches: all, or those to which the first verifier "
        "gave less than 1.",
    )
    start_weight: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Of the KL to the student as it was before the first step (beta, "
        "kl_loss_coef); 0: none.",
    )
    estimator: Literal["k2", "k3", "ratio_k3"] = Field(
        "ratio_k3", description="Of that KL; k3 has the gradient of the forward KL."
    )

    @property
    def with_teacher(self) -> bool:
        """Whether a teacher takes part."""
        return self.teacher_weight != 0.0

    def problems(self) -> Iterator[Problem]:
        """Rules: no setting without effect, one signal beside the reward."""
        from jaxdistill.losses.policy import POLICIES

        base = POLICIES[self.loss]
        upper = base.upper if self.upper is None else self.upper
        if self.bound is not None and not self.bound > 1 + upper:
            yield ("bound",), f"must be above 1 + upper = {1 + upper:g}: the clip would never act"
        if base.detached:
            for name in ("lower", "bound"):
                if getattr(self, name) is not None:
                    yield (name,), f"has no effect with loss: {self.loss}: remove it"
        if not self.with_teacher:
            for name, usual in (("divergence", "reverse_kl"), ("distil", "all")):
                if getattr(self, name) != usual:
                    yield (name,), "has no effect with teacher_weight: 0: remove it"
        if self.start_weight and self.with_teacher:
            yield ("start_weight",), "either the teacher or the start stands beside it: use 0"
        if not self.start_weight and self.estimator != "ratio_k3":
            yield ("estimator",), "has no effect with start_weight: 0: remove it"


def objective(
    *,
    policy: Any,
    max_length: int | None = None,
    correction: str = "truncate",
    correction_bound: float = 2.0,
    divergence: str | None = None,
    only_wrong: bool = False,
    start_weight: float = 0.0,
    estimator: str = "ratio_k3",
    **head: Unpack[Head],
) -> Objective:
    """The clipped policy gradient of sampled answers, with a teacher or the start beside it.

        L = L_policy + teacher_weight mean_t D(p, q) + start_weight mean_t KL

    L_policy is the mean that `policy.per` says, the others are means over tokens, all of the whole
    batch. With `sampled_kl` the teacher is a part of the advantages instead:

        A_t = A + teacher_weight (log p(y_t) - sg log q(y_t))

    Where some answers are for the reward alone and others for the teacher alone (`rewarded` and
    `taught` of `sampled`), L_policy is a mean over the former, and what the teacher adds one over
    the latter, whichever form it has: each has a count of its own.

    Of the batch it reads `sampled` and `sampler_logprobs`. Where q_old is not given it is q
    itself, and ratios are 1. The correction for the sampler multiplies the policy loss alone.
    Knob: teacher_weight.

    Args:
      policy: a `losses.Policy`.
      max_length: tokens of an answer at most, for `per` "length".
      correction: a rule of `losses.sampler_weights`.
      correction_bound: its upper bound.
      divergence: from the teacher, "sampled_kl" among them; None: there is none.
      only_wrong: the teacher teaches the answers in `sampled["wrong"]` alone.
      start_weight: of the KL to the student before the first step.
      estimator: of that KL.
      head: see `Head`.

    Reference: Shao et al. 2024, arXiv 2402.03300; `losses.policy_loss` has the formula of L_policy,
    `losses.sampler_weights` that of the correction, each with its source.
    """
    from jaxdistill.methods.grpo_terms import PolicyTerms

    terms = PolicyTerms(
        policy, max_length, correction, correction_bound, divergence, only_wrong,
        start_weight, estimator, head,
    )  # fmt: skip
    return Objective(
        no_parameters,
        terms.apply,
        needs_teacher=bool(divergence),
        needs_start=bool(start_weight),
        prepare=terms.prepare,
        token_means=False,
    )


def build(options: Grpo, facts: Facts) -> Built:
    """The method of a run; its knob is the teacher's weight, where there is a teacher."""
    from jaxdistill import losses

    clip = {
        name: value
        for name in ("lower", "upper", "bound")
        if (value := getattr(options, name)) is not None
    }
    return Built(
        objective(
            policy=dataclasses.replace(losses.POLICIES[options.loss], **clip),
            max_length=facts.longest,
            correction=options.correction,
            correction_bound=options.correction_bound,
            divergence=options.divergence if options.with_teacher else None,
            only_wrong=options.distil == "wrong",
            start_weight=options.start_weight,
            estimator=options.estimator,
            **options.head(facts),
        ),
        schedules(options, facts.steps, *(("teacher_weight",) if options.with_teacher else ())),
    )


METHOD = Method(
    Grpo,
    build,
    needs_teacher=lambda options: options.with_teacher,
    needs_start=lambda options: options.start_weight > 0,
    reads=lambda options: signals.DRAWN if options.divergence == "sampled_kl" else signals.ROWS,
    any_text=False,
    reads_sampler=True,
    rewards=True,
    marks_wrong=lambda options: options.distil == "wrong",
)
