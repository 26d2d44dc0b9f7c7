"""Cross-entropy and a divergence from hidden states and heads, chunk by chunk: [N, V] never exists.

For every token i with student logits s = h_S W_S^T and teacher logits t = h_T W_T^T,

    loss_i = alpha * CE(s, y_i) + (1 - alpha) * T^2 * D(softmax(t / T), softmax(s / T)).

A `lax.scan` walks over chunks of tokens. Where a gradient is asked for, it is made in the same
walk, while the chunk's logits exist, so that no logits are kept and none are computed twice: the
teacher's head is read once. On a mesh every device walks over its own tokens and the sums are added
at the end.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxdistill.kernels import rows
from jaxdistill.sharding import BATCH_AXES, AnyMesh
from jaxdistill.types import Mean

# float32 logits of one chunk: small enough to stay near a CPU's caches, large enough that a GPU or
# TPU reads the heads from memory few times (at V = 128,256 that is 2,048 tokens).
_CHUNK_BYTES = {"cpu": 16 * 2**20}
_CHUNK_BYTES_ACCELERATOR = 2**30


class _Operands(NamedTuple):
    """Everything the loss reads; a leaf that is absent is None."""

    student_hidden: Array
    student_head: Array
    student_bias: Array | None
    teacher_hidden: Array | None
    teacher_head: Array | None
    teacher_bias: Array | None
    labels: Array | None
    weights: Array
    alpha: Array
    temperature: Array
    parameters: tuple[Array, ...]


_PER_TOKEN = ("student_hidden", "teacher_hidden", "labels", "weights")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static half of a call."""

    kind: str
    scale_by_t2: bool
    chunk: int
    mesh: AnyMesh | None


class _Wanted(NamedTuple):
    """Which gradients a forward pass has to make on its way."""

    hidden: bool = False
    head: bool = False
    bias: bool = False
    temperature: bool = False

    @property
    def any(self) -> bool:
        return any(self)


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
    operands = _Operands(
        *arrays,
        *teacher,
        None if labels is None else jnp.asarray(labels),
        weights.astype(jnp.float32),
        jnp.asarray(alpha, jnp.float32),
        jnp.asarray(temperature, jnp.float32),
        tuple(jnp.asarray(parameter, jnp.float32) for parameter in parameters),
    )
    plan = _Plan(kind, scale_by_t2, chunk or chunk_size(tokens // devices, vocab), mesh)
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
def _loss_sums(plan: _Plan, operands: _Operands) -> dict[str, Array]:
    return _on_mesh(plan, _Wanted(), operands)[0]


def _loss_sums_fwd(plan: _Plan, primals: Any):  # operands with a CustomVJPPrimal for each leaf
    operands = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
    wanted = _Wanted(
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


def _loss_sums_bwd(plan: _Plan, residuals, cotangents):
    gradients, operands = residuals
    cotangent = cotangents["loss"]
    if not isinstance(cotangent, jax.Array):  # symbolic zero: nothing depends on the loss
        return (jax.tree.map(lambda _: None, operands),)
    scaled = {
        name: (cotangent * gradient).astype(gradient.dtype) for name, gradient in gradients.items()
    }
    return (_Operands._make(scaled.get(name) for name in _Operands._fields),)


_loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd, symbolic_zeros=True)


# ------------------------------------------------------------------------------------- the walk


def _on_mesh(plan: _Plan, wanted: _Wanted, operands: _Operands):
    """The walk on one device, or on every device over its own tokens."""
    if plan.mesh is None:
        return _walk(plan, wanted, operands)
    split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    specs = _Operands._make(
        None if leaf is None else split if name in _PER_TOKEN else whole
        for name, leaf in zip(_Operands._fields, operands, strict=True)
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


def _gradient_names(wanted: _Wanted) -> list[str]:
    names = {
        "student_hidden": wanted.hidden,
        "student_head": wanted.head,
        "student_bias": wanted.bias,
        "temperature": wanted.temperature,
    }
    return [name for name, asked in names.items() if asked]


def _walk(plan: _Plan, wanted: _Wanted, operands: _Operands):
    """Scans over chunks of tokens: sums, and the gradients of the summed loss that are wanted."""
    tokens = operands.student_hidden.shape[0]
    pieces = -(-tokens // plan.chunk)
    padding = pieces * plan.chunk - tokens

    def in_chunks(array):
        padded = jnp.pad(array, ((0, padding),) + ((0, 0),) * (array.ndim - 1))
        return padded.reshape(pieces, plan.chunk, *array.shape[1:])

    split = {name: getattr(operands, name) for name in _PER_TOKEN}
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
        sums, gradients = _chunk(plan, wanted, heads._replace(**chunk_rows))
        hidden = gradients.pop("student_hidden", None)
        return {k: totals[k] + gradients[k] for k in totals}, (sums, hidden)

    totals, (sums, hidden) = jax.lax.scan(body, totals, split)
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    if hidden is not None:
        totals["student_hidden"] = hidden.reshape(-1, hidden.shape[-1])[:tokens]
    return sums, totals


class _Softmax(NamedTuple):
    """Logits of one model and what turns them into log-probabilities.

    Maximum and log-sum stay two numbers: added into one, logits of 300 would cost the
    log-probabilities their last five bits. Only the logits are kept at [n, V]: each sum reads them
    once and makes its exponentials anew, which costs less than memory does.
    """

    logits: Array  # [n, V] float32, as the product gives them
    top: Array  # [n, 1] their maximum
    log_sum: Array  # [n, 1] logsumexp of logits - top
    log_sum_t: Array  # [n, 1] logsumexp of (logits - top) / T
    cold: Array  # [] 1 / T

    @property
    def log_probs(self) -> Array:
        """log softmax(logits), [n, V]."""
        return (self.logits - self.top) - self.log_sum

    @property
    def log_probs_t(self) -> Array:
        """log softmax(logits / T), [n, V]."""
        return (self.logits - self.top) * self.cold - self.log_sum_t


def _softmax(hidden: Array, head: Array, bias: Array | None, temperature: Array) -> _Softmax:
    logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[None, :]
    cold = 1 / temperature
    top = jnp.max(logits, axis=1, keepdims=True)
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - top), axis=1, keepdims=True))
    log_sum_t = jnp.log(jnp.sum(jnp.exp((logits - top) * cold), axis=1, keepdims=True))
    return _Softmax(logits, top, log_sum, log_sum_t, cold)


def _chunk(plan: _Plan, wanted: _Wanted, x: _Operands):
    """Sums and gradients of one chunk of tokens."""
    # A token of weight 0 may hold anything, NaN included: give it harmless hidden states.
    counted = x.weights != 0
    quiet = lambda hidden: jnp.where(counted[:, None], hidden, 0)
    hidden = quiet(x.student_hidden)
    total = lambda per_token: jnp.sum(per_token * x.weights)
    student = _softmax(hidden, x.student_head, x.student_bias, x.temperature)
    sums = {"count": jnp.sum(x.weights), "student/entropy": total(_entropy(student))}
    loss = jnp.float32(0)
    slopes = []  # d loss_i / d logits, [n, V], one term per part of the loss
    gradients: dict[str, Array] = {}
    if x.labels is not None:
        at_label = jnp.take_along_axis(student.logits, x.labels[:, None], axis=1, mode="clip")
        cross_entropy = student.log_sum - (at_label - student.top)
        sums["loss/ce"] = total(cross_entropy[:, 0])
        loss += x.alpha * sums["loss/ce"]
        is_label = jax.lax.broadcasted_iota(jnp.int32, student.logits.shape, 1) == x.labels[:, None]
        slopes.append(x.alpha * (jnp.exp(student.log_probs) - is_label))
    if x.teacher_hidden is not None and x.teacher_head is not None:
        teacher = _softmax(quiet(x.teacher_hidden), x.teacher_head, x.teacher_bias, x.temperature)
        sums |= _agreement(student, teacher, total)
        value, slope, slope_t = _divergence(
            plan, rows.make(plan.kind, *x.parameters), x.temperature, student, teacher
        )
        sums["loss/divergence"] = total(value)
        loss += (1 - x.alpha) * sums["loss/divergence"]
        slopes.append((1 - x.alpha) * slope)
        if wanted.temperature:
            gradients["temperature"] = (1 - x.alpha) * total(slope_t)
    sums["loss"] = loss
    if wanted.hidden or wanted.head or wanted.bias:
        gradients |= _pull_back(wanted, sum(slopes) * x.weights[:, None], hidden, x.student_head)
    return sums, gradients


def _entropy(model: _Softmax) -> Array:
    """-sum p log p at T = 1, [n]."""
    return -jnp.sum(jnp.exp(model.log_probs) * model.log_probs, axis=1)


def _agreement(student: _Softmax, teacher: _Softmax, total) -> dict[str, Array]:
    """What is worth knowing at T = 1, from logits that exist anyway."""
    # Comparing with the maxima beats two argmax passes; a tie counts as agreement.
    same_top = jnp.any((student.logits == student.top) & (teacher.logits == teacher.top), axis=1)
    gap = teacher.log_probs - student.log_probs
    return {
        "loss/kl_t1": total(jnp.sum(jnp.exp(teacher.log_probs) * gap, axis=1)),
        "agree/top1": total(same_top),
        "teacher/entropy": total(_entropy(teacher)),
    }


def _divergence(
    plan: _Plan, row: rows.Row, temperature: Array, student: _Softmax, teacher: _Softmax
):
    """Per token: T^2 D, d(T^2 D) / d student logits [n, V], and d(T^2 D) / d T."""
    log_q, log_p = student.log_probs_t, teacher.log_probs_t
    scale = temperature**2 if plan.scale_by_t2 else jnp.float32(1)
    value = jnp.sum(row.value(log_p, log_q), axis=1)
    toward = _through_softmax(row.dlogq(log_p, log_q), log_q)
    from_teacher = _through_softmax(row.dlogp(log_p, log_q), log_p)
    # u = z / T, so du/dT = -z / T^2; rows of either slope sum to 0, so shifted logits serve.
    moved = toward * (student.logits - student.top) + from_teacher * (teacher.logits - teacher.top)
    slope_t = -scale * jnp.sum(moved, axis=1) / temperature**2
    if plan.scale_by_t2:
        slope_t = slope_t + 2 * temperature * value
    return scale * value, scale / temperature * toward, slope_t


def _through_softmax(slope: Array, log_probs: Array) -> Array:
    """From d/d log-probabilities to d/d logits: g - q * sum(g)."""
    return slope - jnp.exp(log_probs) * jnp.sum(slope, axis=1, keepdims=True)


def _pull_back(wanted: _Wanted, slope: Array, hidden: Array, head: Array) -> dict[str, Array]:
    """From d/d logits to hidden states, head and bias."""
    gradients = {}
    narrow = slope.astype(hidden.dtype)
    if wanted.hidden:
        gradients["student_hidden"] = jnp.einsum(
            "nv,vd->nd", narrow, head, preferred_element_type=jnp.float32
        ).astype(hidden.dtype)
    if wanted.head:
        gradients["student_head"] = jnp.einsum(
            "nv,nd->vd", narrow, hidden, preferred_element_type=jnp.float32
        )
    if wanted.bias:
        gradients["student_bias"] = jnp.sum(slope, axis=0)
    return gradients
