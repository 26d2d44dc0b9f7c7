"""Loss, metrics and slope of rows of logits, from their statistics: the same for every backend.

With s, t [n, V] the logits of student and teacher, y the labels and z what the student is drawn to
(t, or TAID's mixture), each row's loss is

    alpha CE(s, y) + (1 - alpha) T^2 D(softmax(z / T), softmax(s / T)).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import rows
from jaxdistill.kernels.statistics import (
    ECHO,
    LOWEST,
    MOMENTS,
    Rows,
    Scales,
    clamp,
    top_of,
)

# A divergence of its own making: (student_logits / T, teacher_logits / T, labels) -> [n].
Function = Callable[[Array, Array, Array | None], Array]


@dataclasses.dataclass(frozen=True)
class Terms:
    """What is summed, known when a program is compiled.

    Attributes:
      kind: of the divergence: a key of `rows.KINDS`, a function of whole rows, or None.
      labels: whether there is a cross-entropy.
      scale_by_t2: whether the divergence is multiplied by T^2.
      axes: mesh axes that share the vocabulary of a row.
    """

    kind: str | Function | None
    labels: bool
    scale_by_t2: bool = True
    axes: tuple[str, ...] = ()

    def row(self, numbers: "Numbers") -> rows.Row | None:
        """The table's row, None where the divergence is a function or there is none."""
        return rows.make(self.kind, *numbers.parameters) if isinstance(self.kind, str) else None


class Numbers(NamedTuple):
    """What is summed, known when the program runs; absent leaves are None."""

    alpha: Array
    temperature: Array  # [] or [n]
    parameters: tuple[Array, ...] = ()
    taid_t: Array | None = None
    smoothing: Array | None = None

    @property
    def scales(self) -> Scales:
        """1/T and 1, the factors of the statistics."""
        return Scales(1.0 / self.temperature, 1.0)


class Vocabulary(NamedTuple):
    """The part of the vocabulary that this device sees, and how parts are put together.

    Attributes:
      axes: of the mesh, that share the vocabulary.
      offset: the first token here.
      rows: how many tokens are here.
      padded: whether there may be columns behind them, of no token.
    """

    axes: tuple[str, ...]
    offset: Any
    rows: Any
    padded: bool = False

    def column(self, labels: Array) -> Array:
        """The labels' columns here, -1 where another device has them."""
        index = labels - self.offset
        return jnp.where((index >= 0) & (index < self.rows), index, -1)

    def total(self, part: Array) -> Array:
        """The sum over all parts."""
        return jax.lax.psum(part, self.axes) if self.axes else part

    def largest(self, part: Array) -> Array:
        """The maximum over all parts."""
        return jax.lax.pmax(part, self.axes) if self.axes else part


def check_unchecked(operands: Any) -> None:
    """Raises inside a shard_map that checks what varies: whose gradients are sums is said by hand.

    Raises:
      ConfigError: with the remedy.
    """
    kinds = (getattr(jax.typeof(x), "manual_axis_type", None) for x in jax.tree.leaves(operands))
    if any(getattr(kind, "varying", None) for kind in kinds):
        raise ConfigError(
            "called inside a shard_map with check_vma=True: pass check_vma=False to the shard_map, "
            "and add up the gradients of arrays that are the same on several devices (psum)"
        )


def needed(terms: Terms, row: rows.Row | None, mixed: bool = False) -> tuple[str, ...]:
    """The statistics that the loss and its slope are made from, and TAID's control."""
    names = ["sum_s1"] if terms.labels else []
    if row is not None:
        names += ["sum_s", "sum_z"]
        reads = row.closed.reads if row.closed else ()
        names += [{"forward": "gap_z", "reverse": "gap_s"}[direction] for direction in reads]
        names += ["self_z"] if mixed else []
    return tuple(names)


def monitored(terms: Terms) -> tuple[str, ...]:
    """The statistics that the metrics at T = 1 are made from."""
    names = ("sum_s1", "self_s1")
    return names if terms.kind is None else (*names, "sum_t1", "self_t1", "gap_t1", ECHO)


def logits_of(terms: Terms, numbers: Numbers, student: Array, teacher: Array | None) -> Rows:
    """Clamped logits by model; nothing of them is a constant yet."""
    logits = {"s": clamp(student)}
    if teacher is not None:
        logits["t"] = clamp(teacher)
        if numbers.taid_t is not None:
            logits["z"] = mixture(logits["s"], logits["t"], numbers.taid_t)
    return logits


def mixture(student: Array, teacher: Array, taid_t: Array) -> Array:
    """TAID's target, (1 - t) student + t teacher of logits, which may both be [n, V] or a tile."""
    return student + taid_t * (teacher - student)


def log_probs(logits: Rows, statistics: Rows, scales: Scales, name: str) -> Array:
    """log softmax of the model that the sum of this name belongs to, at its temperature: [n, V].

    Maximum and log-sum stay two numbers: added into one, logits of 300 would cost the
    log-probabilities their last five bits.
    """
    moment = MOMENTS[name]
    top, k = top_of(statistics, moment.model), scales.of(moment)
    entries = logits[moment.model if moment.model in logits else "t"]
    shifted = (entries - _column(top)) * _column(jnp.asarray(k, jnp.float32))
    return shifted - _column(jnp.log(statistics[name]))


def _column(x: Array) -> Array:
    return x[:, None] if x.ndim else x


def cross_entropy(
    numbers: Numbers, logits: Rows, statistics: Rows, labels: Array, vocabulary: Vocabulary
) -> Array:
    """-(1 - eps) log q_y - eps mean_v log q_v at T = 1, [n]; a label outside the rows gives NaN."""
    s, top = logits["s"], statistics["max_s"]
    column = vocabulary.column(labels)
    here = column >= 0
    picked = jnp.take_along_axis(s, jnp.maximum(column, 0)[:, None], axis=1)[:, 0]
    at_label = vocabulary.total(jnp.where(here, picked, 0.0))
    known = vocabulary.largest(here.astype(jnp.float32)) > 0
    log_sum = jnp.log(statistics["sum_s1"])
    value = jnp.where(known, log_sum - (at_label - top), jnp.nan)
    if numbers.smoothing is None:
        return value
    possible = s > LOWEST / 2
    total = vocabulary.total(jnp.sum(jnp.where(possible, s - top[:, None], 0.0), axis=1))
    count = vocabulary.total(jnp.sum(possible.astype(jnp.float32), axis=1))
    return (1 - numbers.smoothing) * value + numbers.smoothing * (log_sum - total / count)


def cross_entropy_slope(
    numbers: Numbers, logits: Rows, statistics: Rows, labels: Array, vocabulary: Vocabulary
) -> Array:
    """d CE / d student logits, [n, V]: q - (1 - eps) onehot - eps / V."""
    s = logits["s"]
    column = vocabulary.column(labels)
    onehot = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) == column[:, None]
    q = jnp.exp(log_probs(logits, statistics, numbers.scales, "sum_s1"))
    if numbers.smoothing is None:
        return q - onehot
    possible = (s > LOWEST / 2).astype(jnp.float32)
    count = vocabulary.total(jnp.sum(possible, axis=1))
    uniform = possible * (numbers.smoothing / count)[:, None]
    return q - (1 - numbers.smoothing) * onehot - uniform


def divergence(
    row: rows.Row,
    numbers: Numbers,
    logits: Rows,
    statistics: Rows,
    vocabulary: Vocabulary,
    read: Callable[[], tuple[Array, Array]] | None = None,
) -> tuple[Array, Array]:
    """D [n] without its T^2, and sum_v dlogq [n], which its slope needs.

    Args:
      row: of the divergence.
      numbers: of the loss.
      logits: by model.
      statistics: of the rows.
      vocabulary: whose part this device sees.
      read: a kernel's second read for rows without a closed form; None leaves it to XLA.
    """
    if row.closed:
        log_s, log_z = jnp.log(statistics["sum_s"]), jnp.log(statistics["sum_z"])
        kl = {}
        if "forward" in row.closed.reads:
            kl["forward"] = statistics["gap_z"] / statistics["sum_z"] + (log_s - log_z)
        if "reverse" in row.closed.reads:
            kl["reverse"] = statistics["gap_s"] / statistics["sum_s"] + (log_z - log_s)
        return row.closed.value(kl), row.closed.slope_sum(kl)
    if read is not None:
        value, slope_sum = read()
        return vocabulary.total(value), vocabulary.total(slope_sum)
    log_q = log_probs(logits, statistics, numbers.scales, "sum_s")
    log_p = log_probs(logits, statistics, numbers.scales, "sum_z")
    total = lambda entries: vocabulary.total(jnp.sum(entries, axis=1))
    return total(row.value(log_p, log_q)), total(row.dlogq(log_p, log_q))


def divergence_slope(
    row: rows.Row, numbers: Numbers, logits: Rows, statistics: Rows, slope_sum: Array
) -> Array:
    """d D / d (student logits / T), [n, V]: g - q sum(g)."""
    log_q = log_probs(logits, statistics, numbers.scales, "sum_s")
    log_p = log_probs(logits, statistics, numbers.scales, "sum_z")
    return row.dlogq(log_p, log_q) - jnp.exp(log_q) * slope_sum[:, None]


def temperature_slope(
    row: rows.Row,
    numbers: Numbers,
    logits: Rows,
    statistics: Rows,
    slope: Array,
    vocabulary: Vocabulary,
) -> Array:
    """d D / d T [n], through both models' softmax; `slope` is that of `divergence_slope`."""
    log_q = log_probs(logits, statistics, numbers.scales, "sum_s")
    log_p = log_probs(logits, statistics, numbers.scales, "sum_z")
    h = row.dlogp(log_p, log_q)
    h_sum = vocabulary.total(jnp.sum(h, axis=1))
    back = h - jnp.exp(log_p) * h_sum[:, None]
    # u = z / T, so du/dT = -z / T^2; rows of either slope sum to 0, so shifted logits serve.
    shifted = lambda model, top: logits[model] - top_of(statistics, top)[:, None]
    drawn_to = shifted("z" if "z" in logits else "t", "z")
    moved = vocabulary.total(jnp.sum(slope * shifted("s", "s") + back * drawn_to, axis=1))
    return -moved / numbers.temperature**2


def target_entropy(statistics: Rows) -> Array:
    """Entropy of softmax(z / T), [n]: what TAID's cross-entropy has above its divergence."""
    total = statistics["sum_z"]
    return jnp.log(total) - statistics["self_z"] / total


def metrics(terms: Terms, statistics: Rows) -> Rows:
    """Per token what is worth knowing at T = 1: entropies, KL(teacher || student), agreement."""
    entropy = lambda m: (
        jnp.log(statistics[f"sum_{m}1"]) - statistics[f"self_{m}1"] / statistics[f"sum_{m}1"]
    )
    found = {"student/entropy": entropy("s")}
    if terms.kind is not None:
        log_ratio = jnp.log(statistics["sum_s1"]) - jnp.log(statistics["sum_t1"])
        found["loss/kl_t1"] = statistics["gap_t1"] / statistics["sum_t1"] + log_ratio
        found["agree/top1"] = (statistics[ECHO] == statistics["max_t"]).astype(jnp.float32)
        found["teacher/entropy"] = entropy("t")
    return found
