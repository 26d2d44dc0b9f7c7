"""The table of divergences: per vocabulary entry a value and its derivatives by log q and log p.

A divergence of a student q = softmax(u) from a teacher p = softmax(w) is D = sum_v value_v. With
g_v = d value_v / d log q_v and h_v = d value_v / d log p_v, its gradients by the logits are

    dD/du = g - q * sum(g)        dD/dw = h - p * sum(h)

so one kernel template serves every row. All functions are elementwise on arrays of one shape, keep
their dtype, take -inf for an impossible entry, and never return NaN for 0 * log 0 or 0 * inf.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.ranges import ENTRIES

Elementwise = Callable[[Array, Array], Array]
Parameter = Any  # a Python float, or a traced scalar


class Closed(NamedTuple):
    """Sums over the vocabulary that follow from the two Kullback-Leibler divergences alone.

    Attributes:
      reads: "forward" for KL(p || q), "reverse" for KL(q || p).
      value: by name in `reads` -> the divergence.
      slope_sum: by name in `reads` -> sum_v dlogq.
    """

    reads: tuple[str, ...]
    value: Callable[[Mapping[str, Array]], Array]
    slope_sum: Callable[[Mapping[str, Array]], Array]


class Row(NamedTuple):
    """One divergence, entry by entry; every function takes (log_p, log_q): teacher, then student.

    Attributes:
      value: the entry's share of the divergence.
      dlogq: its derivative by the student's log-probability.
      dlogp: its derivative by the teacher's log-probability.
      closed: the sums over the vocabulary without a pass over it, where they have such a form.
      homogeneous: whether c p and c q have c times the value of p and q, so that an entry can be
        computed from log p - log q alone.
    """

    value: Elementwise
    dlogq: Elementwise
    dlogp: Elementwise
    closed: Closed | None = None
    homogeneous: bool = False


def _log(x: Parameter) -> Parameter:
    """log x with log 0 = -inf; Python numbers stay Python numbers, a literal to a kernel."""
    if isinstance(x, int | float):
        return math.log(x) if x > 0 else -math.inf
    return jnp.log(x)


def _times(probability: Array, factor: Array) -> Array:
    """probability * factor with 0 * anything = 0, also 0 * inf; a NaN probability stays NaN."""
    return jnp.where(probability == 0, 0.0, probability * factor)


def _weighted(weight: Parameter, array: Array) -> Array:
    """weight * array, where a weight of 0 switches off even an infinite array."""
    return jnp.where(weight == 0, 0.0, weight * array)


def _log_mix(log_weight_p: Parameter, log_p: Array, log_weight_q: Parameter, log_q: Array) -> Array:
    """log(weight_p * p + weight_q * q), -inf where both are."""
    a, b = log_weight_p + log_p, log_weight_q + log_q
    top = jnp.maximum(a, b)
    gap = jnp.where(top == -jnp.inf, 0.0, a - b)
    # Not log1p, which Pallas lacks: beside `top` it would save digits only where top is nearly 0.
    return top + jnp.log(1.0 + jnp.exp(-jnp.abs(gap)))


def _share(log_part: Array, log_mix: Array) -> Array:
    """part / mix in [0, 1], and 0 where the mixture is empty."""
    return jnp.where(log_mix == -jnp.inf, 0.0, jnp.exp(log_part - log_mix))


# KL(p || q): the value is p (log p - log q).
FORWARD_KL = Row(
    value=lambda log_p, log_q: _times(jnp.exp(log_p), log_p - log_q),
    dlogq=lambda log_p, log_q: -jnp.exp(log_p),
    dlogp=lambda log_p, log_q: _times(jnp.exp(log_p), log_p - log_q + 1.0),
    closed=Closed(
        ("forward",),
        value=lambda kl: kl["forward"],
        slope_sum=lambda kl: jnp.full_like(kl["forward"], -1.0),
    ),
)

# KL(q || p): the forward row with the roles exchanged.
REVERSE_KL = Row(
    value=lambda log_p, log_q: FORWARD_KL.value(log_q, log_p),
    dlogq=lambda log_p, log_q: FORWARD_KL.dlogp(log_q, log_p),
    dlogp=lambda log_p, log_q: FORWARD_KL.dlogq(log_q, log_p),
    closed=Closed(
        ("reverse",), value=lambda kl: kl["reverse"], slope_sum=lambda kl: kl["reverse"] + 1.0
    ),
)

# 1/2 |p - q|.
TOTAL_VARIATION = Row(
    value=lambda log_p, log_q: 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)),
    dlogq=lambda log_p, log_q: 0.5 * jnp.exp(log_q) * jnp.sign(jnp.exp(log_q) - jnp.exp(log_p)),
    dlogp=lambda log_p, log_q: 0.5 * jnp.exp(log_p) * jnp.sign(jnp.exp(log_p) - jnp.exp(log_q)),
)


def symmetric_kl(weight: Parameter) -> Row:
    """(1 - weight) KL(p || q) + weight KL(q || p)."""

    def blend(forward: Elementwise, reverse: Elementwise) -> Elementwise:
        return lambda log_p, log_q: (
            _weighted(1.0 - weight, forward(log_p, log_q))
            + _weighted(weight, reverse(log_p, log_q))
        )

    value, dlogq, dlogp = map(blend, FORWARD_KL[:3], REVERSE_KL[:3])
    total = lambda kl: _weighted(1.0 - weight, kl["forward"]) + _weighted(weight, kl["reverse"])
    # (1 - weight) * -1 + weight * (reverse + 1)
    slope_sum = lambda kl: _weighted(weight, kl["reverse"]) + (2.0 * weight - 1.0)
    return Row(value, dlogq, dlogp, Closed(("forward", "reverse"), total, slope_sum))


def generalized_jsd(beta: Parameter) -> Row:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    At beta 0 it is KL(p || q) and at beta 1 KL(q || p), the values GKD's users expect there. They
    are the limits of D / beta and D / (1 - beta); D itself goes to 0, so D jumps at both ends.
    """
    if isinstance(beta, int | float):
        return FORWARD_KL if beta == 0 else REVERSE_KL if beta == 1 else _mixed_jsd(beta)

    def select(forward: Elementwise, reverse: Elementwise, mixed: Elementwise) -> Elementwise:
        def chosen(log_p: Array, log_q: Array) -> Array:
            b = jnp.full(log_p.shape, beta)  # Pallas selects with arrays of one shape only
            inside = jnp.where(b == 1, reverse(log_p, log_q), mixed(log_p, log_q))
            return jnp.where(b == 0, forward(log_p, log_q), inside)

        return chosen

    value, dlogq, dlogp = map(select, FORWARD_KL[:3], REVERSE_KL[:3], _mixed_jsd(beta)[:3])
    return Row(value, dlogq, dlogp, homogeneous=True)


def _mixed_jsd(beta: Parameter) -> Row:
    """The generalised JSD for beta strictly inside (0, 1)."""

    def log_m(log_p: Array, log_q: Array) -> Array:
        return _log_mix(_log(beta), log_p, _log(1.0 - beta), log_q)

    def dlogq(log_p: Array, log_q: Array) -> Array:
        return (1.0 - beta) * _times(jnp.exp(log_q), log_q - log_m(log_p, log_q))

    def dlogp(log_p: Array, log_q: Array) -> Array:
        return beta * _times(jnp.exp(log_p), log_p - log_m(log_p, log_q))

    def value(log_p: Array, log_q: Array) -> Array:
        return dlogp(log_p, log_q) + dlogq(log_p, log_q)

    return Row(value, dlogq, dlogp, homogeneous=True)


def skew_forward_kl(skew: Parameter) -> Row:
    """KL(p || skew p + (1 - skew) q)."""

    def log_m(log_p: Array, log_q: Array) -> Array:
        return _log_mix(_log(skew), log_p, _log(1.0 - skew), log_q)

    def student_share(log_p: Array, log_q: Array) -> Array:
        return _share(_log(1.0 - skew) + log_q, log_m(log_p, log_q))

    def value(log_p: Array, log_q: Array) -> Array:
        return _times(jnp.exp(log_p), log_p - log_m(log_p, log_q))

    def dlogq(log_p: Array, log_q: Array) -> Array:
        return -jnp.exp(log_p) * student_share(log_p, log_q)

    def dlogp(log_p: Array, log_q: Array) -> Array:
        # p (log p - log m + 1 - skew p / m), and 1 - skew p / m is the student's share of m.
        return _times(jnp.exp(log_p), log_p - log_m(log_p, log_q) + student_share(log_p, log_q))

    return Row(value, dlogq, dlogp, homogeneous=True)


def skew_reverse_kl(skew: Parameter) -> Row:
    """KL(q || (1 - skew) p + skew q), with the gradient through q in both places."""
    mirrored = skew_forward_kl(skew)
    return Row(
        value=lambda log_p, log_q: mirrored.value(log_q, log_p),
        dlogq=lambda log_p, log_q: mirrored.dlogp(log_q, log_p),
        dlogp=lambda log_p, log_q: mirrored.dlogq(log_q, log_p),
        homogeneous=True,
    )


def alpha_beta_divergence(alpha: Parameter, beta: Parameter) -> Row:
    """-1/(a b) sum (p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)), a = alpha, b = beta.

    Its limits are (1, 0): KL(p || q), and (0, 1): KL(q || p); they hold at the ends themselves.
    """
    _check_orders(alpha, beta)

    def orders(like: Array) -> tuple[Array, Array]:
        # Pallas selects with arrays of one shape only.
        return jnp.full(like.shape, alpha, like.dtype), jnp.full(like.shape, beta, like.dtype)

    def parts(log_p: Array, log_q: Array) -> tuple[Array, Array, Array, Array]:
        """p^(a+b), q^(a+b), p^a q^b from one anchor, exactly equal where p = q, and log p / q."""
        a, b = orders(log_p)
        top = jnp.maximum(log_p, log_q)
        none = top == -jnp.inf
        p, q = (jnp.where(none, 0.0, x - top) for x in (log_p, log_q))
        whole = jnp.exp((a + b) * top)
        mixed = whole * jnp.exp(_weighted(a, p) + _weighted(b, q))
        return whole * jnp.exp((a + b) * p), whole * jnp.exp((a + b) * q), mixed, p - q

    def dlogq(log_p: Array, log_q: Array) -> Array:
        _, both_q, mixed, gap = parts(log_p, log_q)
        return -_quotient(both_q, mixed, orders(log_p)[0], gap)

    def dlogp(log_p: Array, log_q: Array) -> Array:
        both_p, _, mixed, gap = parts(log_p, log_q)
        return -_quotient(both_p, mixed, orders(log_p)[1], -gap)

    def value(log_p: Array, log_q: Array) -> Array:
        # Homogeneous of degree a + b in (p, q): Euler's theorem gives it from its derivatives.
        a, b = orders(log_p)
        return (dlogp(log_p, log_q) + dlogq(log_p, log_q)) / (a + b)

    return Row(value, dlogq, dlogp)


def _quotient(base: Array, moved: Array, order: Array, gap: Array) -> Array:
    """(moved - base) / order with moved = base exp(order gap), also where order is nearly 0."""
    x = _weighted(order, gap)
    near = jnp.abs(x) < 0.1
    small = jnp.where(near, x, 0.0)
    # Not expm1, which Pallas lacks: (exp(x) - 1) / x to 2e-10.
    series = 1.0 + small / 2 * (
        1.0 + small / 3 * (1.0 + small / 4 * (1.0 + small / 5 * (1.0 + small / 6)))
    )
    far = (moved - base) / jnp.where(order == 0, 1.0, order)
    return jnp.where(near, _times(base, gap * series), far)


def alpha_divergence(alpha: Parameter) -> Row:
    """(sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1)); 1: KL(p || q), 0: KL(q || p)."""
    return alpha_beta_divergence(alpha, 1.0 - alpha)


def _check_orders(alpha: Parameter, beta: Parameter) -> None:
    """Python numbers must not be negative, and not both 0."""
    known = [x for x in map(checks.known, (alpha, beta)) if x is not None]
    if any(x < 0 for x in known) or (len(known) == 2 and sum(known) == 0):
        raise ConfigError(
            f"alpha = {alpha}, beta = {beta}: must not be negative, and not both 0: a power of an "
            "impossible entry would be infinite"
        )


def not_below_zero(divergence: Array) -> Array:
    """A divergence, 0 where rounding left less; its slope is that of what came."""
    return divergence - jax.lax.stop_gradient(jnp.minimum(divergence, 0.0))


# kind -> the function that makes its row from the kind's parameters.
KINDS: Mapping[str, Callable[..., Row]] = {
    "forward_kl": lambda: FORWARD_KL,
    "reverse_kl": lambda: REVERSE_KL,
    "symmetric_kl": symmetric_kl,
    "generalized_jsd": generalized_jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": lambda: TOTAL_VARIATION,
    "alpha_divergence": alpha_divergence,
    "alpha_beta_divergence": alpha_beta_divergence,
}


def make(kind: str, *parameters: Parameter) -> Row:
    """The row of a kind by name: make("forward_kl"), make("generalized_jsd", 0.5).

    Without parameters a kind has those of `ranges`.

    Raises:
      ConfigError: if there is no such kind; the message lists the kinds.
    """
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise ConfigError(f"kind = {kind!r}: must be one of {', '.join(KINDS)}{hint}")
    named = ENTRIES[kind]
    if parameters and len(parameters) != len(named):
        raise ConfigError(
            f"kind = {kind}: takes {len(named)} parameters ({', '.join(named) or 'none'}), and "
            f"was given {len(parameters)}"
        )
    for (name, allowed), value in zip(named.items(), parameters, strict=False):
        checks.number(name, value, allowed, f"{kind}: ")
    return KINDS[kind](*(parameters or (one.default for one in named.values())))
