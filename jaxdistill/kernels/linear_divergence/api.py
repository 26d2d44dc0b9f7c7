"""`linear_divergence`: a divergence and cross-entropy from hidden states and heads.

For every token i with student logits s = h_S W_S^T and teacher logits t = h_T W_T^T,

    loss_i = alpha * CE(s, y_i) + (1 - alpha) * T^2 * D(softmax(t / T), softmax(s / T)).

Where a gradient is asked for, it is made while a chunk's logits exist: none are stored, none are
computed twice, and the teacher's head is read once.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks, choice, operands
from jaxdistill.kernels.linear_divergence import arguments, fused
from jaxdistill.kernels.linear_divergence.chunk import Operands
from jaxdistill.kernels.linear_divergence.mesh import layout
from jaxdistill.kernels.linear_divergence.partial import known_part, shared_part
from jaxdistill.kernels.linear_divergence.reference import reference
from jaxdistill.kernels.operands import DivergenceFunction, LossSpec
from jaxdistill.sharding import AnyMesh
from jaxdistill.types import Mean


def linear_divergence(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike | None = None,
    teacher_head: ArrayLike | None = None,
    *,
    teacher_ids: ArrayLike | None = None,
    teacher_logprobs: ArrayLike | None = None,
    teacher_rest: ArrayLike | None = None,
    sampled_ids: ArrayLike | None = None,
    sampled_logprobs: ArrayLike | None = None,
    student_columns: ArrayLike | None = None,
    teacher_columns: ArrayLike | None = None,
    other_columns: str = "mask",
    labels: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    kind: str | DivergenceFunction = "forward_kl",
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
    It has reverse mode alone (grad, vjp, and both under vmap): no jvp. A second derivative, which
    keeps the logits of all chunks, is right too: of the teacher's arrays there is none.

    Args:
      student_hidden: [N, D_S] or [B, L, D_S], after the final norm; so are all that is per token.
      student_head: [V, D_S]; cast to the dtype of the hidden states for the products, its gradient
        is accumulated in float32.
      teacher_hidden: [..., D_T], or None for cross-entropy alone.
      teacher_head: [V, D_T]; the same V, row by row the same token; any V with the columns below.
      teacher_ids: [N, K] of any integer type, in place of the teacher's hidden states and head: the
        tokens whose probabilities are known, different in each row; a negative id is none. See
        below.
      teacher_logprobs: [N, K], log p of these tokens, normalised over the vocabulary at the
        temperature of the call. A token of -inf is as one that is not listed.
      teacher_rest: [N], the mass of all other tokens; None takes what the known ones leave.
      sampled_ids: int [N], with kind "generalized_reverse_kl": a token that the student has drawn
        at the temperature of the call; a negative id is none.
      sampled_logprobs: [N], log p of it.
      student_columns: int [C], ascending: the rows of the student's head whose tokens the teacher
        has too. The divergence then compares these; cross-entropy stays over all of the student's.
        Where devices share the vocabulary, each adds up its share of the [chunk, C] entries of
        either model, and holds the [chunk, C] slopes of all: with C near V that is as much as the
        chunk's logits on one device. The default `chunk` counts them; a smaller one takes less.
      teacher_columns: int [C], the teacher's rows of the same tokens, each once.
      other_columns: "mask" compares distributions over the C alone, two or more; "bucket" keeps the
        mass of all others as one more entry of either side.
      labels: int [N], the token each position predicts; None leaves cross-entropy out (alpha must
        then be 0). A label of -100 gives its token the weight 0, in every sum and count. Any other
        counted label that is no row of the heads makes the loss NaN.
      mask: bool or float [N], weight of each token in the loss; default 1. A token of weight 0
        contributes exactly 0 to value and gradient, whatever its hidden states hold.
      kind: the divergence: a key of `kernels.rows.KINDS` (`forward_kl` is KL(teacher || student)),
        or a function (student_logits / T, teacher_logits / T, labels) -> [n] of whole rows, float32
        [n, V], differentiated chunk by chunk. It must be hashable; another object compiles anew.
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
      chunk: tokens per chunk and device; default from V and the device. On a GPU it is rounded up
        to whole tiles of 64 tokens, and the last chunk padded.
      logits_dtype: of a chunk's logits in memory; default that of the hidden states. Products
        accumulate in float32 and the arithmetic on logits is float32 in any case. With float32 a
        bfloat16 model's logits are not rounded, at twice the traffic.
      implementation: of the row statistics, see `kernels.support`; None takes the best that runs.
        "reference" is the definition itself, in plain jnp, with all logits [N, V] in memory.
      monitor: traced bool: whether the metrics at T = 1 are made. False saves their sums, and their
        means count 0 tokens. None makes them.
      mesh: with axes data, fsdp, tensor, context: their devices share the tokens, or the rows of
        the heads where that moves less; a function as `kind` always sees whole rows.
      vocab_axes: inside a shard_map of your own (check_vma=False), with `mesh` None: its axes that
        share the heads' rows. The call then sees this device's tokens and rows. `labels` count over
        all rows, sums are over this device's tokens, and the hidden states' gradient is summed over
        these axes. The gradient of an array that other devices hold too, such as a head that all
        tokens share, is this device's part: add the parts with psum.

    With `teacher_ids` the kinds are those of `kernels.sparse.KINDS`, sums over the known tokens K:

        forward_kl               sum_K p (log p - log q) + p_rest (log p_rest - log q_rest)
        generalized_forward_kl   sum_K p (log p - log q) - p + q
        generalized_reverse_kl   sum_K q (log q - log p) - q + p
        cross_entropy            -sum_K p log q

    Whatever K is, the first is at most KL(p || q) and grows to it with K, the next two are at most
    the KL of their direction, are never negative and 0 only where q = p on K, and the last, of
    tokens drawn from p with their share of the draws as p, has cross-entropy from p as its mean.
    With `sampled_ids` the third gains [y not in K] l grad log q_y, l = log q_y - log p_y: over
    y ~ q its mean is KL(q || p) in value and gradient. TAID and divergences of mixtures need whole
    rows. The gradient by T holds the teacher's numbers as they are. Traced numbers are not checked,
    nor are log-probabilities beside traced ids or a traced mask, which say where one counts: an id
    that stands twice counts once, a log-probability above 0 is 0, probabilities that sum above 1
    stay as they are and leave no rest, a rest outside [0, 1] is brought there, and an id that is no
    row of the head, or a NaN that is read, makes the loss NaN. A traced column that is no row of
    its head, or stands twice, is left out with its partner; any order will do.

    Returns:
      The scalar float32 loss, and constants for monitoring as `Mean`s over the weights:
      `loss/ce`, `loss/divergence` (with its T^2), with TAID `loss/target_entropy` (of its target),
      `loss/kl_t1` (KL(teacher || student) at T = 1),
      `agree/top1` (both have a common most likely token), `teacher/entropy`, `student/entropy`;
      nats. With `teacher_ids`, in place of what needs whole rows: `teacher/kept_mass` of the known
      tokens, `student/kept_mass` at T = 1, `agree/top_k`: the share of the known tokens that are
      among the student's K most likely. With columns, `loss/kl_t1` and `agree/top1` are of what is
      compared, and `student/kept_mass` and `teacher/kept_mass` say how much of either row that is.

    Raises:
      ConfigError: for an unknown kind or reduction, shapes or types that do not fit, a number out
        of its range, alpha without labels, an implementation that cannot run, or numbers of
        `teacher_ids` and its like that break the rules. A number that is traced by a
        transformation of JAX's, such as jit, cannot be looked at.

    >>> import jax.numpy as jnp
    >>> hidden = jnp.ones((1, 1))
    >>> student, teacher = jnp.log(jnp.array([[0.5, 0.5]])).T, jnp.log(jnp.array([[0.9, 0.1]])).T
    >>> loss, means = linear_divergence(hidden, student, hidden, teacher)
    >>> print(round(float(loss), 4), round(float(means["teacher/entropy"].value), 4))
    0.3681 0.3251

    Reference: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2 (T^2); arXiv 2503.16870 (the
    ghost), 2606.30406, eq. 5 (the generalised forms).
    """
    arrays = arguments.arrays(student_hidden, student_head, student_bias, prefix="student_")
    teacher = arguments.teacher(teacher_hidden, teacher_head, teacher_bias, teacher_softcap, taid_t)
    # The walk has no slope by them; a slope of its slopes must have none either.
    teacher = jax.lax.stop_gradient(teacher)
    dims, vocab = arrays[0].shape[:-1], arrays[1].shape[0]
    softcaps = (student_softcap, teacher_softcap)
    axes = arguments.vocabulary_axes(vocab_axes, implementation)
    tokens: dict[str, ArrayLike | None] = {
        "teacher_ids": teacher_ids,
        "teacher_logprobs": teacher_logprobs,
        "teacher_rest": teacher_rest,
        "sampled_ids": sampled_ids,
        "sampled_logprobs": sampled_logprobs,
    }
    per_token = operands.per_token(labels, mask, dims)
    some = checks.counted(dims, mask, labels)
    taid, taught = taid_t is not None, vocab if teacher[1] is None else teacher[1].shape[0]
    whole = lambda rows: rows * (jax.lax.axis_size(axes) if axes else 1)
    known = known_part(kind, taid or bool(parameters), teacher[1], dims, whole(vocab), tokens, some)
    columns = shared_part(
        kind, taid or known is not None, teacher[1], (whole(vocab), whole(taught)),
        (student_columns, teacher_columns), other_columns,
    )  # fmt: skip
    rows_of, row_kind = taught if columns else vocab, "forward_kl" if known else kind
    arguments.check_choices(row_kind, parameters, reduction, dims, rows_of, teacher, softcaps)
    operands.check_numbers(alpha, temperature, taid_t, label_smoothing, parameters, dims, some)
    operands.check_alpha(alpha, labels)
    arguments.check_pieces(chunk, logits_dtype, monitor)
    x = Operands(
        *arrays, *teacher, *per_token, known=known, columns=columns,
        coefficients=operands.coefficients(alpha, temperature, parameters, taid_t, label_smoothing),
        monitor=None if monitor is None else jnp.asarray(monitor, bool),
    )  # fmt: skip
    has_teacher = x.teacher_head is not None
    if labels is None and not has_teacher and known is None:
        raise ConfigError("there is nothing to learn from: give labels, a teacher, or both")
    at_one = checks.known(temperature) == 1
    loss = LossSpec(
        kind if has_teacher or known else None, labels is not None, scale_by_t2, at_one=at_one
    )
    if implementation == choice.REFERENCE:
        dtype = jnp.dtype(logits_dtype or x.student_hidden.dtype)
        return _means(reference(loss, softcaps, dtype, x, other_columns), reduction)
    operands.check_manual_axes(x)
    place = layout(mesh, dims, vocab, has_teacher and not isinstance(kind, str), axes)
    loss = dataclasses.replace(loss, vocab_axes=place.vocab)
    static = arguments.static(x, place, loss, softcaps, chunk, logits_dtype, implementation)
    static = dataclasses.replace(static, others=other_columns)
    return _means(fused.loss_sums((static, place), x), reduction)


def _means(sums: dict[str, Array], reduction: str) -> tuple[Array, dict[str, Mean]]:
    """The loss, a sum or the mean over the weights, and the means for monitoring."""
    total = sums.pop("loss")
    # Constants, and told so: under vmap the examples may share them, and no slope may run there.
    count, monitored = (jax.lax.stop_gradient(sums.pop(name)) for name in ("count", "monitored"))
    if reduction == "mean":
        total = Mean(total, count).value
    counts = {name: count for name in ("loss/ce", "loss/divergence", "loss/target_entropy")}
    return total, {
        name: Mean(jax.lax.stop_gradient(part), counts.get(name, monitored))
        for name, part in sums.items()
    }
