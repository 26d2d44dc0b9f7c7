"""Statistics of two models' rows of logits: one pass over any part of the vocabulary, and a merge.

The logits of a row are s (student), t (teacher) and z (what the student is drawn to: t, or TAID's
mixture of s and t). For each, m is the largest; x = k (logit - m) with k = 1/T ("tempered") or 1
("plain", the names that end in 1). A statistic is a maximum, or a moment

    sum   sum_v e^x          self   sum_v e^x x          gap   sum_v e^x (x - x of the other model)

weighted by the model of its name. Shifting by the maxima keeps gaps small where logits are large,
and makes merging exact: when a maximum grows, x moves by a constant d and

    sum -> e^d sum        self -> e^d (self + d sum)       gap -> e^d (gap + (d - d_other) sum)

Tiles of a kernel, blocks of the vocabulary and devices merge by this one rule.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Impossible entries (-inf, padded columns) are clamped here: they add an exact 0, never 0 * inf.
# A power of two, so that its product with 1 / T is exact: the rounding of another number's would be
# 1e22, and the exponential of that infinite, where a part of a row holds nothing else.
LOWEST = -(2.0**100)
NOTHING = 4 * LOWEST  # the maximum of no entries: below any clamped one, finite when divided by T

Exp = Callable[[Array], Array]
Rows = dict[str, Array]  # statistics by name, or logits by model


class Moment(NamedTuple):
    """A sum over the vocabulary.

    Attributes:
      model: whose exponentials weigh: "s", "t" or "z".
      tempered: at temperature T, or at 1.
      of: what is summed: "one", "self" or "gap".
    """

    model: str
    tempered: bool
    of: str

    @property
    def other(self) -> str:
        """The model that a gap is measured to."""
        return ("z" if self.tempered else "t") if self.model == "s" else "s"

    @property
    def sum(self) -> str:
        """The name of the sum that rescaling this moment needs."""
        return f"sum_{self.model}{'' if self.tempered else '1'}"


MOMENTS: Mapping[str, Moment] = {
    "sum_s": Moment("s", True, "one"),
    "sum_z": Moment("z", True, "one"),
    "gap_s": Moment("s", True, "gap"),
    "gap_z": Moment("z", True, "gap"),
    "self_s": Moment("s", True, "self"),
    "self_z": Moment("z", True, "self"),
    "sum_s1": Moment("s", False, "one"),
    "sum_t1": Moment("t", False, "one"),
    "self_s1": Moment("s", False, "self"),
    "self_t1": Moment("t", False, "self"),
    "gap_t1": Moment("t", False, "gap"),
}
# And two of where the student's logit is largest. "echo": the largest teacher logit there; it
# equals the teacher's maximum exactly where both models have a common most likely token. "lead":
# minus the lowest column there, so that parts of a row merge by the maximum.
ECHO, LEAD = "echo", "lead"
AT_TOP = (ECHO, LEAD)
MOST_COLUMNS = 2**24  # numbers of columns are float32 among the statistics


class Scales(NamedTuple):
    """k of the tempered and of the plain moments: a number for all rows, or one for each."""

    tempered: Any
    plain: Any

    def of(self, moment: Moment) -> Any:
        """The moment's k."""
        return self.tempered if moment.tempered else self.plain


class Arithmetic(NamedTuple):
    """How a backend does what the definition asks for; the default is plain jnp on [n, V].

    Attributes:
      exp: of base e, or of base 2 with scales multiplied by log2(e).
      spread: [n] or scalar to the shape of a tile.
      shift: (logits, top, scale) -> scale (logits - top).
      largest: over the vocabulary of a tile.
      total: over the vocabulary of a tile.
    """

    exp: Exp = jnp.exp
    spread: Callable[[Array], Array] = lambda x: x[:, None] if x.ndim else x
    shift: Callable[..., Array] = lambda x, top, k, spread: (x - spread(top)) * spread(k)
    largest: Callable[[Array], Array] = lambda x: jnp.max(x, axis=1)
    total: Callable[[Array], Array] = lambda x: jnp.sum(x, axis=1)


PLAIN = Arithmetic()
# A CPU's sum over a row of so many columns or more is folded: XLA adds eight parts of it entry by
# entry, with all of a core's vectors and on all cores, and only an eighth is left to reduce.
_LONG, _PARTS = 4096, 8


def models(names: Sequence[str], mixed: bool) -> list[str]:
    """The models whose maxima these statistics need; z is t where there is no mixture."""
    chosen = set()
    for name in names:
        if name in AT_TOP:
            chosen |= {"s", "t"} if name == ECHO else {"s"}
        else:
            chosen.add(MOMENTS[name].model)
            if MOMENTS[name].of == "gap":
                chosen.add(MOMENTS[name].other)
    if not mixed and "z" in chosen:
        chosen = chosen - {"z"} | {"t"}
    return [model for model in "stz" if model in chosen]


def top_of(statistics: Rows, model: str) -> Array:
    """A model's maximum; z has one of its own only where it is a mixture."""
    own = f"max_{model}"
    return statistics[own if own in statistics else "max_t"]


def measure(
    names: Sequence[str], logits: Rows, tops: Rows, scales: Scales, by: Arithmetic = PLAIN
) -> Rows:
    """The moments of a tile relative to given maxima, its own or those of more entries.

    Args:
      names: of the moments, and "echo".
      logits: by model; "z" may be left out where it is the teacher.
      tops: holds the maxima, as `statistics` do.
      scales: of the moments.
      by: the backend's arithmetic.
    """
    shifted: dict[tuple[str, bool], Array] = {}
    weights: dict[tuple[str, bool], Array] = {}

    def x(model: str, moment: Moment) -> Array:
        key = (model, moment.tempered)
        if key not in shifted:
            scale = jnp.asarray(scales.of(moment), jnp.float32)
            entries = logits[model if model in logits else "t"]
            shifted[key] = by.shift(entries, top_of(tops, model), scale, by.spread)
        return shifted[key]

    def weight(moment: Moment) -> Array:
        key = (moment.model, moment.tempered)
        if key not in weights:
            weights[key] = by.exp(x(moment.model, moment))
        return weights[key]

    sums = {}
    for name in names:
        if name == ECHO:
            at_top = logits["s"] == by.spread(top_of(tops, "s"))
            sums[ECHO] = by.largest(jnp.where(at_top, logits["t"], LOWEST))
            continue
        moment = MOMENTS[name]
        if moment.of == "one":
            sums[name] = by.total(weight(moment))
        elif moment.of == "self":
            sums[name] = by.total(weight(moment) * x(moment.model, moment))
        else:
            gap = x(moment.model, moment) - x(moment.other, moment)
            sums[name] = by.total(weight(moment) * gap)
    return sums


def rescale(statistics: Rows, tops: Rows, scales: Scales, exp: Exp = jnp.exp) -> Rows:
    """The same statistics relative to other maxima."""

    def moved(model: str, moment: Moment) -> Array:
        return (top_of(statistics, model) - top_of(tops, model)) * scales.of(moment)

    result = {}
    for name, value in statistics.items():
        if name.startswith("max_"):
            result[name] = tops[name]
            continue
        if name in AT_TOP:
            kept = top_of(statistics, "s") == top_of(tops, "s")
            result[name] = jnp.where(kept, value, LOWEST)
            continue
        moment = MOMENTS[name]
        d = moved(moment.model, moment)
        if moment.of == "self":
            value = value + d * statistics[moment.sum]
        elif moment.of == "gap":
            value = value + (d - moved(moment.other, moment)) * statistics[moment.sum]
        result[name] = exp(d) * value
    return result


def is_maximum(name: str) -> bool:
    """Whether parts of this statistic merge by their maximum; the others add."""
    return name in AT_TOP or name.startswith("max_")


def combine(
    statistics: Rows,
    scales: Scales,
    largest: Callable[[Array], Array],
    total: Callable[[Array], Array],
    exp: Exp = jnp.exp,
) -> Rows:
    """Merges the statistics of many parts at once: over an array axis, or over devices.

    Args:
      statistics: of parts of the vocabulary.
      scales: that they were measured with.
      largest: the maximum over the parts.
      total: the sum over the parts.
      exp: of the base that they were measured in.
    """
    tops = {name: largest(x) for name, x in statistics.items() if name.startswith("max_")}
    spread = {name: jnp.broadcast_to(top, statistics[name].shape) for name, top in tops.items()}
    parts = rescale(statistics, spread, scales, exp)
    merge_parts = lambda name: largest if is_maximum(name) else total
    return tops | {name: merge_parts(name)(x) for name, x in parts.items() if name not in tops}


def merge(a: Rows, b: Rows, scales: Scales) -> Rows:
    """The statistics of two parts of the vocabulary together."""
    tops = {name: jnp.maximum(x, b[name]) for name, x in a.items() if name.startswith("max_")}
    left, right = rescale(a, tops, scales), rescale(b, tops, scales)
    return {
        name: (jnp.maximum if is_maximum(name) else jnp.add)(x, right[name])
        for name, x in left.items()
    }


def in_passes(names: Sequence[str], logits: Rows, scales: Scales) -> Rows:
    """The statistics of whole rows, one reduction after the other: a CPU's form, from its cache."""
    measured = {
        f"max_{model}": jnp.max(logits[model], axis=1) for model in models(names, "z" in logits)
    }
    measured = jax.lax.optimization_barrier(measured)
    moments = [name for name in names if name != LEAD]
    if LEAD in names:
        measured[LEAD] = -jnp.argmax(logits["s"], axis=1).astype(jnp.float32)
    return measured | measure(moments, logits, measured, scales, FOLDED)


def row_sum(entries: Array) -> Array:
    """The sum over each row of [n, V], [n]: a CPU's form for what is dear to make twice."""
    return _folded(jax.lax.optimization_barrier(entries), jnp.add, jnp.sum)


def _folded(entries: Array, join: Callable[..., Array], reduce: Callable[..., Array]) -> Array:
    columns = entries.shape[1]
    if columns < _LONG:
        return reduce(entries, axis=1)
    width = columns // _PARTS
    parts = [entries[:, part * width : (part + 1) * width] for part in range(_PARTS)]
    # What is left of each row is small. A reduction that XLA fuses with what made it runs slower.
    folded = jax.lax.optimization_barrier(functools.reduce(join, parts))
    whole = reduce(folded, axis=1)
    rest = columns % _PARTS
    return join(whole, reduce(entries[:, columns - rest :], axis=1)) if rest else whole


FOLDED = Arithmetic(
    largest=lambda x: _folded(x, jnp.maximum, jnp.max),
    total=lambda x: _folded(x, jnp.add, jnp.sum),
)


def in_one_pass(names: Sequence[str], logits: Rows, scales: Scales) -> Rows:
    """The same in one reduction that reads every logit once: an accelerator's form.

    A single entry is its own maximum: its sum is 1, its self and gap are 0, and merging does the
    rest.
    """
    shape = next(iter(logits.values())).shape
    assert shape[1] < MOST_COLUMNS, shape
    entries = {f"max_{model}": logits[model] for model in models(names, "z" in logits)}
    none = dict.fromkeys(entries, jnp.float32(NOTHING))
    for name in names:
        none[name] = jnp.float32(LOWEST if name in AT_TOP else 0.0)
        if name == ECHO:
            entries[name] = logits["t"]
        elif name == LEAD:
            entries[name] = -jax.lax.broadcasted_iota(jnp.float32, shape, 1)
        else:
            one = 1.0 if MOMENTS[name].of == "one" else 0.0
            entries[name] = jnp.full(shape, one, jnp.float32)
    # A reduction cannot close over a traced number: the scale travels beside the entries.
    tempered = jnp.asarray(scales.tempered, jnp.float32)
    entries["k"] = jnp.broadcast_to(tempered[:, None] if tempered.ndim else tempered, shape)
    none["k"] = jnp.float32(0)

    def both(a: Rows, b: Rows) -> Rows:
        k = jnp.maximum(a["k"], b["k"])
        left, right = ({n: v for n, v in part.items() if n != "k"} for part in (a, b))
        return merge(left, right, Scales(k, scales.plain)) | {"k": k}

    merged = jax.lax.reduce(entries, none, both, (1,))
    return {name: value for name, value in merged.items() if name != "k"}


def clamp(logits: Array) -> Array:
    """Float32 logits in which an impossible entry is a finite one of probability 0."""
    return jnp.maximum(logits.astype(jnp.float32), LOWEST)


def product_error(a: Array, b: Array, product: Array) -> Array:
    """a b - product, exactly (Dekker): what rounding took from the float32 product of a and b."""

    def halves(x: Array) -> tuple[Array, Array]:
        grown = x * 4097.0  # 2^12 + 1
        high = grown - (grown - x)
        return high, x - high

    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
