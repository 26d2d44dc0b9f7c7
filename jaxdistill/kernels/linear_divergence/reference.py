"""The definition of `linear_divergence` in plain jnp, with JAX's own gradient and all logits.

    s = cap(h_S W_S^T + b_S)    t = cap(h_T W_T^T + b_T)    [N, V], rounded to the logits' dtype
    sums = sum_i weight_i (loss_i of `divergence`, its terms, and the metrics at T = 1)

In float32, or in float64 where the hidden states are float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.kernels import rows
from jaxdistill.kernels.columns.definition import Columns, pick, shared_columns
from jaxdistill.kernels.divergence.reference import Terms, terms
from jaxdistill.kernels.linear_divergence.chunk import Operands
from jaxdistill.kernels.operands import Coefficients, LossSpec
from jaxdistill.kernels.softcap import soft_cap
from jaxdistill.kernels.sparse.definition import SparseTeacher, is_known, silence
from jaxdistill.kernels.sparse.reference import divergence as sparse_divergence
from jaxdistill.kernels.statistics import LOWEST


def reference(
    spec: LossSpec,
    softcaps: tuple[float | None, float | None],
    logits_dtype: DTypeLike,
    x: Operands,
    others: str = "mask",
) -> dict[str, Array]:
    """Sums over the tokens by name: "loss", "count", "monitored" and the metrics, [].

    Args:
      spec: what is computed.
      softcaps: of the student's and the teacher's logits.
      logits_dtype: in which logits are rounded.
      x: all arrays; metrics are made whatever `monitor` is.
      others: what becomes of columns that only one vocabulary has.
    """
    dims = x.student_hidden.ndim - 1

    def flat(a: Array) -> Array:
        return a.reshape(-1, *a.shape[dims:])

    weights = jax.lax.stop_gradient(flat(x.weights))
    counted = weights != 0

    def logits(hidden: Array, head: Array, bias: Array | None, softcap: float | None) -> Array:
        hidden = jnp.where(counted[:, None], flat(hidden), 0)
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        products = jnp.matmul(hidden, head.astype(hidden.dtype).T, preferred_element_type=wide)
        if bias is not None:
            products += bias.astype(wide)[None, :]
        return soft_cap(products, softcap).astype(logits_dtype)

    s, t = logits(x.student_hidden, x.student_head, x.student_bias, softcaps[0]), None
    if x.teacher_hidden is not None and x.teacher_head is not None:
        t = logits(x.teacher_hidden, x.teacher_head, x.teacher_bias, softcaps[1])
    y = None if x.labels is None else jnp.where(counted, flat(x.labels), 0)
    temperature = x.coefficients.temperature
    if temperature.ndim:
        temperature = jnp.where(counted, flat(temperature), 1.0)
    coefficients = x.coefficients._replace(temperature=temperature)
    known = None if x.known is None else silence(jax.tree.map(flat, x.known), counted)
    if known is not None:
        values = _sparse_terms(spec, s, known, y, coefficients)
    elif x.columns is not None and t is not None:
        values = _column_terms(spec, s, t, y, coefficients, x.columns, others)
    else:
        values = terms(spec, s, t, y, coefficients)

    log_softmax = lambda z: jax.nn.log_softmax(z.astype(values.loss.dtype))
    entropy = lambda log_p: -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    log_q = log_softmax(s)
    per_token = {"loss": values.loss, "student/entropy": entropy(log_q)}
    if y is not None:
        per_token["loss/ce"] = values.cross_entropy
    if t is not None and values.target is not None:
        log_p = log_softmax(t)
        top = (s == s.max(1, keepdims=True)) & (t == t.max(1, keepdims=True))
        per_token["loss/divergence"] = values.divergence
        per_token["loss/kl_t1"] = _kl(log_p, log_q)
        per_token["agree/top1"] = jnp.any(top, axis=1)
        per_token["teacher/entropy"] = entropy(log_p)
        if x.coefficients.taid_t is not None and isinstance(spec.kind, str):
            column = temperature[:, None] if temperature.ndim else temperature
            per_token["loss/target_entropy"] = entropy(log_softmax(values.target / column))
    if known is not None:
        per_token["loss/divergence"] = values.divergence
        per_token |= _sparse_metrics(log_q, known)
    elif x.columns is not None and t is not None:
        per_token["loss/divergence"] = values.divergence
        per_token |= _column_metrics(log_q, log_softmax(t), x.columns, others)
    sums = {name: jnp.sum(weights * jnp.where(counted, x, 0)) for name, x in per_token.items()}
    return sums | {"count": jnp.sum(weights), "monitored": jnp.sum(weights)}


def _sparse_terms(
    spec: LossSpec, s: Array, known: SparseTeacher, y: Array | None, coefficients: Coefficients
) -> Terms:
    """The loss of each row beside a teacher of whom some tokens are known."""
    alone = dataclasses.replace(spec, kind=None)
    values, alpha, temperature = terms(alone, s, None, y, coefficients), *coefficients[:2]
    assert isinstance(spec.kind, str), "checked where it was given"
    wide = jnp.maximum(s.astype(values.loss.dtype), LOWEST)
    tempered = wide / (temperature[:, None] if temperature.ndim else temperature)
    divergence = sparse_divergence(spec.kind, tempered, known)
    if spec.scale_by_t2:
        divergence *= temperature**2
    return values._replace(loss=values.loss + (1 - alpha) * divergence, divergence=divergence)


def _column_terms(
    spec: LossSpec,
    s: Array,
    t: Array,
    y: Array | None,
    coefficients: Coefficients,
    columns: Columns,
    others: str,
) -> Terms:
    """The loss of each row of two models that share only some columns."""
    alone = dataclasses.replace(spec, kind=None)
    values, alpha, temperature = terms(alone, s, None, y, coefficients), *coefficients[:2]
    column = temperature[:, None] if temperature.ndim else temperature
    wide = lambda z: jnp.maximum(z.astype(values.loss.dtype), LOWEST) / column
    assert isinstance(spec.kind, str), "checked where it was given"
    log_q, log_p = _shared(wide(s), jax.lax.stop_gradient(t) / column, columns, others)
    row = rows.make(spec.kind, *jax.lax.stop_gradient(coefficients.parameters))
    divergence = rows.not_below_zero(jnp.sum(row.value(log_p, log_q), axis=1))
    if spec.scale_by_t2:
        divergence *= temperature**2
    return values._replace(loss=values.loss + (1 - alpha) * divergence, divergence=divergence)


def _shared(s: Array, t: Array, columns: Columns, others: str) -> tuple[Array, Array]:
    """Log-probabilities of what both rows share."""
    seen = (shared_columns(z, c, others=others) for z, c in zip((s, t), columns, strict=True))
    log_q, log_p = map(jax.nn.log_softmax, seen)
    return log_q, log_p


def _column_metrics(log_q: Array, log_p: Array, columns: Columns, others: str) -> dict[str, Array]:
    mass = lambda log, columns: jnp.sum(jnp.exp(pick(log, columns)), axis=1)
    shared_q, shared_p = _shared(log_q, log_p, columns, others)
    leads = lambda log: log == log.max(1, keepdims=True)
    return {
        "teacher/entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=1),
        "student/kept_mass": mass(log_q, columns.student),
        "teacher/kept_mass": mass(log_p, columns.teacher),
        "loss/kl_t1": _kl(shared_p, shared_q),
        "agree/top1": jnp.any(leads(shared_q) & leads(shared_p), axis=1),
    }


def _kl(log_p: Array, log_q: Array) -> Array:
    return jnp.maximum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1), 0.0)


def _sparse_metrics(log_q: Array, known: SparseTeacher) -> dict[str, Array]:
    counts = is_known(known)
    picked = jnp.take_along_axis(log_q, jnp.maximum(known.ids, 0), axis=1)
    least = jnp.sort(log_q, axis=1)[:, -min(known.ids.shape[1], log_q.shape[1]), None]
    within = lambda array: jnp.sum(jnp.where(counts, array, 0.0), axis=1)
    return {
        "student/kept_mass": within(jnp.exp(picked)),
        "teacher/kept_mass": within(jnp.exp(known.logprobs)),
        "agree/top_k": within(picked >= least) / jnp.maximum(within(counts), 1),
    }
