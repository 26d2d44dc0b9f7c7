"""The walk over chunks of tokens, on one device or on a mesh that shares tokens or vocabulary.

On a mesh every device sees some tokens and some rows of both heads. Where the tokens are fewer than
the vocabulary's rows it is cheaper to bring tokens together than heads: each device then keeps its
rows of the heads, the devices exchange a few numbers per token, and no head crosses the mesh.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import head_chunk
from jaxdistill.kernels.head_chunk import Operands, Plan, Wanted
from jaxdistill.kernels.row_loss import Vocabulary
from jaxdistill.sharding import BATCH_AXES, AnyMesh

PER_TOKEN = ("student_hidden", "teacher_hidden", "labels", "weights", "temperature")
_HEADS = ("student_head", "student_bias", "teacher_head", "teacher_bias")
Gradients = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a mesh share what.

    Attributes:
      mesh: of the devices, or None.
      tokens: for each leading dim of the hidden states, the axes that divide it.
      vocab: axes that divide the heads' rows.
    """

    mesh: AnyMesh | None = None
    tokens: tuple[tuple[str, ...], ...] = ((),)
    vocab: tuple[str, ...] = ()

    def size(self, axes: tuple[str, ...]) -> int:
        """Devices along these axes; 1 without a mesh, for there each call is one device's."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """All axes that divide tokens."""
        return tuple(axis for axes in self.tokens for axis in axes)


def layout(
    mesh: AnyMesh | None,
    dims: tuple[int, ...],
    vocab: int,
    whole_rows: bool,
    vocab_axes: tuple[str, ...] = (),
) -> Layout:
    """The cheapest layout for tokens of these leading dims.

    Args:
      mesh: or None.
      dims: (N,) or (B, L).
      vocab: rows of the heads.
      whole_rows: whether the divergence needs every logit of a row on one device.
      vocab_axes: without a mesh, axes of a shard_map around the call that share the heads' rows.

    Raises:
      ConfigError: if the mesh does not divide the tokens, or whole rows are asked of shared ones.
    """
    if vocab_axes and (mesh is not None or whole_rows):
        raise ConfigError(
            f"vocab_axes = {vocab_axes}: for calls inside a shard_map, so without mesh, and for "
            "named kinds alone: a function needs whole rows"
        )
    if mesh is None:
        return Layout(tokens=((),) * len(dims), vocab=vocab_axes)
    shape = mesh.shape
    batch, length = BATCH_AXES, ("context",)
    shared: tuple[str, ...] = ()
    if whole_rows:
        # The tensor axis shares tokens too, where it divides them; else its devices do the same.
        last = shape["tensor"] * (
            shape["context"] if len(dims) == 2 else shape["data"] * shape["fsdp"]
        )
        if dims[-1] % last == 0 and len(dims) == 2:
            length = (*length, "tensor")
        elif dims[-1] % last == 0:
            batch = (*batch, "tensor")
    else:
        shared = tuple(axis for axis in ("tensor",) if shape[axis] > 1)
        in_a_group = math.prod(dims) // (shape["data"] * shape["context"])
        if shape["fsdp"] > 1 and in_a_group <= vocab // shape["tensor"]:
            batch, shared = ("data",), ("fsdp", *shared)
    found = Layout(mesh, (batch, length)[: len(dims)], shared)
    # All devices divide the tokens in the end, whichever way they are laid out for the loss.
    whole = Layout(mesh, ((BATCH_AXES if "fsdp" in shared else batch), length)[: len(dims)])
    for dim, axes in zip(dims, whole.tokens, strict=True):
        if dim % whole.size(axes):
            raise ConfigError(
                f"hidden states of {list(dims)} tokens do not divide over the mesh: {dim} is no "
                f"multiple of {' * '.join(axes)} = {whole.size(axes)}"
            )
    return found


def on_mesh(
    plan: Plan, place: Layout, wanted: Wanted, operands: Operands
) -> tuple[dict[str, Array], Gradients]:
    """Sums over all tokens, and the gradients of the summed loss that are wanted."""
    if place.mesh is None:
        sums, gradients = _walk(plan, wanted, operands, place.vocab)
        if "student_hidden" in gradients and place.vocab:
            summed = jax.lax.psum(gradients["student_hidden"], place.vocab)
            gradients["student_hidden"] = summed.astype(operands.student_hidden.dtype)
        return sums, gradients
    tokens = PartitionSpec(*(axes or None for axes in place.tokens))
    heads, whole = PartitionSpec(place.vocab or None), PartitionSpec()
    per_token_t = operands.temperature.ndim > 0
    is_per_token = lambda name: name in PER_TOKEN and (name != "temperature" or per_token_t)
    specs = Operands._make(
        None
        if leaf is None
        else tokens
        if is_per_token(name)
        else heads
        if name in _HEADS
        else whole
        for name, leaf in zip(Operands._fields, operands, strict=True)
    )
    fsdp_tokens = "fsdp" in place.token_axes
    split_head = fsdp_tokens and operands.student_head.shape[1] % place.mesh.shape["fsdp"] == 0

    def local(operands: Operands):
        sums, gradients = _walk(plan, wanted, operands, place.vocab)
        sums = jax.lax.psum(sums, place.token_axes)
        if "student_head" in gradients:
            gradients["student_head"] = _sum_head(gradients["student_head"], place, split_head)
        if "student_bias" in gradients:
            gradients["student_bias"] = jax.lax.psum(gradients["student_bias"], place.token_axes)
        if "temperature" in gradients and not per_token_t:
            gradients["temperature"] = jax.lax.psum(gradients["temperature"], place.token_axes)
        if "student_hidden" in gradients and place.vocab:
            summed = _sum_hidden(gradients["student_hidden"], place)
            gradients["student_hidden"] = summed.astype(operands.student_hidden.dtype)
        return sums, gradients

    after = list(place.tokens)
    if "fsdp" in place.vocab:  # the sum over fsdp leaves each device with its own rows
        after[0] = BATCH_AXES
    out = {
        "student_hidden": PartitionSpec(*(axes or None for axes in after)),
        "student_head": PartitionSpec(place.vocab or None, "fsdp" if split_head else None),
        "student_bias": heads,
        "temperature": tokens if per_token_t else whole,
    }
    asked = {name: out[name] for name in out if getattr(wanted, name.removeprefix("student_"))}
    return jax.shard_map(
        local, mesh=place.mesh, in_specs=(specs,), out_specs=(whole, asked), check_vma=False
    )(operands)


def _sum_head(gradient: Array, place: Layout, split: bool) -> Array:
    """Adds the devices' head gradients, leaving each with its slice of D where that divides."""
    if not split:
        return jax.lax.psum(gradient, place.token_axes)
    gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=1, tiled=True)
    return jax.lax.psum(gradient, tuple(axis for axis in place.token_axes if axis != "fsdp"))


def _sum_hidden(gradient: Array, place: Layout) -> Array:
    """Adds the parts of the vocabulary; over fsdp each device keeps its own tokens alone."""
    if "fsdp" in place.vocab:
        gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=0, tiled=True)
    rest = tuple(axis for axis in place.vocab if axis != "fsdp")
    return jax.lax.psum(gradient, rest) if rest else gradient


def pad_vocabulary(operands: Operands, multiple: int) -> Operands:
    """Heads whose rows are a multiple of something; `Vocabulary.rows` says which are real."""
    extra = -operands.student_head.shape[0] % multiple
    if not extra:
        return operands
    padded: dict[str, Any] = {
        name: jnp.pad(array, ((0, extra), (0, 0))[: array.ndim])
        for name in _HEADS
        if (array := getattr(operands, name)) is not None
    }
    return operands._replace(**padded)


def _walk(
    plan: Plan, wanted: Wanted, operands: Operands, vocab_axes: tuple[str, ...]
) -> tuple[dict[str, Array], Gradients]:
    """Scans over chunks of a device's tokens, on its rows of the heads."""
    rows = operands.student_head.shape[0]
    offset = jax.lax.axis_index(vocab_axes) * rows if vocab_axes else 0
    operands = pad_vocabulary(operands, plan.tile)
    uneven = bool(vocab_axes) and plan.vocab < rows * jax.lax.axis_size(vocab_axes)
    here = jnp.clip(plan.vocab - offset, 0, rows) if uneven else rows
    padded = uneven or operands.student_head.shape[0] > rows
    vocabulary = Vocabulary(vocab_axes, offset, here, padded)
    dims = operands.student_hidden.shape[:-1]
    per_token_t = operands.temperature.ndim > 0
    split = {name: getattr(operands, name) for name in PER_TOKEN}
    if not per_token_t:
        split.pop("temperature")
    split = {
        name: array.reshape(-1, *array.shape[len(dims) :])
        for name, array in split.items()
        if array is not None
    }
    tokens = split["student_hidden"].shape[0]
    chunk = min(plan.chunk, tokens)
    plan = dataclasses.replace(plan, chunk=chunk, group=min(plan.group, chunk))
    pieces = -(-tokens // chunk)
    padding = pieces * chunk - tokens

    def in_chunks(name, array):
        # Padding weighs 0; its temperature is a divisor, so it must not be.
        width = ((0, padding),) + ((0, 0),) * (array.ndim - 1)
        padded = jnp.pad(array, width, constant_values=1 if name == "temperature" else 0)
        return padded.reshape(pieces, chunk, *array.shape[1:])

    split = {name: in_chunks(name, array) for name, array in split.items()}
    # One cast for all chunks; without it every chunk would read the float32 master copy.
    heads = operands._replace(
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
    if wanted.temperature and not per_token_t:
        totals["temperature"] = jnp.float32(0)

    def body(totals, chunk_rows):
        sums, gradients = head_chunk.run(plan, wanted, heads._replace(**chunk_rows), vocabulary)
        kept = {name: gradients.pop(name) for name in list(gradients) if name not in totals}
        return {k: totals[k] + gradients[k] for k in totals}, (sums, kept)

    totals, (sums, kept) = jax.lax.scan(body, totals, split)
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    for name, array in kept.items():
        flat = array.reshape(-1, *array.shape[2:])[:tokens]
        totals[name] = flat.reshape(*dims, *flat.shape[1:])
    for name in ("student_head", "student_bias"):
        if name in totals:
            totals[name] = totals[name][:rows]
    return sums, totals
