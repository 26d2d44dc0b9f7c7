"""ULD, for a teacher of any tokenizer: sorted probabilities at each chunk's end, by rank."""

from typing import Unpack

from pydantic import Field

from jaxdistill.methods import two_tokenizers
from jaxdistill.methods.base import Built, Facts, Head, Method, Objective
from jaxdistill.methods.knobs import Alpha, schedules
from jaxdistill.methods.two_tokenizers import TwoTokenizers


class Uld(TwoTokenizers):
    """ULD, for a teacher of any tokenizer: sorted probabilities at each chunk's end, by rank."""

    alpha: Alpha = Field(
        0.4,
        description="Weight of the hard labels, 0 to 1: alpha * CE + (1 - alpha) * ULD; 0.4 is the "
        "paper's CE + 1.5 ULD. A number or {schedule, start, end}.",
    )


def objective(*, teacher_vocab: int, **head: Unpack[Head]) -> Objective:
    """Universal logit distillation: alpha * CE + (1 - alpha) * mean over chunks of ULD.

        ULD = sum_i |q_(i) - p_(i)|,  both sorted from large to small

    A chunk is the shortest text that both models spell; q and p are the probabilities of its last
    token, times that of its earlier tokens (chain rule). Knobs: alpha.

    Args:
      teacher_vocab: how many rows of the teacher's head are tokens.
      head: see `Head`; vocab is the student's.

    Reference: Boizard et al. 2024, arXiv 2402.12030, with both sides shifted alike (its code
    compares positions that are one apart).
    """
    import jax.numpy as jnp

    from jaxdistill import losses
    from jaxdistill.methods import chunk_rows

    def divergence(q, p):
        return losses.sorted_distance(jnp.exp(q), jnp.exp(p))

    return chunk_rows.compared(divergence, head, teacher_vocab)


def build(options: Uld, facts: Facts) -> Built:
    """The method of a run."""
    return Built(
        objective(**two_tokenizers.vocabularies(options, facts)),
        schedules(options, facts.steps, "alpha"),
    )


METHOD = Method(Uld, build, second_view=True)
