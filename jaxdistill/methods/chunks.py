"""How likely chunks of text are to two models that cut it into different tokens."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.losses import chunk_sums
from jaxdistill.methods.base import Head
from jaxdistill.methods.head_loss import statistics
from jaxdistill.types import Batch, Mean, Outputs


class Likelihoods:
    """Log-likelihoods of the chunks of a batch, from hidden states and heads.

        log q(chunk) + log q(a word begins, or the text ends, behind it)

    Args:
      opening: ids that can follow the end of a word, rising, of the student and of the teacher.
      teacher_vocab: rows of the teacher's head that are tokens.
      head: see `Head`; vocab is the student's.
    """

    def __init__(
        self, opening: tuple[tuple[int, ...], tuple[int, ...]], teacher_vocab: int, head: Head
    ):
        self._opening = [np.asarray(one, np.int32) for one in opening]
        self._heads = head, {**head, "vocab": teacher_vocab}

    def student(self, outputs: Outputs, batch: Batch) -> tuple[Array, Mean]:
        """(float32 [B, C] of the chunks, the cross-entropy of all that the loss counts)."""
        assert batch.groups is not None, "the method has a second view"
        chunks, picked = self._chunks(
            0, outputs, batch.targets, batch.groups, batch.mask, chunk_count(batch)
        )
        total = -jnp.sum(jnp.where(batch.mask, picked, 0.0))
        return chunks, Mean(total, jnp.sum(batch.mask.astype(jnp.float32)))

    def teacher(self, outputs: Outputs, batch: Batch) -> tuple[Array, Array]:
        """(float32 [B, C] of the chunks, float32 [B, C] how many of its tokens each has)."""
        view, count = batch.second, chunk_count(batch)
        groups = view["groups"]
        nothing = jnp.zeros(groups.shape, bool)
        chunks, _ = self._chunks(1, outputs, following(view["tokens"]), groups, nothing, count)
        return chunks, chunk_sums(jnp.ones(groups.shape, jnp.float32), groups, count)

    def _chunks(
        self, side: int, outputs: Outputs, targets: Array, groups: Array, mask: Array, count: int
    ) -> tuple[Array, Array]:
        """Of the chunks [B, C], and log q of each target [B, L]; 0 where nothing is asked."""
        predicted = following(groups)
        ends = jnp.where(groups != predicted, groups, 0)  # the last token of a chunk is read here
        asked = mask | (predicted > 0) | (ends > 0)
        said = statistics(self._heads[side], outputs, targets, asked, sets=[self._opening[side]])
        assert said.logprobs is not None and said.log_masses is not None, "both are asked for"
        chunks = chunk_sums(said.logprobs, predicted, count)
        return chunks + chunk_sums(said.log_masses[..., 0], ends, count), said.logprobs


def following(values: Array) -> Array:
    """What stands at the next place of each row [B, L]; 0 behind the last."""
    return jnp.pad(values[:, 1:], [(0, 0), (0, 1)])


def chunk_count(batch: Batch) -> int:
    """C, the most chunks that a row can have."""
    assert batch.groups is not None, "the method has a second view"
    return min(batch.groups.shape[1], batch.second["groups"].shape[1])


def per_chunk_token(batch: Batch) -> Array:
    """Tokens that the student's loss counts, for each of the teacher's in chunks.

    What a sum over the teacher's tokens is multiplied by, so that it and a sum over the student's
    are divided by one number, and parts of a batch can be added.
    """
    return _tokens_for_each(batch, batch.second["groups"] > 0)


def per_chunk(batch: Batch) -> Array:
    """Tokens that the student's loss counts, for each chunk; see `per_chunk_token`."""
    groups = batch.second["groups"]
    return _tokens_for_each(batch, (groups > 0) & (groups != following(groups)))


def _tokens_for_each(batch: Batch, places: Array) -> Array:
    tokens, count = (jnp.sum(one.astype(jnp.float32)) for one in (batch.mask, places))
    return tokens / jnp.maximum(count, 1.0)
