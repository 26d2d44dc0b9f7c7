"""Divergences of a student's logits from a teacher's: the rows of the table on arrays [..., V].

Every function takes (student_logits, teacher_logits), both [..., V] of any float dtype, and returns
the divergence of each position, [...], unreduced and in float32 (float64 for float64 logits):

    T^2 * sum_v value_v(log softmax(teacher / T), log softmax(student / T))

with p the teacher's and q the student's distribution. Either side may be differentiated, and so may
the temperature; parameters such as beta may be traced and are constants to the gradient. A logit of
-inf is an impossible entry (a padded or forbidden token). An entry that only the teacher can take
makes the forward direction infinite, one that only the student can take the reverse one. A row that
holds NaN, +inf or nothing but -inf has the value NaN. A position whose value is masked has a slope
of exactly 0, whatever it holds.

Temperature and parameters are one number, or one for each position, [...]. A number that is traced
by a transformation of JAX's, such as jit, cannot be looked at.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxdistill.kernels import by_temperature, rows
from jaxdistill.kernels.statistics import LOWEST
from jaxdistill.losses import given
from jaxdistill.ranges import ENTRIES


def forward_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """KL(teacher || student): the student covers everything that the teacher says.

    T^2 sum_v p_v (log p_v - log q_v)

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2, which keeps the gradient's size as T grows.

    Returns:
      [...], nats times T^2.

    Raises:
      ConfigError: if the shapes differ, or a number is out of its range or of another shape.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(round(float(forward_kl(student, teacher)), 4))
    0.3681

    Reference: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.
    """
    return _apply("forward_kl", (), student_logits, teacher_logits, temperature, scale_by_t2)


def reverse_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """KL(student || teacher): the student says only what the teacher would.

    T^2 sum_v q_v (log q_v - log p_v)

    Args, Returns and Raises as `forward_kl`.

    Reference: Gu, Dong, Wei, Huang 2023 (MiniLLM), arXiv 2306.08543.
    """
    return _apply("reverse_kl", (), student_logits, teacher_logits, temperature, scale_by_t2)


def symmetric_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    weight: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """(1 - weight) KL(teacher || student) + weight KL(student || teacher).

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      weight: of the reverse direction, 0 to 1.
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Returns and Raises as `forward_kl`.

    Reference: Ko, Kim, Chen, Yun 2024 (DistiLLM), arXiv 2402.03898, whose code mixes the forward
    direction in its cross-entropy form; this is the KL of both.
    """
    return _apply(
        "symmetric_kl", (weight,), student_logits, teacher_logits, temperature, scale_by_t2
    )


def generalized_jsd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    At beta 0 the value is KL(teacher || student) and at 1 KL(student || teacher), which GKD's users
    expect; D / beta and D / (1 - beta) tend to these, D itself to 0, so the loss jumps at both
    ends: never schedule beta into one. At 1/2 it is bounded by log 2.
    Rounding leaves about 1e-7 of it, and never less than 0, where the models are equal.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      beta: weight of the teacher in the mixture, 0 to 1. DistiLLM's `js_distance(lam)` is 1 - lam.
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Returns and Raises as `forward_kl`.

    Reference: Agarwal et al. 2023 (GKD), arXiv 2306.13649.
    """
    return _apply(
        "generalized_jsd", (beta,), student_logits, teacher_logits, temperature, scale_by_t2
    )


def skew_forward_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    skew: ArrayLike = 0.1,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """KL(p || skew p + (1 - skew) q), bounded by -log skew.

    Rounding leaves about 1e-7 of it, and never less than 0, where the models are equal.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      skew: weight of the teacher in the mixture, 0 to 1; 0 is `forward_kl`.
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Returns and Raises as `forward_kl`.

    Reference: Ko, Kim, Chen, Yun 2024 (DistiLLM), arXiv 2402.03898.
    """
    return _apply(
        "skew_forward_kl", (skew,), student_logits, teacher_logits, temperature, scale_by_t2
    )


def skew_reverse_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    skew: ArrayLike = 0.1,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """KL(q || (1 - skew) p + skew q), the gradient flowing through q in both places.

    Rounding leaves about 1e-7 of it, and never less than 0, where the models are equal.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      skew: weight of the student in the mixture, 0 to 1; 0 is `reverse_kl`.
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Returns and Raises as `forward_kl`.

    Reference: Ko, Kim, Chen, Yun 2024 (DistiLLM), arXiv 2402.03898.
    """
    return _apply(
        "skew_reverse_kl", (skew,), student_logits, teacher_logits, temperature, scale_by_t2
    )


def total_variation(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """1/2 sum_v |p_v - q_v|, in [0, 1] at T = 1.

    1 minus it is the rate at which speculative decoding accepts the student's tokens. For small
    logits it shrinks with 1/T, not 1/T^2: with `scale_by_t2` it grows with T.

    Args, Returns and Raises as `forward_kl`.

    Reference: Wen, Li, Du, Mou 2023 (f-distill), arXiv 2307.15190.
    """
    return _apply("total_variation", (), student_logits, teacher_logits, temperature, scale_by_t2)


def alpha_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """(sum_v p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1)).

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      alpha: 0 to 1; 1 is `forward_kl`, 0 `reverse_kl`, 1/2 four times the squared Hellinger
        distance.
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Returns and Raises as `forward_kl`.

    Reference: Amari 1985; Wang et al. 2021 (AlphaNet), arXiv 2102.07954, section 3.
    """
    return _apply(
        "alpha_divergence", (alpha,), student_logits, teacher_logits, temperature, scale_by_t2
    )


def alpha_beta_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: ArrayLike = 0.2,
    beta: ArrayLike = 0.7,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """-1/(a b) sum_v (p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)), a = alpha, b = beta.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      alpha: 0 to 10; (1, 0) is `forward_kl`.
      beta: 0 to 10; (0, 1) is `reverse_kl`.
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Returns and Raises as `forward_kl`.

    Reference: Wang et al. 2025 (ABKD), arXiv 2505.04560.
    """
    parameters = (alpha, beta)
    return _apply(
        "alpha_beta_divergence",
        parameters,
        student_logits,
        teacher_logits,
        temperature,
        scale_by_t2,
    )


def _apply(
    kind: str,
    parameters: tuple[ArrayLike, ...],
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike,
    scale_by_t2: bool,
) -> Array:
    rows.make(kind, *parameters)  # raises for a number out of range, before it becomes an array
    where = f"{kind}: "
    x = given.logits(where, student_logits, teacher_logits, temperature)
    columns = tuple(
        given.column(name, value, x.student, allowed, where)
        for (name, allowed), value in zip(ENTRIES[kind].items(), parameters, strict=True)
    )
    make = rows.KINDS[kind]
    values = _divergence(make, scale_by_t2, x.teacher, x.student, x.temperature, columns)
    return x.finished(values, scale_by_t2=False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _divergence(
    make_row: Callable[..., rows.Row],
    scale_by_t2: bool,
    teacher: Array,
    student: Array,
    temperature: Array,
    parameters: tuple[Array, ...],
) -> Array:
    """sum_v value_v, times T^2 where asked for, [...]; never below 0, where rounding leaves that.

    Its derivative by the logits is the row's, which knows that 0 * inf is 0.
    """
    log_p, log_q = (_log_softmax(logits, temperature) for logits in (teacher, student))
    values = jnp.maximum(make_row(*parameters).value(log_p, log_q).sum(-1, keepdims=True), 0.0)
    return (values * temperature**2 if scale_by_t2 else values)[..., 0]


@functools.partial(_divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(
    make_row: Callable[..., rows.Row],
    scale_by_t2: bool,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[Array, Array]:
    teacher, student, temperature, parameters = primals
    row, value = make_row(*parameters), _divergence(make_row, scale_by_t2, *primals)
    log_p, log_q = (_log_softmax(logits, temperature) for logits in (teacher, student))
    moved = jnp.zeros_like(value)[..., None]
    sides = ((row.dlogp, log_p, tangents[0]), (row.dlogq, log_q, tangents[1]))
    for derivative, log_softmax, along in sides:
        if not isinstance(along, SymbolicZero):
            along = along - (jnp.exp(log_softmax) * along).sum(-1, keepdims=True)
            slope = derivative(log_p, log_q) * (temperature if scale_by_t2 else 1 / temperature)
            entries = given.endless(along, slope, ~jnp.isfinite(slope))
            moved += entries.sum(-1, keepdims=True)
    if not isinstance(tangents[2], SymbolicZero):
        slope = _by_temperature(row, scale_by_t2, teacher, student, temperature)
        moved += given.endless(tangents[2], slope, ~jnp.isfinite(slope))
    return value, moved[..., 0]


def _log_softmax(logits: Array, temperature: Array) -> Array:
    # -inf / T has the derivative inf / T^2 by T: an impossible entry is passed by the division.
    impossible = logits == -jnp.inf
    tempered = jnp.where(impossible, 0.0, logits) / temperature.astype(logits.dtype)
    return jax.nn.log_softmax(jnp.where(impossible, -jnp.inf, tempered))


def _by_temperature(
    row: rows.Row, scale_by_t2: bool, teacher: Array, student: Array, temperature: Array
) -> Array:
    """d value / d T, [..., 1]."""

    def shifted(logits: Array) -> tuple[Array, Array]:
        entries = jnp.maximum(logits - logits.max(-1, keepdims=True), LOWEST)
        scaled = entries / temperature
        return entries, jnp.log(jnp.exp(scaled).sum(-1, keepdims=True))

    (s, log_s), (z, log_z) = shifted(student), shifted(teacher)
    total = lambda entries: entries.sum(-1, keepdims=True)
    return by_temperature.slope(row, s, z, log_s, log_z, temperature, scale_by_t2, total)
