"""Cross-entropy and a divergence from hidden states and heads, chunk by chunk: [N, V] never exists.

For every token i with student logits s = h_S W_S^T and teacher logits t = h_T W_T^T,

    loss_i = alpha * CE(s, y_i) + (1 - alpha) * T^2 * D(softmax(t / T), softmax(s / T)).

A `lax.scan` walks over chunks of tokens. Where a gradient is asked for, it is made in the same
walk, while the chunk's logits exist, so that no logits are kept and none are computed twice: the
teacher's head is read once. On a mesh every device walks over its own tokens and the sums are added
at the end.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxdistill.kernels import head_chunk, rows
from jaxdistill.kernels.head_chunk import PER_TOKEN, Operands, Plan, Wanted
from jaxdistill.sharding import BATCH_AXES, AnyMesh
from jaxdistill.types import Mean

# float32 logits of one chunk: small enough to stay near a CPU's caches, large enough that a GPU or
# TPU reads the heads from memory few times (at V = 128,256 that is 2,048 tokens).
_CHUNK_BYTES = {"cpu": 32 * 2**20}
_CHUNK_BYTES_ACCELERATOR = 2**30


def linear_divergence(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike | None = None,
    teacher_head: ArrayLike | None = None,
    *,
    labels: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    kind: str = "forward_kl",
    parameters: Sequence[ArrayLike] = (),
    alpha: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
    student_bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
    mesh: AnyMesh | None = None,
) -> tuple[Array, dict[str, Mean]]:
    """alpha * CE + (1 - alpha) * T^2 * D(teacher, student) from hidden states and heads.

    Exact in value and gradient; the largest temporary is a few arrays of [chunk, V]. `alpha` and
    `temperature` may be traced and differentiated. Nothing flows to the teacher's arrays: they are
    constants. Matrix products take the dtype of the hidden states, everything else is float32.

    Args:
      student_hidden: [N, D_S], after the final norm.
      student_head: [V, D_S]; cast to the dtype of the hidden states for the products, its gradient
        is accumulated in float32.
      teacher_hidden: [N, D_T], or None for cross-entropy alone.
      teacher_head: [V, D_T]; the same V, row by row the same token.
      labels: int [N], the token each position predicts; None leaves cross-entropy out (alpha must
        then be 0).
      mask: bool or float [N], weight of each token in the loss; default 1. A token of weight 0
        contributes exactly 0 to value and gradient, whatever its hidden states hold.
      kind: the divergence, a key of `kernels.rows.KINDS`; `forward_kl` is KL(teacher || student).
      parameters: the kind's own numbers, such as (beta,) of generalized_jsd; may be traced, are
        constants to the gradient.
      alpha: weight of the hard labels, 0 to 1.
      temperature: T > 0, of the divergence alone; cross-entropy is always at T = 1.
      scale_by_t2: multiply the divergence by T^2.
      student_bias: [V] added to the student's logits, or None.
      teacher_bias: [V] added to the teacher's logits, or None.
      reduction: "mean" over the weights, or "sum" (to add micro-batches before dividing).
      chunk: tokens per chunk and device; default from V and the device.
      mesh: walk over the tokens of each device of this mesh's data and fsdp axes apart.

    Returns:
      The scalar float32 loss, and constants for monitoring as `Mean`s over the weights:
      `loss/ce`, `loss/divergence` (with its T^2), `loss/kl_t1` (KL(teacher || student) at T = 1),
      `agree/top1` (both have a common most likely token), `teacher/entropy`, `student/entropy`;
      nats.

    Raises:
      ValueError: for an unknown kind or reduction, shapes that do not fit, or alpha without labels.

    Reference: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2 (T^2).
    """
    arrays = _checked(student_hidden, student_head, student_bias, "student")
    teacher: tuple[Array | None, Array | None, Array | None] = (None, None, None)
    if teacher_hidden is not None and teacher_head is not None:
        teacher = _checked(teacher_hidden, teacher_head, teacher_bias, "teacher")
        if teacher[1].shape[0] != arrays[1].shape[0] or teacher[0].shape[0] != arrays[0].shape[0]:
            raise ValueError(
                f"student logits would be [{arrays[0].shape[0]}, {arrays[1].shape[0]}], the "
                f"teacher's [{teacher[0].shape[0]}, {teacher[1].shape[0]}]: tokens and vocabulary "
                "must agree; slice padded head rows off first"
            )
    elif teacher_hidden is not None or teacher_head is not None:
        raise ValueError("teacher_hidden and teacher_head go together: give both or neither")
    rows.make(kind, *parameters)  # raises for an unknown kind or a parameter out of range
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} must be 'mean' or 'sum'")
    if labels is None and not (isinstance(alpha, (int, float)) and alpha == 0):
        raise ValueError(f"alpha={alpha} weighs cross-entropy, which needs labels; labels is None")
    tokens, vocab = arrays[0].shape[0], arrays[1].shape[0]
    weights = jnp.ones(tokens) if mask is None else jnp.asarray(mask)
    devices = 1 if mesh is None else _token_shards(mesh)
    if tokens % devices:
        raise ValueError(f"{tokens} tokens do not divide over the mesh's {devices} token shards")
    operands = Operands(
        *arrays,
        *teacher,
        None if labels is None else jnp.asarray(labels),
        weights.astype(jnp.float32),
        jnp.asarray(alpha, jnp.float32),
        jnp.asarray(temperature, jnp.float32),
        tuple(jnp.asarray(parameter, jnp.float32) for parameter in parameters),
    )
    chunk = chunk or chunk_size(tokens // devices, vocab)
    group = head_chunk.group_size(chunk, vocab)
    plan = Plan(kind, scale_by_t2, chunk, group, mesh)
    sums = _loss_sums(plan, operands)
    loss = sums.pop("loss")
    count = sums.pop("count")
    if reduction == "mean":
        loss = Mean(loss, count).value
    return loss, {name: Mean(jax.lax.stop_gradient(total), count) for name, total in sums.items()}


def chunk_size(tokens: int, vocab: int, platform: str | None = None) -> int:
    """Tokens per chunk for `tokens` local tokens: equal chunks near the platform's budget."""
    budget = _CHUNK_BYTES.get(platform or jax.default_backend(), _CHUNK_BYTES_ACCELERATOR)
    most = max(8, budget // (4 * vocab))
    pieces = -(-tokens // most)
    return min(tokens, -(-tokens // pieces // 8) * 8)


def _checked(
    hidden: ArrayLike, head: ArrayLike, bias: ArrayLike | None, who: str
) -> tuple[Array, Array, Array | None]:
    hidden, head = jnp.asarray(hidden), jnp.asarray(head)
    bias = None if bias is None else jnp.asarray(bias)
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{who}_hidden {hidden.shape} and {who}_head {head.shape} must be [N, D] and [V, D]"
        )
    if bias is not None and bias.shape != (head.shape[0],):
        raise ValueError(f"{who}_bias {bias.shape} must be [V] = [{head.shape[0]}]")
    return hidden, head, bias


def _token_shards(mesh: AnyMesh) -> int:
    return mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]


# ------------------------------------------------------------------------------- custom gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sums(plan: Plan, operands: Operands) -> dict[str, Array]:
    return _on_mesh(plan, Wanted(), operands)[0]


def _loss_sums_fwd(plan: Plan, primals: Any):  # operands with a CustomVJPPrimal for each leaf
    operands = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
    wanted = Wanted(
        hidden=primals.student_hidden.perturbed,
        head=primals.student_head.perturbed,
        bias=primals.student_bias is not None and primals.student_bias.perturbed,
        temperature=primals.temperature.perturbed,
    )
    sums, gradients = _on_mesh(plan, wanted, operands)
    gradients = {
        name: gradient.astype(getattr(operands, name).dtype) for name, gradient in gradients.items()
    }
    # d/d alpha = CE - T^2 D, both already summed.
    gradients["alpha"] = sums.get("loss/ce", 0.0) - sums.get("loss/divergence", 0.0)
    return sums, (gradients, operands)


def _loss_sums_bwd(plan: Plan, residuals, cotangents):
    gradients, operands = residuals
    cotangent = cotangents["loss"]
    if not isinstance(cotangent, jax.Array):  # symbolic zero: nothing depends on the loss
        return (jax.tree.map(lambda _: None, operands),)
    scaled = {
        name: (cotangent * gradient).astype(gradient.dtype) for name, gradient in gradients.items()
    }
    return (Operands._make(scaled.get(name) for name in Operands._fields),)


_loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd, symbolic_zeros=True)


# ------------------------------------------------------------------------------------- the walk


def _on_mesh(plan: Plan, wanted: Wanted, operands: Operands):
    """The walk on one device, or on every device over its own tokens."""
    if plan.mesh is None:
        return _walk(plan, wanted, operands)
    split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    specs = Operands._make(
        None if leaf is None else split if name in PER_TOKEN else whole
        for name, leaf in zip(Operands._fields, operands, strict=True)
    )
    shards = plan.mesh.shape["fsdp"]
    split_head = wanted.head and operands.student_head.shape[1] % shards == 0

    def local(operands):
        sums, gradients = _walk(plan, wanted, operands)
        sums = jax.lax.psum(sums, BATCH_AXES)
        if "student_head" in gradients:
            gradients["student_head"] = _sum_head(gradients["student_head"], split_head)
        for name in ("student_bias", "temperature"):
            if name in gradients:
                gradients[name] = jax.lax.psum(gradients[name], BATCH_AXES)
        return sums, gradients

    head_spec = PartitionSpec(None, "fsdp") if split_head else whole
    out = {"student_hidden": split, "student_head": head_spec, "student_bias": whole}
    out["temperature"] = whole
    asked = {name: out[name] for name in _gradient_names(wanted)}
    return jax.shard_map(
        local, mesh=plan.mesh, in_specs=(specs,), out_specs=(whole, asked), check_vma=False
    )(operands)


def _sum_head(gradient: Array, split: bool) -> Array:
    """Adds the devices' head gradients, leaving each with its slice of D where that divides."""
    if not split:
        return jax.lax.psum(gradient, BATCH_AXES)
    gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=1, tiled=True)
    return jax.lax.psum(gradient, "data")


def _gradient_names(wanted: Wanted) -> list[str]:
    names = {
        "student_hidden": wanted.hidden,
        "student_head": wanted.head,
        "student_bias": wanted.bias,
        "temperature": wanted.temperature,
    }
    return [name for name, asked in names.items() if asked]


def _walk(plan: Plan, wanted: Wanted, operands: Operands):
    """Scans over chunks of tokens: sums, and the gradients of the summed loss that are wanted."""
    tokens = operands.student_hidden.shape[0]
    pieces = -(-tokens // plan.chunk)
    padding = pieces * plan.chunk - tokens

    def in_chunks(array):
        padded = jnp.pad(array, ((0, padding),) + ((0, 0),) * (array.ndim - 1))
        return padded.reshape(pieces, plan.chunk, *array.shape[1:])

    split = {name: getattr(operands, name) for name in PER_TOKEN}
    split = {name: in_chunks(array) for name, array in split.items() if array is not None}
    # One cast for all chunks; without it every chunk would read the float32 master copy.
    heads = operands._replace(
        student_head=operands.student_head.astype(operands.student_hidden.dtype),
        teacher_head=None
        if operands.teacher_head is None or operands.teacher_hidden is None
        else operands.teacher_head.astype(operands.teacher_hidden.dtype),
    )
    totals = {}
    if wanted.head:
        totals["student_head"] = jnp.zeros(operands.student_head.shape, jnp.float32)
    if wanted.bias:
        assert operands.student_bias is not None, "its gradient is wanted"
        totals["student_bias"] = jnp.zeros(operands.student_bias.shape, jnp.float32)
    if wanted.temperature:
        totals["temperature"] = jnp.float32(0)

    def body(totals, chunk_rows):
        sums, gradients = head_chunk.run(plan, wanted, heads._replace(**chunk_rows))
        hidden = gradients.pop("student_hidden", None)
        return {k: totals[k] + gradients[k] for k in totals}, (sums, hidden)

    totals, (sums, hidden) = jax.lax.scan(body, totals, split)
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    if hidden is not None:
        totals["student_hidden"] = hidden.reshape(-1, hidden.shape[-1])[:tokens]
    return sums, totals
