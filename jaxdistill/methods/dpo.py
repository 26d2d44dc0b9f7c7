"""DPO: of two given answers the student prefers the chosen one more than a reference does."""

from typing import Literal, Unpack

from pydantic import Field

from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options, no_parameters


class Dpo(Options):
    """DPO: of two given answers the student prefers the chosen one more than a reference does."""

    beta: float = Field(
        0.1, gt=0, le=1000, description="The larger, the closer to the reference the student stays."
    )
    reference: Literal["start", "teacher"] = Field(
        "start",
        description="What the student is compared with: itself before the first step (a second "
        "copy of its weights, in student.compute_dtype), or the teacher.",
    )


def objective(*, beta: float = 0.1, reference: str = "start", **head: Unpack[Head]) -> Objective:
    """Direct preference optimisation on rows of pairs, each chosen before rejected.

        margin = beta ((log q(chosen) - log r(chosen)) - (log q(rejected) - log r(rejected)))
        loss = -log sigmoid(margin), the mean over the pairs of the batch

    Segments 2 n - 1 and 2 n of a row are the chosen and the rejected answer of its n-th pair.

    Args:
      beta: above 0.
      reference: r, "start" or "teacher".
      head: see `Head`.

    Reference: Rafailov et al. 2023, arXiv 2305.18290, equation 7.
    """
    import jax
    import jax.numpy as jnp

    from jaxdistill import losses
    from jaxdistill.methods.head_loss import said
    from jaxdistill.types import Mean

    def answers(values, batch):
        """The sums of token values over each answer: two arrays [pairs of the batch]."""
        length = values.shape[1]
        one = lambda row, own: jax.ops.segment_sum(row, own, length + 1)
        sums = jax.vmap(one)(values, batch.segment_ids)[:, 1:]
        sums = sums[:, : length // 2 * 2]
        return sums[:, ::2].reshape(-1), sums[:, 1::2].reshape(-1)

    def apply(params, student, signal, batch, knobs):
        counted = batch.mask.astype(jnp.float32)
        ours, _ = said(head, student, batch)
        theirs, _ = jax.lax.stop_gradient(said(head, signal.outputs, batch))
        first, second = answers(counted, batch)
        means = losses.dpo(
            *answers(ours, batch),
            *answers(theirs, batch),
            beta=beta,
            mask=(first > 0) & (second > 0),
        )
        return means | {"loss/ce": jax.lax.stop_gradient(Mean(-ours.sum(), counted.sum()))}

    return Objective(
        no_parameters,
        apply,
        needs_teacher=reference == "teacher",
        needs_start=reference == "start",
        token_means=False,
    )


def build(options: Dpo, facts: Facts) -> Built:
    """The method of a run; it has no knobs."""
    return Built(objective(beta=options.beta, reference=options.reference, **options.head(facts)))


METHOD = Method(
    Dpo,
    build,
    needs_teacher=lambda options: options.reference == "teacher",
    needs_start=lambda options: options.reference == "start",
    any_text=False,
    pairs=True,
)
