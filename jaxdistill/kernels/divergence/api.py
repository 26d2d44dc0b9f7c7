"""`divergence`: a divergence and cross-entropy of two arrays of logits, each position apart."""

from collections.abc import Sequence

from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks, choice, operands, rows
from jaxdistill.kernels.divergence import fused
from jaxdistill.kernels.divergence.reference import reference
from jaxdistill.sharding import AnyMesh


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
    may be traced and differentiated; the teacher's logits, labels and mask are constants. It has
    reverse mode alone (grad, vjp, and both under vmap), once: no jvp, no second derivative.

    Args:
      student_logits: [..., V] float32, bfloat16 or float16; -inf marks an impossible entry, which
        counts as a logit of -2^100 (about -1.3e30).
      teacher_logits: [..., V].
      labels: int [...], or None for the divergence alone (alpha must then be 0). A label of -100
        gives its position the weight 0; any other that is no column gives NaN.
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
        "reference" is the definition itself, in plain jnp.
      mesh: that the logits lie on; without it a Pallas kernel would gather sharded logits.
      spec: how logits lie on the mesh; default rows over data and fsdp, V over tensor.
      vocab_axes: inside a shard_map of your own (check_vma=False), with `mesh` None: its axes that
        share V.

    Returns:
      [...], float32, nats, unreduced: average with `losses.masked_mean`.

    Raises:
      ConfigError: for shapes or types that do not fit, a number out of its range, an unknown kind,
        alpha without labels, or an implementation that cannot run. A number that is traced by a
        transformation of JAX's, such as jit, cannot be looked at.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
    >>> print(divergence(student, teacher))
    [0.3681]

    Reference: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2 (T^2).
    """
    student = checks.array("student_logits", student_logits)
    teacher = checks.array("teacher_logits", teacher_logits)
    _check(kind, parameters, student, teacher)
    dims = student.shape[:-1]
    per_token = operands.per_token(labels, mask, dims)
    some = checks.counted(dims, mask, labels)
    operands.check_numbers(alpha, temperature, taid_t, label_smoothing, parameters, dims, some)
    operands.check_alpha(alpha, labels)
    coefficients = operands.coefficients(alpha, temperature, parameters, taid_t, label_smoothing)
    arrays = fused.RowOperands(student, teacher, *per_token, coefficients)
    at_one = checks.known(temperature) == 1
    loss = operands.LossSpec(kind, labels is not None, scale_by_t2, at_one=at_one)
    if implementation == choice.REFERENCE:
        if vocab_axes:
            raise ConfigError(
                f"vocab_axes = {vocab_axes}: the reference needs whole rows of logits; None takes "
                "an implementation that shares them"
            )
        return reference(loss, *arrays)
    operands.check_manual_axes(arrays)
    static = fused.static(arrays, loss, implementation, mesh, spec, vocab_axes)
    return fused.losses(static, arrays)


def _check(kind, parameters, student, teacher) -> None:
    rows.make(kind, *parameters)  # raises for an unknown kind or a parameter out of range
    if student.shape != teacher.shape or student.ndim == 0:
        raise ConfigError(
            f"student_logits {list(student.shape)} and teacher_logits {list(teacher.shape)} must "
            "have one shape [..., V]; slice padded vocabulary off first"
        )
    checks.floating("student_logits", student)
    checks.floating("teacher_logits", teacher)
