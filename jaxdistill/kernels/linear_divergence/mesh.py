"""The head loss on a mesh whose devices share the tokens or the vocabulary.

Every device sees some tokens and some rows of both heads. Where the tokens are fewer than the
vocabulary's rows it is cheaper to bring tokens together than heads: each device then keeps its rows
of the heads, the devices exchange a few numbers per token, and no head crosses the mesh.
"""

import dataclasses
import math
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.kernels.linear_divergence.chunk import Operands, Static, WantedGradients
from jaxdistill.kernels.linear_divergence.walk import (
    HEADS,
    PER_TOKEN,
    Gradients,
    pad_vocabulary,
    walk,
)
from jaxdistill.sharding import AXES, BATCH_AXES, PARAMETER_AXES, AnyMesh, present, spec


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a mesh divide the tokens, and which the vocabulary.

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
    def columns(self) -> tuple[str, ...]:
        """Axes that divide the heads' columns where they lie, and the rows of batches too."""
        return () if self.mesh is None else present(PARAMETER_AXES, self.mesh)

    @property
    def brings_tokens(self) -> bool:
        """Whether the tokens of those devices come together, and their heads stay."""
        return bool(self.columns) and self.columns[0] in self.vocab

    @property
    def token_axes(self) -> tuple[str, ...]:
        """All axes that divide tokens."""
        return tuple(axis for axes in self.tokens for axis in axes)

    @property
    def per_token(self) -> PartitionSpec:
        """How what is per token lies on the mesh."""
        return PartitionSpec(*(axes or None for axes in self.tokens))


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
      ConfigError: if the mesh does not divide the tokens, or has axes of type Explicit, or whole
        rows are asked of shared ones.
    """
    if vocab_axes and (mesh is not None or whole_rows):
        raise ConfigError(
            f"vocab_axes = {vocab_axes}: for calls inside a shard_map, so without mesh, and for "
            "named kinds alone: a function needs whole rows"
        )
    if mesh is None:
        return Layout(tokens=((),) * len(dims), vocab=vocab_axes)
    shape = mesh.shape
    if not set(AXES) <= set(shape):
        raise ConfigError(
            f"mesh has the axes {', '.join(map(str, shape))}: it must have {', '.join(AXES)}, as "
            "`jaxdistill.sharding.make_mesh` makes it; a shard_map of your own takes vocab_axes"
        )
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
        raise ConfigError(f"mesh has axes whose type is Explicit: {checks.EXPLICIT_REMEDY}")
    rows, columns = present(BATCH_AXES, mesh), present(PARAMETER_AXES, mesh)
    batch, length = rows, ("context",)
    size = lambda axes: math.prod(shape[axis] for axis in axes)
    shared: tuple[str, ...] = ()
    if whole_rows:
        # The tensor axis shares tokens too, where it divides them; else its devices do the same.
        last = shape["tensor"] * (shape["context"] if len(dims) == 2 else size(rows))
        if dims[-1] % last == 0 and len(dims) == 2:
            length = (*length, "tensor")
        elif dims[-1] % last == 0:
            batch = (*batch, "tensor")
    else:
        shared = tuple(axis for axis in ("tensor",) if shape[axis] > 1)
        in_a_group = math.prod(dims) // (shape["data"] * shape["context"])
        if size(columns) > 1 and in_a_group <= vocab // shape["tensor"]:
            batch, shared = ("data",), (*columns, *shared)
    chosen = Layout(mesh, (batch, length)[: len(dims)], shared)
    # All devices divide the tokens in the end, whichever way they are laid out for the loss.
    whole = Layout(mesh, ((rows if chosen.brings_tokens else batch), length)[: len(dims)])
    for dim, axes in zip(dims, whole.tokens, strict=True):
        if dim % whole.size(axes):
            raise ConfigError(
                f"hidden states of {list(dims)} tokens do not divide over the mesh: {dim} is no "
                f"multiple of {' * '.join(axes)} = {whole.size(axes)}"
            )
    return chosen


def padded(operands: Operands, place: Layout) -> Operands:
    """The operands with heads that the layout divides, padded where each device has its columns.

    Rows that do not divide over the devices cannot be exchanged for columns: XLA would bring the
    whole head to every device first. So what the loss divides by rows is padded before.
    """
    operands = pad_vocabulary(operands, place.size(place.vocab))
    mesh = place.mesh
    if mesh is None:
        return operands

    def stay(head: Array) -> Array:
        at = NamedSharding(mesh, spec(("vocab", "embed"), head.shape, mesh))
        return jax.lax.with_sharding_constraint(head, at)

    kept: dict[str, Any] = {
        name: stay(array)
        for name in HEADS
        if (array := getattr(operands, name)) is not None and array.ndim == 2
    }
    return operands._replace(**kept)


def on_mesh(
    static: Static, place: Layout, wanted: WantedGradients, operands: Operands
) -> tuple[dict[str, Array], Gradients]:
    """Sums over all tokens, and the gradients of the summed loss that are wanted."""

    def local(operands: Operands):
        sums, gradients = walk(static, wanted, operands, place.vocab)
        if place.mesh is not None:
            sums = jax.lax.psum(sums, place.token_axes)
        return sums, add_up(gradients, operands, place)

    if place.mesh is None:
        return local(operands)
    return jax.shard_map(
        local,
        mesh=place.mesh,
        in_specs=(operand_specs(place, operands),),
        out_specs=(PartitionSpec(), gradient_specs(place, wanted, operands)),
        check_vma=False,
    )(operands)


def operand_specs(place: Layout, operands: Operands) -> Operands:
    """How the operands lie on the mesh: a tree of specifications where they are arrays."""
    heads = PartitionSpec(place.vocab or None)
    by_name = dict.fromkeys(PER_TOKEN, place.per_token) | dict.fromkeys(HEADS, heads)
    by_name |= {"monitor": PartitionSpec(), "columns": PartitionSpec()}
    # The same names, other leaves.
    given: dict[str, Any] = {
        name: jax.tree.map(lambda _, spec=spec: spec, getattr(operands, name))
        for name, spec in by_name.items()
    }
    return Operands(**given, coefficients=operands.coefficients.specs(place.per_token))


def gradient_specs(
    place: Layout, wanted: WantedGradients, operands: Operands
) -> dict[str, PartitionSpec]:
    """How the gradients lie on the mesh that `add_up` leaves there, by name."""
    after = list(place.tokens)
    if place.brings_tokens:  # their sum leaves each device with its own rows
        assert place.mesh is not None
        after[0] = present(BATCH_AXES, place.mesh)
    scalar_t = operands.coefficients.has_scalar_temperature
    width = operands.student_head.shape[1]
    out = {
        "student_hidden": PartitionSpec(*(axes or None for axes in after)),
        "student_head": PartitionSpec(
            place.vocab or None, place.columns if _splits_head(place, width) else None
        ),
        "student_bias": PartitionSpec(place.vocab or None),
        "temperature": PartitionSpec() if scalar_t else place.per_token,
    }
    return {name: out[name] for name in out if getattr(wanted, name.removeprefix("student_"))}


def add_up(gradients: Gradients, operands: Operands, place: Layout) -> Gradients:
    """The sums over devices of what each made from its tokens and its rows of the heads.

    Inside a shard_map of the caller's own only hidden states are summed, over the vocabulary.
    """
    summed = dict(gradients)
    hidden = gradients.get("student_hidden")
    if hidden is not None and place.vocab:
        total = _sum_hidden(hidden, place)
        summed["student_hidden"] = total.astype(operands.student_hidden.dtype)
    if place.mesh is None:
        return summed
    if "student_head" in gradients:
        split = _splits_head(place, operands.student_head.shape[1])
        summed["student_head"] = _sum_head(gradients["student_head"], place, split)
    shared = ["student_bias"]
    if operands.coefficients.has_scalar_temperature:
        shared.append("temperature")
    for name in shared:
        if name in gradients:
            summed[name] = jax.lax.psum(gradients[name], place.token_axes)
    return summed


def _splits_head(place: Layout, width: int) -> bool:
    """Whether each device that has rows of its own keeps a slice of the head's gradient."""
    if place.mesh is None or not set(place.columns) <= set(place.token_axes):
        return False
    return width % place.size(place.columns) == 0


def _sum_head(gradient: Array, place: Layout, split: bool) -> Array:
    """The sum of the devices' head gradients; with `split` each device keeps its slice of D."""
    if not split:
        return jax.lax.psum(gradient, place.token_axes)
    gradient = jax.lax.psum_scatter(gradient, place.columns, scatter_dimension=1, tiled=True)
    return jax.lax.psum(
        gradient, tuple(axis for axis in place.token_axes if axis not in place.columns)
    )


def _sum_hidden(gradient: Array, place: Layout) -> Array:
    """The sum over the parts of the vocabulary; of tokens that came together each keeps its own."""
    rest = place.vocab
    if place.brings_tokens:
        gradient = jax.lax.psum_scatter(gradient, place.columns, scatter_dimension=0, tiled=True)
        rest = tuple(axis for axis in rest if axis not in place.columns)
    return jax.lax.psum(gradient, rest) if rest else gradient
