"""How likely the tokens of a prompt are to the model that reads it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.models import decoder, decoding
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.requests import PromptScores, Request

AT_A_TIME = 64  # places of a prompt whose logits are held


def scores(
    config: DecoderConfig, weights: dict, request: Request, x_PWD: Any, row: int
) -> PromptScores | None:
    """Scores of a prompt that has been read; None where the request wants none.

    Args:
      config: the model's configuration.
      weights: from `per_layer.split`.
      request: whose prompt it is.
      x_PWD: last states of prompts, from `decoding.prefill`.
      row: which of them.
    """
    wanted = request.prompt_alternatives
    if wanted is None:
        return None
    most = min(1 << max(wanted - 1, 0).bit_length(), config.vocab_size)
    rest = {name: leaf for name, leaf in weights.items() if name != "layers"}
    follow = np.asarray(request.tokens[1:], np.int32)
    none, none_K = np.zeros(0, np.float32), np.zeros((0, most), np.float32)
    parts = [[none, none.astype(np.int32), none_K.astype(np.int32), none_K]]
    for start in range(0, len(follow), AT_A_TIME):
        size = min(AT_A_TIME, len(follow) - start)
        place = np.minimum(np.arange(start, start + AT_A_TIME, dtype=np.int32), start + size - 1)
        pieces = _score(config, most, rest, x_PWD, np.int32(row), place, follow[place])
        parts.append([np.asarray(one)[:size] for one in pieces])
    logprob, rank, likely, likely_logprob = map(np.concatenate, zip(*parts, strict=True))
    return PromptScores(logprob, rank, likely[:, :wanted], likely_logprob[:, :wanted])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    config: DecoderConfig,
    most: int,
    weights: dict,
    x_PWD: Array,
    row: Array,
    place_C: Array,
    token_C: Array,
) -> tuple[Array, Array, Array, Array]:
    """How likely the prompt's own tokens were, from the last states of `prefill`.

    Args:
      config: the model's configuration.
      most: how many of the most probable tokens are told.
      weights: from `per_layer.split`, without the layers.
      x_PWD: last states of prompts.
      row: the prompt.
      place_C: places of the prompt.
      token_C: the token that follows each.

    Returns:
      Of each place the token's log-probability [C], its rank from 1 [C], and the most probable
      tokens and their log-probabilities [C, most], in falling order.
    """
    logits_CV = decoding.logits_of(decoder.leave(config, weights, x_PWD[row, place_C][:, None]))
    chosen_C1 = jnp.take_along_axis(logits_CV, token_C[:, None], axis=1)
    rank_C = jnp.sum(logits_CV >= chosen_C1, axis=-1, dtype=jnp.int32)
    norm_C1 = jax.nn.logsumexp(logits_CV, axis=-1, keepdims=True)
    best_CK, token_CK = jax.lax.top_k(logits_CV, most)
    return (chosen_C1 - norm_C1)[:, 0], rank_C, token_CK, best_CK - norm_C1
