"""Divergence of two arrays of logits with a gradient of its own: statistics, then one pass back.

Forward, the statistics of both rows are measured in one read (a Pallas kernel on a GPU, XLA
elsewhere); nothing of size [N, V] is kept but the logits themselves. Backward, the slope is
elementwise in the logits and a few numbers per row, which XLA fuses into one loop.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice, row_loss, rows
from jaxdistill.kernels.row_loss import Numbers, Terms, Vocabulary
from jaxdistill.kernels.statistics import Rows
from jaxdistill.sharding import BATCH_AXES, AnyMesh


def divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    kind: str = "forward_kl",
    parameters: Sequence[ArrayLike] = (),
    alpha: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
    taid_t: ArrayLike | None = None,
    label_smoothing: ArrayLike | None = None,
    implementation: str | None = None,
    mesh: AnyMesh | None = None,
    spec: PartitionSpec | None = None,
    vocab_axes: str | Sequence[str] = (),
) -> Array:
    """alpha * CE + (1 - alpha) * T^2 * D(teacher, student) of each position, from logits.

    The same loss as `linear_divergence`, for logits that exist anyway. `alpha` and `temperature`
    may be traced and differentiated; the teacher's logits, labels and mask are constants.

    Args:
      student_logits: [..., V] float32, bfloat16 or float16; -inf marks an impossible entry, which
        counts as a logit of -1e30.
      teacher_logits: [..., V].
      labels: int [...], or None for the divergence alone (alpha must then be 0).
      mask: bool or float [...], multiplies each position; where 0, value and gradient are exactly
        0, whatever the logits hold.
      kind: the divergence, a key of `kernels.rows.KINDS`; `forward_kl` is KL(teacher || student).
      parameters: the kind's own numbers, such as (beta,) of generalized_jsd; may be traced.
      alpha: weight of the hard labels, 0 to 1.
      temperature: T > 0, of the divergence alone: one number, or [...].
      scale_by_t2: multiply the divergence by T^2.
      taid_t: TAID's t: the target is softmax((1 - t) student + t teacher), a constant.
      label_smoothing: eps in [0, 1], of the cross-entropy.
      implementation: "mosaic_gpu" or "xla", see `support`; None takes the best that runs.
      mesh: compute where the logits lie: a Pallas kernel on sharded arrays would gather them.
      spec: how logits lie on the mesh; default rows over data and fsdp, V over tensor.
      vocab_axes: inside a shard_map of your own (check_vma=False), with `mesh` None: its axes that
        share V.

    Returns:
      [...], float32, nats, unreduced: average with `losses.masked_mean`.

    Raises:
      ConfigError: for shapes that do not fit, an unknown kind, alpha without labels, or an
        implementation that cannot run.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
    >>> print(divergence(student, teacher))
    [0.3681]

    Reference: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2 (T^2).
    """
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    _check(kind, parameters, student, teacher, labels, alpha)
    lead = student.shape[:-1]
    number = lambda x: jnp.asarray(x, jnp.float32)
    operands = _Operands(
        student,
        teacher,
        None if labels is None else jnp.asarray(labels),
        jnp.ones(lead) if mask is None else number(mask),
        Numbers(
            number(alpha),
            number(temperature),
            tuple(map(number, parameters)),
            None if taid_t is None else number(taid_t),
            None if label_smoothing is None else number(label_smoothing),
        ),
    )
    row_loss.check_unchecked(operands)
    plan = _plan(operands, kind, scale_by_t2, implementation, mesh, spec, vocab_axes)
    return _values(plan, operands)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["student", "teacher", "labels", "weights", "numbers"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Operands:
    student: Any
    teacher: Any
    labels: Any
    weights: Any
    numbers: Any


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static half of a call."""

    terms: Terms
    implementation: str
    mesh: AnyMesh | None
    spec: PartitionSpec

    @property
    def by_row(self) -> PartitionSpec:
        """How an array [...] lies on the mesh."""
        return PartitionSpec(*self.spec[:-1])

    def vocabulary(self, width: int) -> Vocabulary:
        """The part of the vocabulary that this device sees."""
        axes = self.terms.axes
        return Vocabulary(axes, jax.lax.axis_index(axes) * width if axes else 0, width)


def _check(kind, parameters, student, teacher, labels, alpha) -> None:
    rows.make(kind, *parameters)  # raises for an unknown kind or a parameter out of range
    if student.shape != teacher.shape or student.ndim == 0:
        raise ConfigError(
            f"student_logits {list(student.shape)} and teacher_logits {list(teacher.shape)} must "
            "have one shape [..., V]; slice padded vocabulary off first"
        )
    if labels is None and not (isinstance(alpha, int | float) and alpha == 0):
        raise ConfigError(f"alpha={alpha} weighs cross-entropy, which needs labels; labels is None")
    if labels is not None and jnp.shape(labels) != student.shape[:-1]:
        raise ConfigError(f"labels {list(jnp.shape(labels))} must be {list(student.shape[:-1])}")


def _plan(operands, kind, scale_by_t2, implementation, mesh, spec, vocab_axes) -> _Plan:
    ndim = operands.student.ndim
    if mesh is None:
        vocab = (vocab_axes,) if isinstance(vocab_axes, str) else tuple(vocab_axes)
        spec = PartitionSpec(*(None,) * (ndim - 1), vocab or None)
    elif spec is None:
        vocab = "tensor" if mesh.shape["tensor"] > 1 else None
        spec = PartitionSpec(*(BATCH_AXES,) * (ndim > 1), *(None,) * (ndim - 2), vocab)
    spec = PartitionSpec(*spec, *(None,) * (ndim - len(spec)))
    axes = spec[-1] or ()
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    shards = math.prod(mesh.shape[axis] for axis in axes) if mesh is not None else 1
    chosen = choice.choose(
        implementation,
        operands.student.shape[-1] // shards,
        operands.student.dtype,
        scalar_temperature=operands.numbers.temperature.ndim == 0,
    )
    terms = Terms(kind, operands.labels is not None, scale_by_t2, axes)
    return _Plan(terms, chosen, mesh, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _values(plan: _Plan, operands: _Operands) -> Array:
    return _forward(plan, operands)[0]


def _forward(plan: _Plan, operands: _Operands) -> tuple[Array, Rows]:
    """The loss [...], and what the way back needs, [...] each."""

    def local(operands: _Operands):
        flat = _flatten(operands)
        vocabulary = plan.vocabulary(flat.student.shape[-1])
        value, kept = _rows_forward(plan, flat, vocabulary)
        back = lambda x: x.reshape(operands.weights.shape)
        return back(value), jax.tree.map(back, kept)

    return _placed(plan, local, operands)


def _placed(plan: _Plan, local, operands: _Operands, *more: Any):
    if plan.mesh is None:
        return local(operands, *more)
    specs = _specs(plan, operands)
    rest = (plan.by_row,) * len(more)
    outs = (plan.spec, plan.by_row) if more else (plan.by_row, plan.by_row)
    return jax.shard_map(
        local, mesh=plan.mesh, in_specs=(specs, *rest), out_specs=outs, check_vma=False
    )(operands, *more)


def _specs(plan: _Plan, operands: _Operands) -> _Operands:
    numbers = jax.tree.map(lambda _: PartitionSpec(), operands.numbers)
    if operands.numbers.temperature.ndim:
        numbers = numbers._replace(temperature=plan.by_row)
    labels = None if operands.labels is None else plan.by_row
    return _Operands(plan.spec, plan.spec, labels, plan.by_row, numbers)


def _flatten(operands: _Operands) -> _Operands:
    """One leading dim."""
    flat = lambda x: x.reshape(-1)
    wide = lambda x: x.reshape(-1, x.shape[-1])
    temperature = operands.numbers.temperature
    return _Operands(
        wide(operands.student),
        wide(operands.teacher),
        None if operands.labels is None else flat(operands.labels),
        flat(operands.weights),
        operands.numbers._replace(
            temperature=flat(temperature) if temperature.ndim else temperature
        ),
    )


def _rows_forward(plan: _Plan, x: _Operands, vocabulary: Vocabulary) -> tuple[Array, Rows]:
    terms, numbers = plan.terms, x.numbers
    row = terms.row(numbers)
    assert row is not None, "kind is a name here"
    logits = row_loss.logits_of(terms, numbers, x.student, x.teacher)
    names = row_loss.needed(terms, row)
    found = choice.statistics(
        plan.implementation, names, numbers, logits, x.student, x.teacher, vocabulary
    )
    read = None
    if row.closed is None:
        read = choice.second_read(
            plan.implementation, terms.kind, numbers, x.student, x.teacher, found
        )
    value, slope_sum = row_loss.divergence(row, numbers, logits, found, vocabulary, read)
    scale = numbers.temperature**2 if terms.scale_by_t2 else jnp.float32(1)
    kept = found | {"slope_sum": slope_sum, "divergence": scale * value}
    loss = (1 - numbers.alpha) * scale * value
    if x.labels is not None:
        kept["ce"] = row_loss.cross_entropy(numbers, logits, found, x.labels, vocabulary)
        loss += numbers.alpha * kept["ce"]
    return jnp.where(x.weights == 0, 0.0, loss * x.weights), kept


def _values_fwd(plan: _Plan, operands: _Operands):
    value, kept = _forward(plan, operands)
    return value, (operands, kept)


def _values_bwd(plan: _Plan, residuals, cotangent: Array):
    operands, kept = residuals

    def local(operands: _Operands, kept: Rows, cotangent: Array):
        flat = _flatten(operands)
        vocabulary = plan.vocabulary(flat.student.shape[-1])
        along = cotangent.reshape(-1) * flat.weights
        kept = jax.tree.map(lambda x: x.reshape(-1), kept)
        slope, by_number = _rows_backward(plan, flat, kept, along, vocabulary)
        back = lambda x: x.reshape(operands.weights.shape)
        slope = slope.reshape(operands.student.shape).astype(operands.student.dtype)
        return slope, jax.tree.map(back, by_number)

    slope, by_number = _placed(plan, local, operands, kept, cotangent)
    numbers = jax.tree.map(jnp.zeros_like, operands.numbers)
    by_temperature = by_number["temperature"]
    numbers = numbers._replace(
        alpha=jnp.sum(by_number["alpha"]),
        temperature=by_temperature if numbers.temperature.ndim else jnp.sum(by_temperature),
    )
    return (_Operands(slope, None, None, None, numbers),)


def _rows_backward(
    plan: _Plan, x: _Operands, kept: Rows, along: Array, vocabulary: Vocabulary
) -> tuple[Array, Rows]:
    terms, numbers = plan.terms, x.numbers
    row = terms.row(numbers)
    assert row is not None, "kind is a name here"
    logits = row_loss.logits_of(terms, numbers, x.student, x.teacher)
    temperature = numbers.temperature
    scale = temperature**2 if terms.scale_by_t2 else jnp.float32(1)
    column = lambda v: v[:, None] if v.ndim else v
    pull = row_loss.divergence_slope(row, numbers, logits, kept, kept["slope_sum"])
    by_temperature = scale * row_loss.temperature_slope(
        row, numbers, logits, kept, pull, vocabulary
    )
    if terms.scale_by_t2:
        by_temperature += 2 / temperature * kept["divergence"]
    slope = column((1 - numbers.alpha) * scale / temperature) * pull
    by_alpha = -kept["divergence"]
    if x.labels is not None:
        ce_slope = row_loss.cross_entropy_slope(numbers, logits, kept, x.labels, vocabulary)
        slope += numbers.alpha * ce_slope
        by_alpha = kept["ce"] + by_alpha
    by_number = {
        "alpha": along * by_alpha,
        "temperature": along * (1 - numbers.alpha) * by_temperature,
    }
    slope = jnp.where(column(along) == 0, 0.0, slope * column(along))
    return slope, jax.tree.map(lambda v: jnp.where(along == 0, 0.0, v), by_number)


_values.defvjp(_values_fwd, _values_bwd)
