"""The fused form of `divergence`: statistics forward, slopes elementwise backward.

Forward, the statistics of both rows are measured in one read (a Pallas kernel on a GPU, XLA
elsewhere). Only the logits and a few numbers per row are kept for the way back. Backward, the slope
is elementwise in the logits and these numbers, which XLA fuses into one loop.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jaxdistill.kernels import choice
from jaxdistill.kernels.groups import group_size, in_groups
from jaxdistill.kernels.operands import LossSpec, VocabularyShard
from jaxdistill.kernels.statistics import Rows
from jaxdistill.kernels.token_loss import Divergence, TokenRows, as_column
from jaxdistill.sharding import BATCH_AXES, AnyMesh, present


class RowOperands(NamedTuple):
    """The arrays of a call.

    Attributes:
      student: logits [..., V].
      teacher: logits [..., V].
      labels: int [...], or None.
      weights: float32 [...].
      coefficients: temperature is [] or [...].
    """

    student: Any
    teacher: Any
    labels: Any
    weights: Any
    coefficients: Any

    def flat(self) -> "RowOperands":
        """The same with one leading dim."""
        by_row = lambda x: x if x is None or x.ndim == 0 else x.reshape(-1)
        wide = lambda x: x.reshape(-1, x.shape[-1])
        temperature = by_row(self.coefficients.temperature)
        return RowOperands(
            wide(self.student),
            wide(self.teacher),
            by_row(self.labels),
            self.weights.reshape(-1),
            self.coefficients._replace(temperature=temperature),
        )


@dataclasses.dataclass(frozen=True)
class FusedStatic:
    """The static arguments of a call.

    Attributes:
      loss: what is computed.
      implementation: of the statistics, from `choice.choose`.
      mesh: that the logits lie on, or None.
      spec: how they lie on it, one entry for each dim.
    """

    loss: LossSpec
    implementation: str
    mesh: AnyMesh | None
    spec: PartitionSpec

    @property
    def by_row(self) -> PartitionSpec:
        """How an array [...] lies on the mesh."""
        return PartitionSpec(*self.spec[:-1])

    def rows(self, flat: RowOperands) -> TokenRows:
        """A device's rows of logits, [n, V]."""
        width, axes = flat.student.shape[-1], self.loss.vocab_axes
        shard = VocabularyShard(axes, jax.lax.axis_index(axes) * width if axes else 0, width)
        return TokenRows(
            self.loss, self.implementation, flat.coefficients, shard,
            flat.student, flat.teacher, flat.labels,
        )  # fmt: skip

    def on_mesh(self, function: Callable[..., Any], operands: RowOperands, *by_row: Any) -> Any:
        """function(operands, *by_row) where the logits lie; it returns two trees.

        With `by_row`, on the way back, the first tree is [..., V]; else all is [...].
        """
        if self.mesh is None:
            return function(operands, *by_row)
        specs = RowOperands(
            self.spec,
            self.spec,
            None if operands.labels is None else self.by_row,
            self.by_row,
            operands.coefficients.specs(self.by_row),
        )
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(specs, *(self.by_row,) * len(by_row)),
            out_specs=(self.spec if by_row else self.by_row, self.by_row),
            check_vma=False,
        )(operands, *by_row)


def static(
    operands: RowOperands,
    loss: LossSpec,
    implementation: str | None,
    mesh: AnyMesh | None,
    spec: PartitionSpec | None,
    vocab_axes: str | Sequence[str],
) -> FusedStatic:
    """The static arguments: where the logits lie, and which implementation runs there."""
    ndim = operands.student.ndim
    if mesh is None:
        vocab = (vocab_axes,) if isinstance(vocab_axes, str) else tuple(vocab_axes)
        spec = PartitionSpec(*(None,) * (ndim - 1), vocab or None)
    elif spec is None:
        vocab = "tensor" if mesh.shape["tensor"] > 1 else None
        rows = present(BATCH_AXES, mesh)
        spec = PartitionSpec(*(rows,) * (ndim > 1), *(None,) * (ndim - 2), vocab)
    spec = PartitionSpec(*spec, *(None,) * (ndim - len(spec)))
    axes = spec[-1] or ()
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    parts = lambda axes: math.prod(mesh.shape[axis] for axis in axes) if mesh is not None else 1
    shards = parts(axes)
    rows = [(one,) if isinstance(one, str) else one or () for one in spec[:-1]]
    tokens = math.prod(operands.student.shape[:-1]) // parts(axis for row in rows for axis in row)
    chosen = choice.choose(
        implementation,
        operands.student.shape[-1] // shards,
        jnp.promote_types(operands.student.dtype, operands.teacher.dtype),
        scalar_temperature=operands.coefficients.has_scalar_temperature,
        tokens=tokens,
    )
    return FusedStatic(dataclasses.replace(loss, vocab_axes=axes), chosen, mesh, spec)


class Residuals(NamedTuple):
    """What the way back needs of each row, [n] each.

    Attributes:
      statistics: by name.
      divergence: without its T^2.
      cross_entropy: None without labels.
    """

    statistics: Rows
    divergence: Divergence
    cross_entropy: Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def losses(static: FusedStatic, operands: RowOperands) -> Array:
    """weights * loss of each position, [...]."""
    return _forward(static, operands)[0]


def _forward(static: FusedStatic, operands: RowOperands) -> tuple[Array, Residuals]:
    """weights * loss [...], and what the way back needs of each row, [...] each."""

    def local(operands: RowOperands):
        flat = operands.flat()
        value, residuals = _in_groups(static, _rows_forward, flat)
        back = lambda x: x.reshape(operands.weights.shape)
        return back(value), jax.tree.map(back, residuals)

    return static.on_mesh(local, operands)


def _in_groups(
    static: FusedStatic, one: Callable[..., Any], flat: RowOperands, *by_row: Any
) -> Any:
    """`one` of a device's rows and of arrays [n], group after group where a cache wants that."""
    rows, vocab = flat.student.shape
    size = group_size(rows, vocab, choice.current_device().platform)
    shared = flat.coefficients
    temperature = None if shared.has_scalar_temperature else shared.temperature

    def of(group):
        own, temperature, *by_row = group
        coefficients = shared if temperature is None else shared._replace(temperature=temperature)
        made = static.rows(own._replace(coefficients=coefficients))
        return one(dataclasses.replace(made, kept=size < rows), own.weights, *by_row)

    return in_groups(of, size, (flat._replace(coefficients=None), temperature, *by_row))


def _rows_forward(rows: TokenRows, weights: Array) -> tuple[Array, Residuals]:
    alpha = rows.coefficients.alpha
    statistics = rows.measure(rows.loss_statistics())
    divergence, cross_entropy = rows.divergence(statistics), None
    loss = (1 - alpha) * rows.t2 * divergence.value
    if rows.labels is not None:
        cross_entropy = rows.cross_entropy(statistics)
        loss += alpha * cross_entropy
    loss = jnp.where(weights == 0, 0.0, loss * weights)
    return loss, Residuals(statistics, divergence, cross_entropy)


def _losses_fwd(static: FusedStatic, operands: RowOperands):
    value, residuals = _forward(static, operands)
    return value, (operands, residuals)


def _losses_bwd(static: FusedStatic, saved, cotangent: Array):
    operands, residuals = saved

    def local(operands: RowOperands, residuals: Residuals, cotangent: Array):
        flat = operands.flat()
        cotangent = cotangent.reshape(-1)
        residuals = jax.tree.map(lambda x: x.reshape(-1), residuals)
        slope = _slope(static.rows(flat), residuals, cotangent * flat.weights)
        slope = slope.reshape(operands.student.shape).astype(operands.student.dtype)
        by_row = _in_groups(static, _coefficient_slopes, flat, residuals, cotangent)
        return slope, [x.reshape(operands.weights.shape) for x in by_row]

    slope, (by_alpha, by_temperature) = static.on_mesh(local, operands, residuals, cotangent)
    scalar = operands.coefficients.has_scalar_temperature
    coefficients = jax.tree.map(jnp.zeros_like, operands.coefficients)._replace(
        alpha=jnp.sum(by_alpha),
        temperature=jnp.sum(by_temperature) if scalar else by_temperature,
    )
    return (RowOperands(slope, None, None, None, coefficients),)


def _slope(rows: TokenRows, residuals: Residuals, along: Array) -> Array:
    """The slope by the student's logits, [n, V], times `along`.

    The factors of a row are one number before they meet its logits: one product for each of them.
    """
    alpha, temperature = rows.coefficients.alpha, rows.coefficients.temperature
    statistics, divergence, cross_entropy = residuals
    pull = rows.divergence_slope(statistics, divergence)
    slope = as_column((1 - alpha) * rows.t2 / temperature) * pull
    if cross_entropy is not None:
        slope += alpha * rows.cross_entropy_slope(statistics)
    # Where nothing flows, a row may hold anything: 0 * NaN must not reach its slope.
    return jnp.where(as_column(along) == 0, 0.0, slope * as_column(along))


def _coefficient_slopes(
    rows: TokenRows, weights: Array, residuals: Residuals, cotangent: Array
) -> tuple[Array, Array]:
    """The slopes by alpha and by T, [n] each, times weights and cotangent."""
    along = cotangent * weights
    statistics, divergence, cross_entropy = residuals
    by_temperature = rows.divergence_temperature_slope(statistics, divergence)
    by_alpha = -rows.t2 * divergence.value
    if cross_entropy is not None:
        by_alpha = cross_entropy + by_alpha
    silent = lambda x: jnp.where(along == 0, 0.0, x)
    return (
        silent(along * by_alpha),
        silent(along * (1 - rows.coefficients.alpha) * by_temperature),
    )


losses.defvjp(_losses_fwd, _losses_bwd)
