"""The walk over chunks of a device's tokens: sums of the loss, and gradients on the way forward.

For 7 tokens in chunks of 3, a vocabulary V and hidden states of width D:

    hidden [7, D]    chunk    logits             adds to            writes
    0 1 2 . . . .      0      [3, V]  --+-->  sums, d head [V, D]   d hidden 0 1 2
    . . . 3 4 5 .      1      [3, V]  --+-->  sums, d head          d hidden 3 4 5
    . . . . . . 6 0 0  2      [3, V]  --+-->  sums, d head          d hidden 6

A chunk's logits are made, used for value and gradient, and forgotten: [7, V] never exists. The last
chunk is padded with tokens of weight 0. The way back multiplies the gradients by the cotangent.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels.linear_divergence import chunk as chunks
from jaxdistill.kernels.linear_divergence.chunk import Operands, Static, Wanted
from jaxdistill.kernels.operands import VocabularyShard

Gradients = dict[str, Array]
HEADS = ("student_head", "student_bias", "teacher_head", "teacher_bias")
PER_TOKEN = ("student_hidden", "teacher_hidden", "labels", "weights")


def walk(
    static: Static, wanted: Wanted, operands: Operands, vocab_axes: tuple[str, ...]
) -> tuple[dict[str, Array], Gradients]:
    """Sums over a device's tokens on its rows of the heads, and the wanted gradients by name."""
    rows = operands.student_head.shape[0]
    operands, shard = _with_tiles(static, operands, vocab_axes)
    dims = operands.student_hidden.shape[:-1]
    scalar_t = operands.coefficients.has_scalar_temperature
    per_token = {name: getattr(operands, name) for name in PER_TOKEN}
    if not scalar_t:
        per_token["temperature"] = operands.coefficients.temperature
    per_token = {
        name: array.reshape(-1, *array.shape[len(dims) :])
        for name, array in per_token.items()
        if array is not None
    }
    tokens = per_token["student_hidden"].shape[0]
    per_token = {name: _in_chunks(name, array, static.chunk) for name, array in per_token.items()}
    # One cast for all chunks; without it every chunk would read the float32 master copy.
    operands = operands._replace(
        student_head=operands.student_head.astype(operands.student_hidden.dtype),
        teacher_head=None
        if operands.teacher_head is None or operands.teacher_hidden is None
        else operands.teacher_head.astype(operands.teacher_hidden.dtype),
    )
    totals: Gradients = {}
    if wanted.head:
        totals["student_head"] = jnp.zeros(operands.student_head.shape, jnp.float32)
    if wanted.bias:
        totals["student_bias"] = jnp.zeros(operands.student_head.shape[0], jnp.float32)
    if wanted.temperature and scalar_t:
        totals["temperature"] = jnp.float32(0)

    def body(totals, of_chunk):
        temperature = of_chunk.pop("temperature", operands.coefficients.temperature)
        coefficients = operands.coefficients._replace(temperature=temperature)
        here = operands._replace(**of_chunk, coefficients=coefficients)
        sums, gradients = chunks.run(static, wanted, here, shard)
        written = {name: gradients.pop(name) for name in list(gradients) if name not in totals}
        return {name: totals[name] + gradients[name] for name in totals}, (sums, written)

    totals, (sums, written) = jax.lax.scan(body, totals, per_token)
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    for name, array in written.items():
        flat = array.reshape(-1, *array.shape[2:])[:tokens]
        totals[name] = flat.reshape(*dims, *flat.shape[1:])
    for name in ("student_head", "student_bias"):
        if name in totals:
            totals[name] = totals[name][:rows]
    return sums, totals


def _with_tiles(
    static: Static, operands: Operands, vocab_axes: tuple[str, ...]
) -> tuple[Operands, VocabularyShard]:
    """Heads padded to whole tiles, and which of their rows are tokens."""
    rows = operands.student_head.shape[0]
    offset = jax.lax.axis_index(vocab_axes) * rows if vocab_axes else 0
    operands = pad_vocabulary(operands, static.tile)
    uneven = bool(vocab_axes) and static.vocab < rows * jax.lax.axis_size(vocab_axes)
    here = jnp.clip(static.vocab - offset, 0, rows) if uneven else rows
    padded = uneven or operands.student_head.shape[0] > rows
    return operands, VocabularyShard(vocab_axes, offset, here, padded)


def pad_vocabulary(operands: Operands, multiple: int) -> Operands:
    """Heads whose rows are a multiple of something; `VocabularyShard.size` says which are real."""
    extra = -operands.student_head.shape[0] % multiple
    if not extra:
        return operands
    padded: dict[str, Any] = {
        name: jnp.pad(array, ((0, extra), (0, 0))[: array.ndim])
        for name in HEADS
        if (array := getattr(operands, name)) is not None
    }
    return operands._replace(**padded)


def _in_chunks(name: str, array: Array, chunk: int) -> Array:
    """[tokens, ...] as [pieces, chunk, ...], padded with tokens of weight 0."""
    pieces = -(-len(array) // chunk)
    width = ((0, pieces * chunk - len(array)),) + ((0, 0),) * (array.ndim - 1)
    # A temperature is a divisor, so it is padded with 1.
    padded = jnp.pad(array, width, constant_values=1 if name == "temperature" else 0)
    return padded.reshape(pieces, chunk, *array.shape[1:])
