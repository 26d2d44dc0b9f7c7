"""The terms of GRPO's objective: the policy's, and what a teacher or the start adds to it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import losses
from jaxdistill.methods.base import Head
from jaxdistill.methods.chunks import following
from jaxdistill.methods.head_loss import from_heads, said, said_by_teacher
from jaxdistill.types import Mean


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyTerms:
    """The terms of one objective; the fields are the arguments of `objective`."""

    policy: Any
    max_length: int | None
    correction: str
    correction_bound: float
    divergence: str | None
    only_wrong: bool
    start_weight: float
    estimator: str
    head: Head

    @property
    def drawn(self) -> bool:
        """Whether the teacher is a part of the advantages."""
        return self.divergence == "sampled_kl"

    def taught(self, batch: Any) -> Any:
        """The tokens [B, L] that the teacher teaches."""
        mask = batch.mask & batch.sampled["wrong"] if self.only_wrong else batch.mask
        mask = mask & batch.sampled["taught"] if "taught" in batch.sampled else mask
        if batch.groups is None:
            return mask
        return mask & (following(batch.groups) > 0)  # answers whose teacher is told something

    def prepare(self, batch: Any) -> dict[str, Any]:
        """What the terms are means over, in the whole batch."""
        of = lambda mask: (
            losses.per_mean(
                jnp.zeros(mask.shape), mask, self.policy.per, batch.segment_ids, self.max_length
            ).count
        )
        counts = {"policy_count": of(batch.mask), "answer_tokens": batch.mask.sum()}
        if self.divergence and not self.drawn:
            counts |= {"taught_tokens": self.taught(batch).sum()}
        if "rewarded" in batch.sampled:
            counts["rewarded_count"] = of(batch.mask & batch.sampled["rewarded"])
            counts |= {"taught_count": of(self.taught(batch))} if self.drawn else {}
        return {name: count.astype(jnp.float32) for name, count in counts.items()}

    def apply(self, params: Any, student: Any, signal: Any, batch: Any, knobs: Any) -> Any:
        """The loss, and what is told of its terms."""
        counts = knobs if "policy_count" in knobs else self.prepare(batch)
        new, entropy = said(self.head, student, batch)
        old = jax.lax.stop_gradient(batch.sampled.get("old", new))
        means = self._policy(signal, batch, knobs, counts, new, old)
        count, total = means["loss"].count, means["loss"].total
        gap = jnp.where(batch.mask, new - old, 0.0)
        means |= {
            "loss/policy": means["loss"],
            "loss/ce": _over(-new, batch.mask),
            "student/entropy": _over(entropy, batch.mask),
            "policy/ratio": _over(jnp.exp(gap), batch.mask),
            "policy/old_kl": _over(jnp.expm1(gap) - gap, batch.mask),
        }
        if self.divergence and not self.drawn:
            term, beside = self._teacher(student, signal, batch, knobs, counts)
            total, means = total + term, means | beside
        if self.start_weight:
            first, _ = jax.lax.stop_gradient(said(self.head, signal.outputs, batch))
            kl = losses.kl_loss(new, first, estimator=self.estimator, old_logprobs=old)
            kl = _over(kl, batch.mask)
            share = counts["policy_count"] / jnp.maximum(counts["answer_tokens"], 1.0)
            total += self.start_weight * share * kl.total
            means |= {"loss/start_kl": kl}
        return jax.lax.stop_gradient(means) | {"loss": Mean(total, count)}

    def _policy(
        self, signal: Any, batch: Any, knobs: Any, counts: Any, new: Any, old: Any
    ) -> dict[str, Any]:
        """The clipped loss under the correction for the sampler, and what is told of both."""
        bounded = losses.sampler_weights(
            old, batch.sampler_logprobs, batch.mask, rule=self.correction,
            upper=self.correction_bound, segment_ids=batch.segment_ids,
        )  # fmt: skip
        gains, beside = self._gains(signal, jax.lax.stop_gradient(new), batch, knobs, counts)
        means = losses.policy_loss(
            new, old, gains, batch.mask, self.policy, segment_ids=batch.segment_ids,
            weights=bounded.weights, max_length=self.max_length,
        )  # fmt: skip
        told = {
            "policy/sampler_at_bound": bounded.at_bound,
            "policy/sampler_difference": bounded.difference,
            "policy/sampler_kl": bounded.mismatch,
        }
        return means | told | beside

    def _gains(
        self, signal: Any, new: Any, batch: Any, knobs: Any, counts: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The advantages of the drawn tokens, and what is told of their two parts."""
        # The loss divides by the count of all answers: each part is scaled to a mean over its own.
        mixed = "rewarded" in batch.sampled
        rewarded = batch.mask & batch.sampled["rewarded"] if mixed else batch.mask
        share = lambda name: counts["policy_count"] / jnp.maximum(counts[name], 1.0) if mixed else 1
        gains = batch.sampled["advantages"]
        if self.divergence is None:
            return gains, {}
        told = {"policy/of_reward": _over(jnp.abs(gains), rewarded)}
        gains = gains * share("rewarded_count")
        if not self.drawn:
            return gains, told
        part = self.taught(batch)
        theirs = said_by_teacher(self.head, signal, dataclasses.replace(batch, mask=part))
        own = losses.teacher_advantages(new, theirs, part, weight=knobs["teacher_weight"])
        return gains + own * share("taught_count"), told | {
            "loss/sampled_kl": _over(new - theirs, part),
            "policy/of_teacher": _over(jnp.abs(own), part if mixed else batch.mask),
        }

    def _teacher(
        self, student: Any, signal: Any, batch: Any, knobs: Any, counts: Any
    ) -> tuple[Any, dict[str, Any]]:
        """What the exact divergence adds to the loss, and what is told of it."""
        part = dataclasses.replace(batch, mask=self.taught(batch))
        theirs = from_heads(
            self.head, student, signal.outputs, part, knobs, kind=self.divergence, alpha=0.0
        )
        share = counts["policy_count"] / jnp.maximum(counts["taught_tokens"], 1.0)
        loss = theirs["loss"]
        weighed = Mean(knobs["teacher_weight"] * loss.total, loss.count)
        told = {name: mean for name, mean in theirs.items() if name not in ("loss", "loss/ce")}
        term = knobs["teacher_weight"] * share * loss.total
        return term, {"policy/of_teacher": weighed} | told


def _over(values: Any, mask: Any) -> Any:
    """The mean of the tokens under a mask."""
    return Mean(jnp.where(mask, values, 0.0).sum(), mask.sum().astype(jnp.float32))
