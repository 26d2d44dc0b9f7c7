"""Cross-entropy and a divergence from hidden states and heads, chunk by chunk: [N, V] never exists.

For every token i with student logits s = h_S W_S^T and teacher logits t = h_T W_T^T,

    loss_i = alpha * CE(s, y_i) + (1 - alpha) * T^2 * D(softmax(t / T), softmax(s / T)).

A `lax.scan` walks over chunks of tokens. Where a gradient is asked for, it is made in the same
walk, while the chunk's logits exist, so that no logits are kept and none are computed twice: the
teacher's head is read once. On a mesh every device walks over its own tokens and the sums are added
at the end.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice, head_chunk, head_walk, row_loss, rows
from jaxdistill.kernels.head_chunk import Operands, Plan, Wanted
from jaxdistill.kernels.head_walk import Layout
from jaxdistill.kernels.row_loss import Function, Terms
from jaxdistill.sharding import AnyMesh
from jaxdistill.types import Mean

# Logits of one model in a chunk: small enough to stay near a CPU's caches, large enough that a GPU
# or TPU reads heads and head gradient seldom (V = 128,256 in float32: 512 tokens).
_CHUNK_BYTES = {"cpu": 32 * 2**20}
_CHUNK_BYTES_ACCELERATOR = 2**28
_CHUNK_TOKENS = 2048  # more do not make products on an accelerator faster


def linear_divergence(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike | None = None,
    teacher_head: ArrayLike | None = None,
    *,
    labels: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    kind: str | Function = "forward_kl",
    parameters: Sequence[ArrayLike] = (),
    alpha: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
    taid_t: ArrayLike | None = None,
    label_smoothing: ArrayLike | None = None,
    student_bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
    logits_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    monitor: ArrayLike | None = None,
    mesh: AnyMesh | None = None,
    vocab_axes: str | Sequence[str] = (),
) -> tuple[Array, dict[str, Mean]]:
    """alpha * CE + (1 - alpha) * T^2 * D(teacher, student) from hidden states and heads.

    Exact in value and gradient; the largest temporary is a few arrays of [chunk, V]. `alpha` and
    `temperature` may be traced and differentiated. Nothing flows to the teacher's arrays: they are
    constants. Matrix products take the dtype of the hidden states, everything else is float32.

    Args:
      student_hidden: [N, D_S] or [B, L, D_S], after the final norm; so are all that is per token.
      student_head: [V, D_S]; cast to the dtype of the hidden states for the products, its gradient
        is accumulated in float32.
      teacher_hidden: [..., D_T], or None for cross-entropy alone.
      teacher_head: [V, D_T]; the same V, row by row the same token.
      labels: int [N], the token each position predicts; None leaves cross-entropy out (alpha must
        then be 0). A counted token whose label is no row of the heads makes the loss NaN.
      mask: bool or float [N], weight of each token in the loss; default 1. A token of weight 0
        contributes exactly 0 to value and gradient, whatever its hidden states hold.
      kind: the divergence: a key of `kernels.rows.KINDS` (`forward_kl` is KL(teacher || student)),
        or a function (student_logits / T, teacher_logits / T, labels) -> [n] of whole rows, float32
        [n, V], differentiated chunk by chunk; it must be hashable and stay the same object.
      parameters: the kind's own numbers, such as (beta,) of generalized_jsd; may be traced, are
        constants to the gradient.
      alpha: weight of the hard labels, 0 to 1.
      temperature: T > 0, of the divergence alone, one number or [N]; cross-entropy is at T = 1.
      scale_by_t2: multiply the divergence by T^2.
      taid_t: TAID's t: the target is softmax of the logits (1 - t) student + t teacher, a constant;
        the metrics stay with the teacher itself.
      label_smoothing: eps in [0, 1], CE = -(1 - eps) log q_y - eps mean_v log q_v.
      student_bias: [V] added to the student's logits, or None.
      teacher_bias: [V] added to the teacher's logits, or None.
      student_softcap: c, of logits c tanh(x / c), as Gemma has them; None for none.
      teacher_softcap: the same of the teacher.
      reduction: "mean" over the weights, or "sum" (to add micro-batches before dividing).
      chunk: tokens per chunk and device; default from V and the device.
      logits_dtype: in which a chunk's logits are kept; default that of the hidden states. Products
        accumulate in float32 and the arithmetic on logits is float32 in any case; float32 keeps
        bfloat16 models' logits unrounded at twice the traffic.
      implementation: of the row statistics, see `kernels.support`; None takes the best that runs.
      monitor: traced bool: whether the metrics at T = 1 are made, where leaving them out saves time
        (on a CPU); their means count 0 tokens where not. None makes them.
      mesh: with axes data, fsdp, tensor, context: their devices share the tokens, or the rows of
        the heads where that moves less; a function as `kind` always sees whole rows.
      vocab_axes: inside a shard_map of your own (check_vma=False), with `mesh` None: its axes that
        share the heads' rows. The call then sees this device's tokens and rows; `labels` count over
        all rows, sums are over this device's tokens, and the hidden states' gradient is summed over
        these axes. What several devices have in common, such as a head that all tokens share, gets
        each device's own part: psum it.

    Returns:
      The scalar float32 loss, and constants for monitoring as `Mean`s over the weights:
      `loss/ce`, `loss/divergence` (with its T^2), with TAID `loss/target_entropy` (of its target),
      `loss/kl_t1` (KL(teacher || student) at T = 1),
      `agree/top1` (both have a common most likely token), `teacher/entropy`, `student/entropy`;
      nats.

    Raises:
      ConfigError: for an unknown kind or reduction, shapes that do not fit, alpha without labels,
        or an implementation that cannot run.

    Reference: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2 (T^2).
    """
    arrays = _checked(student_hidden, student_head, student_bias, "student")
    teacher: tuple[Array | None, Array | None, Array | None] = (None, None, None)
    if teacher_hidden is not None and teacher_head is not None:
        teacher = _checked(teacher_hidden, teacher_head, teacher_bias, "teacher")
    elif teacher_hidden is not None or teacher_head is not None:
        raise ConfigError("teacher_hidden and teacher_head go together: give both or neither")
    dims, vocab = arrays[0].shape[:-1], arrays[1].shape[0]
    softcaps = (student_softcap, teacher_softcap)
    _check_choices(kind, parameters, reduction, labels, alpha, dims, vocab, teacher, softcaps)
    optional = lambda x: None if x is None else jnp.asarray(x, jnp.float32)
    operands = Operands(
        *arrays,
        *teacher,
        labels=None if labels is None else jnp.asarray(labels),
        weights=jnp.ones(dims) if mask is None else jnp.asarray(mask).astype(jnp.float32),
        alpha=jnp.asarray(alpha, jnp.float32),
        temperature=jnp.asarray(temperature, jnp.float32),
        parameters=tuple(jnp.asarray(parameter, jnp.float32) for parameter in parameters),
        taid_t=optional(taid_t),
        smoothing=optional(label_smoothing),
        monitor=None if monitor is None else jnp.asarray(monitor, bool),
    )
    row_loss.check_unchecked(operands)
    axes = (vocab_axes,) if isinstance(vocab_axes, str) else tuple(vocab_axes)
    whole_rows = operands.teacher_head is not None and not isinstance(kind, str)
    place = head_walk.layout(mesh, dims, vocab, whole_rows, axes)
    plan = _plan(operands, place, kind, scale_by_t2, softcaps, chunk, logits_dtype, implementation)
    sums = _loss_sums((plan, place), operands)
    loss, count, monitored = (sums.pop(name) for name in ("loss", "count", "monitored"))
    if reduction == "mean":
        loss = Mean(loss, count).value
    counts = {name: count for name in ("loss/ce", "loss/divergence", "loss/target_entropy")}
    return loss, {
        name: Mean(jax.lax.stop_gradient(total), counts.get(name, monitored))
        for name, total in sums.items()
    }


def chunk_size(tokens: int, vocab: int, platform: str, itemsize: int = 4) -> int:
    """Tokens per chunk for `tokens` local tokens: equal chunks near the platform's budget."""
    budget = _CHUNK_BYTES.get(platform, _CHUNK_BYTES_ACCELERATOR)
    most = max(8, budget // (itemsize * vocab))
    if platform != "cpu":
        most = min(most, _CHUNK_TOKENS)
    pieces = -(-tokens // most)
    return min(tokens, -(-tokens // pieces // 8) * 8)


def _plan(
    operands: Operands,
    place: Layout,
    kind: str | Function,
    scale_by_t2: bool,
    softcaps: tuple[float | None, float | None],
    chunk: int | None,
    logits_dtype: DTypeLike | None,
    implementation: str | None,
) -> Plan:
    """The static half of a call: what is summed, where, and in which pieces."""
    logits_dtype = jnp.dtype(logits_dtype or operands.student_hidden.dtype)
    dims, vocab = operands.student_hidden.shape[:-1], operands.student_head.shape[0]
    device = choice.target()
    has_teacher = operands.teacher_head is not None
    shards = place.size(place.vocab)
    # The kernels' tiles are 64 columns wide; a device pads its own rows of the heads.
    tile = 64 if device.platform == "gpu" else 1
    local_vocab = -(-vocab // (shards * tile)) * tile
    tokens = math.prod(dims) // place.size(place.token_axes)
    scalar = operands.temperature.ndim == 0
    chosen = choice.choose(
        implementation, local_vocab, logits_dtype, device=device, scalar_temperature=scalar
    )
    most = chunk_size(tokens, local_vocab, device.platform, logits_dtype.itemsize)
    chunk = min(chunk or most, tokens)
    terms = Terms(
        kind=kind if has_teacher else None,
        labels=operands.labels is not None,
        scale_by_t2=scale_by_t2,
        axes=place.vocab,
    )
    group = head_chunk.group_size(chunk, local_vocab, device.platform)
    # Inside a shard_map of one's own each device brings its rows, all of them real.
    total = vocab * (jax.lax.axis_size(place.vocab) if place.mesh is None and place.vocab else 1)
    return Plan(terms, chunk, group, tile, total, softcaps, chosen, logits_dtype)


def _checked(
    hidden: ArrayLike, head: ArrayLike, bias: ArrayLike | None, who: str
) -> tuple[Array, Array, Array | None]:
    hidden, head = jnp.asarray(hidden), jnp.asarray(head)
    bias = None if bias is None else jnp.asarray(bias)
    if hidden.ndim not in (2, 3) or head.ndim != 2 or hidden.shape[-1] != head.shape[1]:
        raise ConfigError(
            f"{who}_hidden {hidden.shape} and {who}_head {head.shape} must be [N, D] or [B, L, D], "
            "and [V, D]"
        )
    if bias is not None and bias.shape != (head.shape[0],):
        raise ConfigError(f"{who}_bias {bias.shape} must be [V] = [{head.shape[0]}]")
    return hidden, head, bias


def _check_choices(
    kind, parameters, reduction, labels, alpha, dims, vocab, teacher, softcaps
) -> None:
    """Raises for what does not fit together."""
    if isinstance(kind, str):
        rows.make(kind, *parameters)  # raises for an unknown kind or a parameter out of range
    elif parameters:
        raise ConfigError("parameters belong to named kinds; bind them to the function")
    if teacher[0] is not None and (teacher[1].shape[0] != vocab or teacher[0].shape[:-1] != dims):
        raise ConfigError(
            f"student logits would be {[*dims, vocab]}, the teacher's "
            f"{[*teacher[0].shape[:-1], teacher[1].shape[0]]}: tokens and vocabulary must agree; "
            "slice padded head rows off first"
        )
    for name, softcap in zip(("student", "teacher"), softcaps, strict=True):
        if softcap is not None and not softcap > 0:
            raise ConfigError(f"{name}_softcap = {softcap}: must be positive, or None for none")
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction={reduction!r} must be 'mean' or 'sum'")
    if labels is None and not (isinstance(alpha, (int, float)) and alpha == 0):
        raise ConfigError(f"alpha={alpha} weighs cross-entropy, which needs labels; labels is None")


# ------------------------------------------------------------------------------- custom gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sums(static: tuple[Plan, Layout], operands: Operands) -> dict[str, Array]:
    return _run(static, Wanted(), operands)[0]


def _run(static: tuple[Plan, Layout], wanted: Wanted, operands: Operands):
    """The walk on heads that the layout divides; gradients without the padding."""
    plan, place = static
    vocab = operands.student_head.shape[0]
    padded = head_walk.pad_vocabulary(operands, place.size(place.vocab))
    sums, gradients = head_walk.on_mesh(plan, place, wanted, padded)
    for name in ("student_head", "student_bias"):
        if name in gradients:
            gradients[name] = gradients[name][:vocab]
    return sums, gradients


def _loss_sums_fwd(static, primals: Any):  # operands with a CustomVJPPrimal for each leaf
    operands = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
    wanted = Wanted(
        hidden=primals.student_hidden.perturbed,
        head=primals.student_head.perturbed,
        bias=primals.student_bias is not None and primals.student_bias.perturbed,
        temperature=primals.temperature.perturbed,
    )
    sums, gradients = _run(static, wanted, operands)
    gradients = {
        name: gradient.astype(getattr(operands, name).dtype) for name, gradient in gradients.items()
    }
    # d/d alpha = CE - T^2 D, both already summed.
    zero = jnp.float32(0)
    gradients["alpha"] = sums.get("loss/ce", zero) - sums.get("loss/divergence", zero)
    return sums, (gradients, operands)


def _loss_sums_bwd(static, residuals, cotangents):
    gradients, operands = residuals
    cotangent = cotangents["loss"]
    if not isinstance(cotangent, jax.Array):  # symbolic zero: nothing depends on the loss
        return (jax.tree.map(lambda _: None, operands),)
    scaled = {
        name: (cotangent * gradient).astype(gradient.dtype) for name, gradient in gradients.items()
    }
    return (Operands._make(scaled.get(name) for name in Operands._fields),)


_loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd, symbolic_zeros=True)
