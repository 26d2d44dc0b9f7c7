"""Divergences that need whole rows of logits: sorted, chosen per token, or split at the label.

Each takes (student_logits, teacher_logits), [..., V] of any float dtype, and returns [...] in
float32, unreduced, times T^2 where `scale_by_t2`. The fused head loss runs them on chunks of rows:

    linear_divergence(..., kind=whole_rows.bound("adaptive_kl", mu=0.5))
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.kernels.operands import FARTHEST
from jaxdistill.losses import divergences, given
from jaxdistill.losses.likelihood import cross_entropy
from jaxdistill.ranges import COMMON, ENTRIES, WHOLE_ROWS

# Logits are clamped here: what is impossible for both counts nothing, and nothing is infinite.
_LOWEST = -1e30


def adaptive_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    mu: float = 0.5,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """AKL: w_h KL(p || q) + w_t KL(q || p), weighed by where student and teacher are apart.

    The head holds the teacher's most likely tokens up to a mass of `mu` (always the first), the
    tail the rest; w_h is the head's share of sum_v |p_v - q_v|, w_t the tail's. The weights are
    constants to the gradient; where p = q they are 1/2.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      mu: mass of the head, 0 to 1.
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Raises:
      ConfigError: for another mu, or shapes that differ.

    Reference: Wu et al. 2024, arXiv 2404.02657, and its code (LLM_KD_AKL).
    """
    _check("adaptive_kl", mu=mu)
    x, student, teacher = _tempered(student_logits, teacher_logits, temperature)
    p, q = (jax.lax.stop_gradient(jax.nn.softmax(x)) for x in (teacher, student))
    gap = jnp.abs(p - q)
    in_tail = jnp.sum(jnp.where(_most_likely(p, mu), 0.0, gap), axis=-1)
    whole = jnp.sum(gap, axis=-1)
    weight = jnp.where(whole == 0, 0.5, in_tail / jnp.where(whole == 0, 1.0, whole))
    forward = divergences.forward_kl(student, teacher)
    reverse = divergences.reverse_kl(student, teacher)
    return x.finished((1 - weight) * forward + weight * reverse, scale_by_t2)


def _most_likely(p: Array, mu: float) -> Array:
    """The first entries of a stable sort of p, descending, up to a mass of `mu`; at least one.

    Nothing is sorted, which would cost several times the rest of the loss: bisection finds the
    threshold, by one sum over the row for each bit of a float, and then where its ties end.
    """
    whole = np.dtype(f"int{8 * p.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(p, whole)  # as whole numbers they are in the same order
    one = int(np.ones((), p.dtype).view(whole))
    # Rounding may add up to more than 1.
    mass = lambda chosen: jnp.minimum(_count(jnp.where(chosen, p, 0.0)), 1.0)
    threshold = _smallest(-1, one, lambda x: mass(bits > x) <= mu, bits[..., :1])
    tie = bits == threshold
    height = jnp.max(jnp.where(tie, p, 0.0), axis=-1, keepdims=True)
    room = (mu - mass(bits > threshold)) / jnp.where(height > 0, height, 1.0)
    index = jax.lax.broadcasted_iota(whole, p.shape, p.ndim - 1)
    rest = _count(tie) - jnp.floor(room)
    end = _smallest(0, p.shape[-1], lambda x: _count(tie & (index >= x)) <= rest, bits[..., :1])
    first = index == jnp.argmax(p, axis=-1, keepdims=True)
    return (bits > threshold) | (tie & (index < end)) | first


def _count(chosen: Array) -> Array:
    return jnp.sum(chosen, axis=-1, keepdims=True)


def _smallest(low: int, high: int, holds: Callable[[Array], Array], like: Array) -> Array:
    """Per row the smallest integer from `low` for which `holds`, as from there up to `high`."""

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        below = holds(middle)
        return jnp.where(below, low, middle + 1), jnp.where(below, middle, high)

    # Made of `like`, and so as varying over a mesh as what is compared with them.
    bounds = tuple(like * 0 + bound for bound in (low, high))
    return jax.lax.fori_loop(0, (high - low).bit_length(), halve, bounds)[1]


def alphanet(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alphas: tuple[float, float] = (-1.0, 1.0),
    clip: float = 5.0,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """AlphaNet's surrogate: per token the alpha-divergence that is larger, its ratios clipped.

    With r = p / q and rho = r at alpha = 1, log r - 1 at 0, else min(r^alpha, clip) / alpha
    + 1 / (alpha (alpha - 1)), it is -sum_v sg(q_v rho_v) log q_v of the alpha whose divergence
    (`alphanet_value`) is larger: right in its gradient, not a divergence in its value.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      alphas: the two orders.
      clip: largest r^alpha.
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Raises:
      ConfigError: if clip is not positive, or shapes differ.

    Reference: Wang et al. 2021, arXiv 2102.07954, and its code for the surrogate.
    """
    checks.number("clip", clip, WHOLE_ROWS["alphanet"]["clip"])
    x, student, teacher = _tempered(student_logits, teacher_logits, temperature)
    first, second = (_alpha(student, teacher, alpha, clip) for alpha in alphas)
    return x.finished(jnp.where(first[0] > second[0], first[1], second[1]), scale_by_t2)


def alphanet_value(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alphas: tuple[float, float] = (-1.0, 1.0),
    clip: float = 5.0,
    temperature: ArrayLike = 1.0,
) -> Array:
    """The larger of AlphaNet's two clipped divergences, for watching; it carries no gradient.

    max over alpha of sum_v q (min(r^alpha, clip) - 1) / (alpha (alpha - 1)),    r = p / q

    Args and Raises as `alphanet`.
    """
    checks.number("clip", clip, WHOLE_ROWS["alphanet"]["clip"])
    x, student, teacher = _tempered(student_logits, teacher_logits, temperature)
    values = [_alpha(student, teacher, alpha, clip)[0] for alpha in alphas]
    return jax.lax.stop_gradient(x.finished(jnp.maximum(*values), scale_by_t2=False))


def _alpha(student: Array, teacher: Array, alpha: float, clip: float) -> tuple[Array, Array]:
    """(divergence, surrogate) of one order, of logits that are divided by T already."""
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    constant = jax.lax.stop_gradient
    q, p, log_r = constant(jnp.exp(log_q)), constant(jnp.exp(log_p)), constant(log_p - log_q)
    if abs(alpha) < 1e-3:
        held = jnp.minimum(log_r, jnp.log(clip))
        entries, weight = -q * held, q * (held - 1)
    elif abs(alpha - 1) < 1e-3:
        # q r is p itself, also where q is too small for float32 and r too large.
        entries, weight = p * log_r, p
    else:
        powered = jnp.minimum(alpha * log_r, jnp.log(clip))
        base = 1 / (alpha * (alpha - 1))
        weighed = jnp.exp(constant(log_q) + powered)  # q r^alpha, clipped, as one exponential
        entries, weight = (weighed - q) * base, weighed / alpha + q * base
    total = lambda weight, x: jnp.sum(jnp.where(weight == 0, 0.0, weight * x), axis=-1)
    return jnp.sum(jnp.where(entries == 0, 0.0, entries), axis=-1), -total(weight, log_q)


def decoupled_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    target_weight: float = 1.0,
    rest_weight: float = 0.5,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """DKD: target_weight TCKD + rest_weight NCKD, the parts of KL(p || q) at a label apart.

    TCKD = KL((p_y, 1 - p_y) || (q_y, 1 - q_y)), NCKD = KL(p without y || q without y), each
    normalised; KL(p || q) = TCKD + (1 - p_y) NCKD.

    Args:
      student_logits: [..., V], V at least 2.
      teacher_logits: [..., V].
      labels: int [...]; a negative one is no label and gives 0.
      target_weight: of TCKD.
      rest_weight: of NCKD.
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Raises:
      ConfigError: if shapes do not fit.

    Reference: Zhao et al. 2022, arXiv 2203.08679; the weights are those of TAID's port.
    """
    _check("decoupled_kl", target_weight=target_weight, rest_weight=rest_weight)
    x, student, teacher = _tempered(student_logits, teacher_logits, temperature)
    labels = checks.array("labels", labels)
    checks.per_token("labels", labels, student.shape[:-1], jnp.integer)
    target = jnp.maximum(labels, 0)
    log_q, log_p = (-cross_entropy(x, target) for x in (student, teacher))
    is_target = jax.nn.one_hot(target, student.shape[-1], dtype=jnp.bool_)
    without = lambda x: jnp.where(is_target, _LOWEST, x)
    # log(1 - p_y) from the other logits: exact where p_y is nearly 1.
    rest = lambda x: jax.nn.logsumexp(without(x), axis=-1) - jax.nn.logsumexp(x, axis=-1)
    rest_q, rest_p = rest(student), rest(teacher)
    tckd = jnp.exp(log_p) * (log_p - log_q) + jnp.exp(rest_p) * (rest_p - rest_q)
    nckd = divergences.forward_kl(without(student), without(teacher))
    value = jnp.where(labels < 0, 0.0, target_weight * tckd + rest_weight * nckd)
    return x._replace(spoiled=x.spoiled & (labels >= 0)).finished(value, scale_by_t2)


def smoothed_forward_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    target_smoothing: float = 0.1,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """KL((1 - eps) p + eps / V || q): the teacher's distribution smoothed, eps = target_smoothing.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      target_smoothing: eps, 0 to 1; spread over the tokens that are possible.
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Raises:
      ConfigError: for another eps, or shapes that differ.
    """
    _check("smoothed_forward_kl", target_smoothing=target_smoothing)
    x, student, teacher = _tempered(student_logits, teacher_logits, temperature)
    possible = (teacher > FARTHEST) | (student > FARTHEST)
    share = target_smoothing / jnp.sum(possible, axis=-1, keepdims=True)
    p = (1 - target_smoothing) * jax.nn.softmax(teacher) + jnp.where(possible, share, 0.0)
    nothing = p <= 0  # false for NaN, which must stay one: a finite loss would hide it
    log_p = jnp.where(nothing, _LOWEST, jnp.log(jnp.where(nothing, 1.0, p)))
    return x.finished(divergences.forward_kl(student, log_p), scale_by_t2)


def logit_mse(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """mean_v ((s_v - t_v) / T)^2: the logits themselves are compared, not the distributions.

    A constant that is added to all logits of one side counts, as no divergence would have it. With
    `scale_by_t2` T cancels out. A token that either side holds for impossible is left out.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Raises:
      ConfigError: if shapes differ.

    Reference: Ba, Caruana 2014, arXiv 1312.6184; Kim et al. 2021, arXiv 2105.08919.
    """
    x, student, teacher = _tempered(student_logits, teacher_logits, temperature)
    possible = (x.student > FARTHEST) & (x.teacher > FARTHEST)
    gap = jnp.where(possible, student - teacher, 0.0)
    count = jnp.maximum(jnp.sum(possible, axis=-1), 1)
    return x.finished(jnp.sum(gap**2, axis=-1) / count, scale_by_t2)


def detached_skew_reverse_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    skew: ArrayLike = 0.1,
    temperature: ArrayLike = 1.0,
    scale_by_t2: bool = True,
) -> Array:
    """KL(q || (1 - skew) p + skew sg(q)): as `skew_reverse_kl`, the mixture a constant.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      skew: weight of the student in the mixture, 0 to 1; one number, or [...].
      temperature: T > 0, divides both logits; one number, or [...].
      scale_by_t2: multiply by T^2.

    Raises:
      ConfigError: for another skew, or shapes that differ.

    Reference: Ko et al. 2025 (DistiLLM-2), arXiv 2503.07067; the constant is its code's.
    """
    x, student, teacher = _tempered(student_logits, teacher_logits, temperature)
    weight = given.column("skew", skew, student, ENTRIES["skew_reverse_kl"]["skew"])
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    # Clamped: a skew of 0 or 1 must leave the entry that only the other side has infinite for none.
    parts = jnp.log1p(-weight) + log_p, jnp.log(weight) + log_q
    mixture = jax.lax.stop_gradient(jnp.maximum(jnp.logaddexp(*parts), _LOWEST))
    return x.finished(divergences.reverse_kl(student, mixture), scale_by_t2)


def taid(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    taid_t: ArrayLike,
) -> Array:
    """TAID's loss: KL(softmax((1 - t) sg(student) + t teacher) || softmax(student)).

    The target mixes logits, not probabilities, the student in it is a constant, and there is no
    temperature. At t = 1 it is `forward_kl`; at 0 value and gradient are 0 but for rounding, 1e-7.

    Args:
      student_logits: [..., V].
      teacher_logits: [..., V].
      taid_t: t in [0, 1], one number, or [...]; may be traced; `optim.taid` adapts it.

    Raises:
      ConfigError: for a Python number outside [0, 1], or shapes that differ.

    Reference: Shing et al. 2025, arXiv 2501.16937, and its code (SakanaAI/TAID).
    """
    x, student, teacher = _tempered(student_logits, teacher_logits, 1.0)
    t = given.column("taid_t", taid_t, student, COMMON["taid_t"])
    target = jax.lax.stop_gradient((1 - t) * student + t * teacher)
    return x.finished(divergences.forward_kl(student, target), scale_by_t2=False)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A divergence with its options, as `linear_divergence(kind=...)` takes it; equal if they are.

    Attributes:
      name: of a function of this module.
      options: (name, value) of each.
    """

    name: str
    options: tuple[tuple[str, float], ...]

    def __call__(self, student: Array, teacher: Array, labels: Array | None) -> Array:
        """The divergence of logits that are divided by T already, [n]."""
        function, options = FUNCTIONS[self.name], dict(self.options)
        if self.name == "decoupled_kl":
            if labels is None:
                raise ConfigError("decoupled_kl splits the distribution at its label: give labels")
            return function(student, teacher, labels, **options)
        return function(student, teacher, **options)


FUNCTIONS: Mapping[str, Callable[..., Array]] = {
    "adaptive_kl": adaptive_kl,
    "alphanet": alphanet,
    "decoupled_kl": decoupled_kl,
    "detached_skew_reverse_kl": detached_skew_reverse_kl,
    "smoothed_forward_kl": smoothed_forward_kl,
    "logit_mse": logit_mse,
}


def bound(name: str, **options: float) -> Bound:
    """A function of this module with its options, for the fused head loss.

    Raises:
      ConfigError: for a name that is none of them.
    """
    if name not in FUNCTIONS:
        raise ConfigError(f"{name!r}: must be one of {', '.join(FUNCTIONS)}")
    return Bound(name, tuple(sorted(options.items())))


def _check(name: str, **options: float) -> None:
    """Raises for an option out of its range."""
    for option, value in options.items():
        checks.number(option, value, WHOLE_ROWS[name][option])


def _tempered(
    student_logits: ArrayLike, teacher_logits: ArrayLike, temperature: ArrayLike
) -> tuple[given.Logits, Array, Array]:
    """What is given, and both models' logits divided by T."""
    x = given.logits("", student_logits, teacher_logits, temperature, _LOWEST)
    return x, x.student / x.temperature, x.teacher / x.temperature
