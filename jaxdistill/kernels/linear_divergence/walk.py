"""The walk over chunks of a device's tokens: sums of the loss, and gradients on the way forward.

For 7 tokens in chunks of 3, a vocabulary V and hidden states of width D:

    hidden [7, D]    chunk    logits             adds to            writes
    0 1 2 . . . .      0      [3, V]  --+-->  sums, d head [V, D]   d hidden 0 1 2
    . . . 3 4 5 .      1      [3, V]  --+-->  sums, d head          d hidden 3 4 5
    . . . . . . 6 0 0  2      [3, V]  --+-->  sums, d head          d hidden 6

A chunk's logits are made, used for value and gradient, and forgotten: [7, V] never exists. The last
chunk is padded with tokens of weight 0. The way back multiplies the gradients by the cotangent.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels.linear_divergence import chunk as chunks
from jaxdistill.kernels.linear_divergence.chunk import Operands, Static, WantedGradients
from jaxdistill.kernels.operands import VocabularyShard

Gradients = dict[str, Array]
HEADS = ("student_head", "student_bias", "teacher_head", "teacher_bias", "sets")
PER_TOKEN = ("student_hidden", "teacher_hidden", "labels", "weights", "ids", "known")


class Pieces(NamedTuple):
    """A device's tokens cut into chunks.

    Attributes:
      static: whose chunk and group fit the tokens.
      operands: with heads in the dtype of the products, padded to whole tiles.
      shards: the rows of the student's and the teacher's head that are tokens.
      per_token: by name, [pieces, chunk, ...] each.
      dims: leading dims of what is per token.
      rows: of the student's head, without padding.
    """

    static: Static
    operands: Operands
    shards: tuple[VocabularyShard, VocabularyShard]
    per_token: dict[str, Any]
    dims: tuple[int, ...]
    rows: int

    def of(self, per_token: dict[str, Any]) -> Operands:
        """The operands of one chunk."""
        temperature = per_token.get("temperature", self.operands.coefficients.temperature)
        coefficients = self.operands.coefficients._replace(temperature=temperature)
        here = {name: per_token[name] for name in PER_TOKEN if name in per_token}
        return self.operands._replace(**here, coefficients=coefficients)

    def join(self, array: Array) -> Array:
        """[pieces, chunk, ...] of all chunks as [*dims, ...], without the padding."""
        flat = array.reshape(-1, *array.shape[2:])[: math.prod(self.dims)]
        return flat.reshape(*self.dims, *flat.shape[1:])

    def zeros(self, wanted: WantedGradients) -> Gradients:
        """What the gradients that all tokens share are added to, by name."""
        head = self.operands.student_head
        totals: Gradients = {}
        if wanted.head:
            # A zero of its own: XLA keeps one array of zeros for all that begin as such, and
            # would hold it beside this sum until the last of them begins.
            zero = jax.lax.optimization_barrier(jnp.float32(0))
            totals["student_head"] = jnp.full(head.shape, zero)
        if wanted.bias:
            totals["student_bias"] = jnp.zeros(head.shape[0], jnp.float32)
        if wanted.temperature and self.operands.coefficients.has_scalar_temperature:
            totals["temperature"] = jnp.float32(0)
        return totals

    def finish(self, totals: Gradients, written: Gradients) -> Gradients:
        """All gradients of the device's tokens, from sums over chunks and what each chunk wrote."""
        totals = totals | {name: self.join(array) for name, array in written.items()}
        for name in ("student_head", "student_bias"):
            if name in totals:
                totals[name] = totals[name][: self.rows]
        return totals


def cut(
    static: Static, operands: Operands, vocab_axes: tuple[str, ...], more: dict[str, Any]
) -> Pieces:
    """A device's tokens in chunks, the last one padded with tokens of weight 0.

    Args:
      static: of the call.
      operands: this device's tokens and rows of the heads.
      vocab_axes: that share the heads' rows.
      more: arrays per token beside the operands, by name.
    """
    rows = operands.student_head.shape[0]
    operands, shards = _with_tiles(static, operands, vocab_axes)
    dims = operands.student_hidden.shape[:-1]
    per_token = {name: getattr(operands, name) for name in PER_TOKEN} | more
    if not operands.coefficients.has_scalar_temperature:
        per_token["temperature"] = operands.coefficients.temperature
    flat = lambda array: array.reshape(-1, *array.shape[len(dims) :])
    per_token = {
        name: jax.tree.map(
            lambda array, name=name: _in_chunks(name, flat(array), static.chunk), arrays
        )
        for name, arrays in per_token.items()
        if arrays is not None
    }
    # One cast for all chunks; without it every chunk would read the float32 master copy.
    operands = operands._replace(
        student_head=operands.student_head.astype(operands.student_hidden.dtype),
        teacher_head=None
        if operands.teacher_head is None or operands.teacher_hidden is None
        else operands.teacher_head.astype(operands.teacher_hidden.dtype),
    )
    return Pieces(static, operands, shards, per_token, dims, rows)


def walk(
    static: Static, wanted: WantedGradients, operands: Operands, vocab_axes: tuple[str, ...]
) -> tuple[dict[str, Array], Gradients]:
    """Sums over a device's tokens on its rows of the heads, and the wanted gradients by name."""
    pieces = cut(static, operands, vocab_axes, {})

    def body(totals, of_chunk):
        sums, gradients = chunks.run(pieces.static, wanted, pieces.of(of_chunk), pieces.shards)
        written = {name: gradients.pop(name) for name in list(gradients) if name not in totals}
        return {name: totals[name] + gradients[name] for name in totals}, (sums, written)

    totals, (sums, written) = jax.lax.scan(body, pieces.zeros(wanted), pieces.per_token)
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    return sums, pieces.finish(totals, written)


def _with_tiles(
    static: Static, operands: Operands, vocab_axes: tuple[str, ...]
) -> tuple[Operands, tuple[VocabularyShard, VocabularyShard]]:
    """Heads padded to whole tiles, and which of their rows are tokens."""
    padded = pad_vocabulary(operands, static.tile)

    def shard(head: Array | None, tiles: Array | None, vocab: int) -> VocabularyShard | None:
        if head is None or tiles is None:
            return None
        rows = head.shape[0]
        offset = jax.lax.axis_index(vocab_axes) * rows if vocab_axes else 0
        uneven = bool(vocab_axes) and vocab < rows * jax.lax.axis_size(vocab_axes)
        here = jnp.clip(vocab - offset, 0, rows) if uneven else rows
        return VocabularyShard(vocab_axes, offset, here, uneven or tiles.shape[0] > rows)

    student = shard(operands.student_head, padded.student_head, static.vocabularies[0])
    teacher = shard(operands.teacher_head, padded.teacher_head, static.vocabularies[1])
    assert student is not None, "every call has a student"
    return padded, (student, teacher or student)


def pad_vocabulary(operands: Operands, multiple: int) -> Operands:
    """Heads whose rows are a multiple of something; `VocabularyShard.size` says which are real."""
    padded: dict[str, Any] = {
        name: jnp.pad(array, ((0, -array.shape[0] % multiple), (0, 0))[: array.ndim])
        for name in HEADS
        if (array := getattr(operands, name)) is not None and array.shape[0] % multiple
    }
    return operands._replace(**padded)


def _in_chunks(name: str, array: Array, chunk: int) -> Array:
    """[tokens, ...] as [pieces, chunk, ...], padded with tokens of weight 0."""
    pieces = -(-len(array) // chunk)
    width = ((0, pieces * chunk - len(array)),) + ((0, 0),) * (array.ndim - 1)
    # A temperature is a divisor, so it is padded with 1.
    padded = jnp.pad(array, width, constant_values=1 if name == "temperature" else 0)
    return padded.reshape(pieces, chunk, *array.shape[1:])
