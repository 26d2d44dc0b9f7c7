"""ALM, for a teacher of any tokenizer: chunks of text are as likely as the teacher has them."""

from typing import Unpack

from pydantic import Field

from jaxdistill.methods import two_tokenizers
from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, no_parameters
from jaxdistill.methods.knobs import Alpha, schedules
from jaxdistill.methods.two_tokenizers import TwoTokenizers


class Alm(TwoTokenizers):
    """ALM, for a teacher of any tokenizer: chunks of text are as likely as the teacher has them."""

    alpha: Alpha = Field(
        0.5,
        description="Weight of the hard labels, 0 to 1: alpha * CE + (1 - alpha) * tau * ALM; a "
        "number or {schedule, start, end}.",
    )
    tau: float = Field(
        100.0,
        gt=0,
        le=1e6,
        description="Temperature of the chunks' probabilities. The larger, the more alike likely "
        "and unlikely chunks pull.",
    )


def objective(
    *,
    opening: tuple[tuple[int, ...], tuple[int, ...]],
    teacher_vocab: int,
    tau: float = 100.0,
    **head: Unpack[Head],
) -> Objective:
    """Approximate likelihood matching: alpha * CE + (1 - alpha) * tau * ALM.

    ALM is `losses.alm` over the chunks that both models spell, weighed by the teacher's tokens,
    less its smallest value. To the likelihood of a chunk belongs that a word begins, or the text
    ends, behind it: without that a chunk would be as likely as all that it can be the beginning of.
    CE is the mean over tokens, ALM that over chunks, of the whole batch. Knobs: alpha.

    Args:
      opening: ids that can follow the end of a word, rising, of the student and of the teacher.
      teacher_vocab: how many rows of the teacher's head are tokens.
      tau: temperature of the chunks.
      head: see `Head`; vocab is the student's.

    Reference: Minixhofer, Vulic, Ponti 2025, arXiv 2503.20083.
    """
    import jax

    from jaxdistill import losses
    from jaxdistill.methods.chunks import Likelihoods, per_chunk_token
    from jaxdistill.types import Mean

    likelihoods = Likelihoods(opening, teacher_vocab, head)

    def prepare(batch):
        return {"per_chunk_token": per_chunk_token(batch)}

    def apply(params, student, signal, batch, knobs):
        share = knobs if "per_chunk_token" in knobs else prepare(batch)
        ours, ce = likelihoods.student(student, batch)
        theirs, weights = likelihoods.teacher(signal.outputs, batch)
        alm = losses.alm(ours, theirs, weights, temperature=tau)
        # What the teacher alone makes of the sum is taken off: 0 is the best, the slope stays.
        alone = jax.lax.stop_gradient(alm["loss"].total) - alm["loss/divergence"].total
        matched = tau * share["per_chunk_token"] * (alm["loss"].total - alone)
        total = knobs["alpha"] * ce.total + (1 - knobs["alpha"]) * matched
        return {
            "loss": Mean(total, ce.count),
            "loss/ce": ce,
            "loss/divergence": alm["loss/divergence"],
        }

    return Objective(no_parameters, apply, prepare=prepare, token_means=False)


def build(options: Alm, facts: Facts) -> Built:
    """The method of a run."""
    from jaxdistill.data.token_bytes import token_bytes

    both = (facts.student_tokenizer, facts.teacher_tokenizer)
    student, teacher = (tuple(token_bytes(one).opening()) for one in both)
    given = two_tokenizers.vocabularies(options, facts)
    return Built(
        objective(opening=(student, teacher), tau=options.tau, **given),
        schedules(options, facts.steps, "alpha"),
    )


METHOD = Method(Alm, build, second_view=True)
