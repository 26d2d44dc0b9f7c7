"""What a teacher says about a batch, in the numbers that are stored of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxdistill.data.teacher_cache import formats
from jaxdistill.data.teacher_cache.formats import HIDDEN, TOPK, Format
from jaxdistill.evaluate.scoring import chunk_logits, over_chunks
from jaxdistill.models import DecoderConfig, decoder
from jaxdistill.sharding import BATCH_AXES, present
from jaxdistill.types import Batch, Outputs

KEYS = "keys"
_BLOCK = 512  # of a running sum: a plain one over a large vocabulary loses the small tokens


def step(
    config: DecoderConfig,
    form: Format,
    mesh: Mesh,
    *,
    compute_dtype: DTypeLike,
    attention: str | None = None,
) -> Callable[[Any, Batch], dict[str, Array]]:
    """step(params, batch) -> arrays [B, L, ...] that `finish` makes the stored fields of.

    Args:
      config: of the teacher.
      form: what is stored.
      mesh: of parameters and batch.
      compute_dtype: of the teacher's activations.
      attention: one of `attention.IMPLEMENTATIONS`; None is "auto".

    The batch's `teacher` is {KEYS: uint32 [B, L]}, a number for every segment, which with its
    positions seeds the draws. Every process gets whole rows.
    """

    def answers(params: Any, batch: Batch) -> dict[str, Array]:
        outputs = decoder.apply(
            config,
            params,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            compute_dtype=compute_dtype,
            attention=attention,
        )
        if form.name == HIDDEN:
            return {"hidden": outputs.hidden}
        return of_outputs(form, outputs, batch.positions, batch.teacher[KEYS])

    rows = NamedSharding(mesh, PartitionSpec(present(BATCH_AXES, mesh)))
    return jax.jit(answers, out_shardings=rows)


def of_outputs(form: Format, outputs: Outputs, positions: Array, keys: Array) -> dict[str, Array]:
    """`topk` or `sampled` of hidden states and head; one chunk of logits exists at a time."""
    rows, length = positions.shape
    make = _topk if form.name == TOPK else _sampled

    def chunk(hidden_BCD: Array, positions_BC: Array, keys_BC: Array) -> dict[str, Array]:
        logits_BCV = chunk_logits(hidden_BCD, outputs, form.vocab)
        return make(form, jax.nn.log_softmax(logits_BCV, axis=-1), positions_BC, keys_BC)

    arrays = (outputs.hidden, positions, keys)
    parts = over_chunks(chunk, rows, form.vocab, length, *arrays)
    whole = lambda a: a.swapaxes(0, 1).reshape(rows, -1, *a.shape[3:])[:, :length]
    return jax.tree.map(whole, parts)


def _topk(form: Format, logp_BCV: Array, positions: Array, keys: Array) -> dict[str, Array]:
    """The K likeliest, and the sums over the others, which no difference from 1 would give."""
    top_BCK, ids_BCK = jax.lax.top_k(logp_BCV, form.k)
    other_BCV = jnp.put_along_axis(logp_BCV, ids_BCK, -jnp.inf, axis=-1, inplace=False)
    answers = {"ids": ids_BCK, "logprobs": top_BCK}
    log_z = [jax.nn.logsumexp(logp_BCV / t, axis=-1) for t in form.temperatures]
    rest = [jnp.sum(jnp.exp(other_BCV), axis=-1)]
    for t, log_z_BC in zip(form.temperatures, log_z, strict=True):
        rest.append(jnp.sum(jnp.exp(other_BCV / t - log_z_BC[..., None]), axis=-1))
    answers["rest"] = jnp.stack(rest, axis=-1)
    return answers | ({"log_z": jnp.stack(log_z, axis=-1)} if log_z else {})


def _sampled(form: Format, logp_BCV: Array, positions: Array, keys: Array) -> dict[str, Array]:
    """Draws with replacement, the same for a segment's position wherever it lies."""
    p_BCV = jnp.exp(logp_BCV)
    entropy_BC = -jnp.sum(jnp.where(p_BCV > 0, p_BCV * logp_BCV, 0.0), axis=-1)
    root = jax.random.key(form.seed)

    def one(p_V: Array, position: Array, key: Array) -> Array:
        stream = jax.random.fold_in(jax.random.fold_in(root, key), position)
        return draw(p_V, stream, form.draws * form.k)

    ids_BCN = jax.vmap(jax.vmap(one))(p_BCV, positions, keys)
    ids = ids_BCN.reshape(*ids_BCN.shape[:2], form.draws, form.k)
    return {"ids": ids, "entropy": entropy_BC[..., None]}


def draw(p_V: Array, key: Array, count: int) -> Array:
    """int32 [count], tokens drawn from p [V], by its running sum in blocks.

    A token's share is exact to 2^-23 of the whole.
    """
    vocab = p_V.shape[0]
    blocks = jnp.pad(p_V, (0, -vocab % _BLOCK)).reshape(-1, _BLOCK)
    inner = jnp.cumsum(blocks, axis=1)
    before = jnp.cumsum(inner[:, -1]) - inner[:, -1]
    running_V = (inner + before[:, None]).reshape(-1)[:vocab]
    # Rounding may let a block begin below the end of the one before it.
    running_V = jax.lax.cummax(running_V)
    at = jax.random.uniform(key, (count,)) * running_V[-1]
    return jnp.minimum(jnp.searchsorted(running_V, at, side="right"), vocab - 1).astype(jnp.int32)


def finish(form: Format, answers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The fields of a format, of what `step` gave for some positions [N, ...]."""
    if form.name == HIDDEN:
        if form.dtype == "int8":
            hidden, scale = formats.quantised(answers["hidden"])
            return {"hidden": hidden, "scale": scale}
        return {"hidden": answers["hidden"].astype(np.dtype(form.dtype))}
    if form.name == TOPK:
        fields = form.fields()
        packed = {"ids": formats.pack_ids(answers["ids"], form.id_bytes)}
        others = {n: answers[n].astype(fields[n][0]) for n in fields if n != "ids"}
        return packed | others
    ids, counts = counted(answers["ids"], form.fields()["counts"][1][-1])
    return {
        "ids": formats.pack_ids(ids, form.id_bytes),
        "counts": counts.astype(form.fields()["counts"][0]),
        "entropy": answers["entropy"].astype(np.float16),
    }


def counted(drawn: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws [..., N] as different ids and their counts [..., width], 0 where there are no more."""
    order = np.sort(drawn, axis=-1)
    new = np.ones(order.shape, bool)
    new[..., 1:] = order[..., 1:] != order[..., :-1]
    place = np.cumsum(new, axis=-1) - 1
    ids = np.zeros((*drawn.shape[:-1], width), order.dtype)
    counts = np.zeros(ids.shape, np.int64)
    np.put_along_axis(ids, place, order, axis=-1)
    first = np.arange(place[..., 0].size)[:, None] * width
    flat = first + place.reshape(-1, place.shape[-1])
    np.add.at(counts.reshape(-1), flat.reshape(-1), 1)
    return ids, counts
