"""What a model says about given tokens: log-probability and greedy choice, chunk by chunk."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.errors import DataError
from jaxdistill.models import DecoderConfig, Model, decoder
from jaxdistill.sharding import on_mesh
from jaxdistill.types import Outputs

# Numbers of one chunk of logits that may exist at a time; 64 MiB of float32.
CHUNK_NUMBERS = 1 << 24


def over_chunks(
    make: Callable[..., Any], rows: int, vocab: int, length: int, *arrays: Array
) -> Any:
    """`make` of every chunk of positions, one after the other, stacked on a first dim.

    Args:
      make: arrays [B, C, ...] -> a tree.
      rows: B.
      vocab: V.
      length: L; the three choose C.
      *arrays: [B, L, ...], filled up with zeros to whole chunks.

    The batch stays where it lies on the mesh: only positions are cut.
    """
    size = max(1, min(length, CHUNK_NUMBERS // max(1, rows * vocab)))
    count = -(-length // size)

    def cut(array: Array) -> Array:
        room = [(0, 0)] * array.ndim
        room[1] = (0, count * size - length)
        padded = jnp.pad(array, room)
        return padded.reshape(rows, count, size, *array.shape[2:]).swapaxes(0, 1)

    return jax.lax.map(lambda parts: make(*parts), tuple(map(cut, arrays)))


def chunk_logits(hidden_BCD: Array, outputs: Outputs, vocab: int) -> Array:
    """Float32 logits [B, C, V] of the real tokens of the vocabulary."""
    bias = None if outputs.head_bias is None else outputs.head_bias[:vocab]
    part = dataclasses.replace(
        outputs, hidden=hidden_BCD, head=outputs.head[:vocab], head_bias=bias
    )
    return decoder.logits(part)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def token_scores(
    config: DecoderConfig,
    vocab: int,
    dtype: DTypeLike,
    params: Any,
    tokens: Array,
    segment_ids: Array,
    targets: Array,
) -> tuple[Array, Array]:
    """(log-probability [B, L] of every target, whether it is the most probable token [B, L])."""
    outputs = decoder.apply(config, params, tokens, None, segment_ids, compute_dtype=dtype)
    rows, length = tokens.shape

    def make(hidden_BCD, targets_BC):
        logits_BCV = chunk_logits(hidden_BCD, outputs, vocab)
        picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], -1)[..., 0]
        best_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
        return picked_BC - jax.nn.logsumexp(logits_BCV, axis=-1), best_BC

    scores = over_chunks(make, rows, vocab, length, outputs.hidden, targets)
    together = lambda array: array.swapaxes(0, 1).reshape(rows, -1)[:, :length]
    return jax.tree.map(together, scores)


def continuations(
    model: Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    vocab: int,
    batch_size: int = 8,
) -> list[tuple[float, bool]]:
    """Log-probability of each continuation of token ids, and whether greedy decoding writes it.

    A context that is too long for the model loses its beginning.

    Args:
      model: on its devices.
      pairs: (context, continuation).
      vocab: tokens of the tokenizer.
      batch_size: rows at a time.

    Raises:
      DataError: for an empty context or continuation, or a continuation longer than the model.
    """
    limit = model.config.max_positions + 1  # the last token is predicted, and not read
    cut = []
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation or len(continuation) >= limit:
            raise DataError(
                f"pair {number}: needs a context and a continuation of less than {limit} tokens"
            )
        cut.append((list(context)[-(limit - len(continuation)) :], list(continuation)))
    order = sorted(range(len(cut)), key=lambda i: len(cut[i][0]) + len(cut[i][1]))
    results: dict[int, tuple[float, bool]] = {}
    dtype = np.dtype(model.params["embedding"].dtype)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        part = [cut[i] for i in chosen] + [([0], [0])] * (batch_size - len(chosen))
        longest = max(len(context) + len(rest) for context, rest in part)
        width = min(max(16, 1 << (longest - 2).bit_length()), limit - 1)
        rows = np.zeros((3, batch_size, width), np.int32)
        for row, (context, rest) in enumerate(part):
            whole = context + rest
            rows[0, row, : len(whole) - 1], rows[1, row, : len(whole) - 1] = whole[:-1], whole[1:]
            rows[2, row, : len(whole) - 1] = 1
        with on_mesh(model.params):
            scores, best = jax.device_get(
                token_scores(model.config, vocab, dtype, model.params, rows[0], rows[2], rows[1])
            )
        for row, i in enumerate(chosen):
            context, rest = part[row]
            here = slice(len(context) - 1, len(context) + len(rest) - 1)
            total = float(np.sum(scores[row, here], dtype=np.float64))
            results[i] = (total, bool(best[row, here].all()))
    return [results[i] for i in range(len(cut))]
