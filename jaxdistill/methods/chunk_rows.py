"""What two models say at the last token of each chunk of text, a few whole rows at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels.softcap import soft_cap
from jaxdistill.losses import chunk_sums
from jaxdistill.methods.base import Head, Objective, no_parameters
from jaxdistill.methods.chunks import chunk_count, following, per_chunk
from jaxdistill.methods.head_loss import statistics
from jaxdistill.sharding import BATCH_AXES, current_mesh, present
from jaxdistill.types import Batch, Mean, Outputs

_ROW_NUMBERS = 2**24  # of both models' rows that exist at one time, where no chunk is given


class ChunkSide(NamedTuple):
    """One model at the last token of every chunk.

        log q(v at the last place, the chunk's earlier tokens before it) = scale + log_softmax(row)

    Attributes:
      hidden: [B, C, D], that predicts the chunk's last token.
      head: [V, D], tokens alone.
      bias: [V] or None.
      softcap: of the logits, or None.
      scale: float32 [B, C], log-likelihood of the chunk's earlier tokens; 0 where there are none.
    """

    hidden: Array
    head: Array
    bias: Array | None
    softcap: float | None
    scale: Array

    def rows(self, hidden: Array, scale: Array) -> Array:
        """float32 [..., V], log-probabilities of some chunks' last places."""
        head = _placed(self.head.astype(hidden.dtype))
        logits = jnp.einsum("bcd,vd->bcv", hidden, head, preferred_element_type=jnp.float32)
        logits = _placed(logits, rows=True)
        if self.bias is not None:
            logits += self.bias.astype(jnp.float32)
        logits = soft_cap(logits, self.softcap)
        return jax.nn.log_softmax(logits, axis=-1) + scale[..., None]


def _student(head: Head, outputs: Outputs, batch: Batch) -> tuple[ChunkSide, Mean]:
    """The student, and the cross-entropy of all that its loss counts."""
    assert batch.groups is not None, "the method has a second view"
    side, picked = _side(
        head, head["vocab"], outputs, batch.targets, batch.groups, batch.mask, chunk_count(batch)
    )
    total = -jnp.sum(jnp.where(batch.mask, picked, 0.0))
    return side, Mean(total, jnp.sum(batch.mask.astype(jnp.float32)))


def _teacher(head: Head, vocab: int, outputs: Outputs, batch: Batch) -> ChunkSide:
    """The teacher, in its own tokens; `vocab` are the rows of its head that are tokens."""
    view = batch.second
    groups, nothing = view["groups"], jnp.zeros(view["groups"].shape, bool)
    targets = following(view["tokens"])
    return _side(head, vocab, outputs, targets, groups, nothing, chunk_count(batch))[0]


def _side(
    head: Head,
    vocab: int,
    outputs: Outputs,
    targets: Array,
    groups: Array,
    mask: Array,
    count: int,
) -> tuple[ChunkSide, Array]:
    """One model, and log q of each target [B, L]; 0 where nothing is asked."""
    rows, bias = outputs.head[:vocab], outputs.head_bias
    bias = None if bias is None else bias[:vocab]
    predicted = following(groups)
    last = (predicted > 0) & (predicted != following(predicted))
    earlier = (predicted > 0) & ~last
    said = statistics({**head, "vocab": vocab}, outputs, targets, mask | earlier)
    assert said.logprobs is not None, "they are asked for"
    scale = chunk_sums(said.logprobs, jnp.where(earlier, predicted, 0), count)
    places = jnp.broadcast_to(jnp.arange(groups.shape[1]), groups.shape)
    where = chunk_sums(places, jnp.where(last, predicted, 0), count).astype(jnp.int32)
    # Rows are sorted and taken apart: on a mesh each device has whole ones, of its own texts.
    every = _placed(outputs.hidden, rows=True)
    hidden = jax.vmap(lambda row, at: row[at])(every, where)
    return ChunkSide(hidden, rows, bias, outputs.softcap, scale), said.logprobs


def _placed(values: Array, rows: bool = False) -> Array:
    """An array whose first dim is divided as the rows of a batch are, or not; no other dim is."""
    mesh = current_mesh()
    if mesh is None:
        return values
    place = jax.P(present(BATCH_AXES, mesh)) if rows else jax.P()
    return jax.lax.with_sharding_constraint(values, place)


def compared(
    divergence: Callable[[Array, Array], Array], head: Head, teacher_vocab: int
) -> Objective:
    """alpha * CE + (1 - alpha) * mean over chunks of a divergence; knobs: alpha.

    Args:
      divergence: (log-probabilities of the student [B, c, V], the teacher's [B, c, W]) -> [B, c].
      head: see `Head`; vocab is the student's.
      teacher_vocab: rows of the teacher's head that are tokens.
    """

    def prepare(batch):
        return {"per_chunk": per_chunk(batch)}

    def apply(params, student, signal, batch, knobs):
        share = knobs if "per_chunk" in knobs else prepare(batch)
        ours, ce = _student(head, student, batch)
        theirs = _teacher(head, teacher_vocab, signal.outputs, batch)
        groups = batch.second["groups"]
        there = chunk_sums(jnp.ones(groups.shape), groups, chunk_count(batch)) > 0
        total = summed(divergence, ours, theirs, there, head.get("chunk"))
        alpha, chunks = knobs["alpha"], jnp.sum(there.astype(jnp.float32))
        whole = alpha * ce.total + (1 - alpha) * share["per_chunk"] * total
        means = {"loss/ce": ce, "loss/divergence": Mean(total, chunks)}
        return {"loss": Mean(whole, ce.count), **means}

    return Objective(no_parameters, apply, prepare=prepare, token_means=False)


def summed(
    loss: Callable[[Array, Array], Array],
    student: ChunkSide,
    teacher: ChunkSide,
    counted: Array,
    chunk: int | None,
) -> Array:
    """The sum of a loss over chunks; rows [B, few, V] exist for a few of them at a time.

    Args:
      loss: (log-probabilities of the student [B, c, V], the teacher's [B, c, W]) -> [B, c].
      student: see `ChunkSide`.
      teacher: a constant.
      counted: bool [B, C].
      chunk: how many chunks' rows of each model exist at a time; None chooses.
    """
    rows, count = counted.shape
    size = rows * (student.head.shape[0] + teacher.head.shape[0])
    few = max(1, chunk // rows) if chunk else max(1, _ROW_NUMBERS // size)
    parts = -(-count // min(few, count))
    few = -(-count // parts)

    def split(values: Array) -> Array:
        missing = [(0, 0), (0, parts * few - count)] + [(0, 0)] * (values.ndim - 2)
        values = jnp.pad(values, missing)
        return values.reshape(rows, parts, few, *values.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def of_part(sides: tuple[ChunkSide, ChunkSide], part: Any) -> Array:
        (ours, our_scale), (theirs, their_scale), here = part
        q = sides[0].rows(ours, our_scale)
        p = jax.lax.stop_gradient(sides[1].rows(theirs, their_scale))
        return jnp.sum(jnp.where(here, loss(q, p), 0.0))

    def body(total: Array, part: Any) -> tuple[Array, None]:
        return total + of_part((student, teacher), part), None

    each = [(side.hidden, side.scale) for side in (student, teacher)]
    split_up = jax.tree.map(split, (*each, counted))
    return jax.lax.scan(body, jnp.float32(0.0), split_up)[0]
