"""GOLD, for a teacher of any tokenizer: tokens of the same bytes by JSD, the rest by rank."""

from collections.abc import Sequence
from typing import Any, Unpack

from pydantic import Field

from jaxdistill.methods import two_tokenizers
from jaxdistill.methods.base import Built, Facts, Head, Method, Objective
from jaxdistill.methods.knobs import Alpha, schedules
from jaxdistill.methods.two_tokenizers import TwoTokenizers


class Gold(TwoTokenizers):
    """GOLD, for a teacher of any tokenizer: tokens of the same bytes by JSD, the rest by rank."""

    alpha: Alpha = Field(
        0.0,
        description="Weight of the hard labels, 0 to 1: alpha * CE + (1 - alpha) * GOLD; a number "
        "or {schedule, start, end}.",
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Of the generalised JSD: 0 is KL(teacher || student), 1 KL(student || teacher)"
        ", both in the form that is never negative on a part of the vocabulary.",
    )
    matched_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Weight of the matched tokens, 1 - it that of the others; null: the share of "
        "the teacher's tokens that are matched.",
    )


def objective(
    *,
    matched: tuple[Sequence[int], Sequence[int]],
    teacher_vocab: int,
    beta: float = 0.5,
    matched_weight: float | None = None,
    **head: Unpack[Head],
) -> Objective:
    """GOLD's hybrid: alpha * CE + (1 - alpha) * mean over chunks of w JSD_beta + (1 - w) ULD.

    The JSD compares the tokens that spell the same bytes in both vocabularies, the ULD the sorted
    probabilities of all others. A chunk is the shortest text that both models spell; compared are
    the probabilities of its last token, times that of its earlier tokens (chain rule). With equal
    vocabularies and chunks of one token it is the divergence of one vocabulary. Knobs: alpha.

    Args:
      matched: ids of the student's tokens, and of the teacher's in the same order.
      teacher_vocab: how many rows of the teacher's head are tokens.
      beta: see `losses.generalized_jsd_of_parts`.
      matched_weight: w; None: the share of the teacher's tokens that are matched.
      head: see `Head`; vocab is the student's.

    Reference: Patino et al. 2025 (GOLD), and TRL's GOLDTrainer; the divergence of parts is the
    generalised one, as the plain KL of a part can be negative.
    """
    import jax.numpy as jnp
    import numpy as np

    from jaxdistill import losses
    from jaxdistill.methods import chunk_rows

    vocab = head["vocab"]
    ours_in, theirs_in = (np.asarray(ids, np.int32) for ids in matched)
    rest = [
        np.setdiff1d(np.arange(size, dtype=np.int32), ids)
        for size, ids in ((vocab, ours_in), (teacher_vocab, theirs_in))
    ]
    weight = len(theirs_in) / teacher_vocab if matched_weight is None else matched_weight

    def divergence(q, p):
        jsd = losses.generalized_jsd_of_parts(q[..., ours_in], p[..., theirs_in], beta=beta)
        left = (jnp.exp(q[..., rest[0]]), jnp.exp(p[..., rest[1]]))
        ranks = losses.sorted_distance(*left) if any(map(len, rest)) else 0.0
        return weight * jsd + (1 - weight) * ranks

    return chunk_rows.compared(divergence, head, teacher_vocab)


def build(options: Gold, facts: Facts) -> Built:
    """The method of a run."""
    given: dict[str, Any] = two_tokenizers.vocabularies(options, facts)
    return Built(
        objective(
            matched=two_tokenizers.matched(facts),
            beta=options.beta,
            matched_weight=options.matched_weight,
            **given,
        ),
        schedules(options, facts.steps, "alpha"),
    )


METHOD = Method(Gold, build, second_view=True)
