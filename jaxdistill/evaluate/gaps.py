"""How far two models are apart at each token of an answer: what colours samples in reports."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxdistill.evaluate.scoring import token_scores
from jaxdistill.models import DecoderConfig
from jaxdistill.sharding import on_mesh

_STEP = 16  # lengths are rounded up to a multiple: one program for most samples


class Reader(NamedTuple):
    """A model that reads: its shape, what it computes in, its parameters."""

    config: DecoderConfig
    dtype: DTypeLike
    params: Any


def token_gaps(
    student: Reader,
    teacher: Reader,
    vocab: int,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    """log q - log p of every token of the answers, in nats: above 0 the student likes it more.

    Args:
      student: whose probabilities are q.
      teacher: p, of the same tokens.
      vocab: rows of both heads that are tokens.
      prompts: ids, at least one each.
      answers: what follows each.

    Returns:
      Of each answer float32 [tokens].
    """
    wholes = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = -(-max(map(len, wholes)) // _STEP) * _STEP
    read = np.zeros((3, len(wholes), width), np.int32)
    for row, whole in enumerate(wholes):
        last = len(whole) - 1
        read[0, row, :last], read[1, row, :last], read[2, row, :last] = whole[:-1], whole[1:], 1
    said = []
    for config, dtype, params in (student, teacher):
        with on_mesh(params):
            scores, _ = token_scores(config, vocab, dtype, params, read[0], read[2], read[1])
        said.append(np.asarray(jax.device_get(scores)))
    firsts = [len(prompt) - 1 for prompt in prompts]
    return [
        (said[0] - said[1])[row, first : first + len(answer)]
        for row, (first, answer) in enumerate(zip(firsts, answers, strict=True))
    ]
