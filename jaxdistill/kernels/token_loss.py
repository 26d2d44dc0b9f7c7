"""The core of both operations: from rows of logits to losses, metrics and slopes of each token.

`divergence` is given logits, `linear_divergence` makes them for one chunk of tokens after another.
Both hand them to a `TokenRows`, which measures the rows' statistics once and derives the rest:

    s, t    logits of student and teacher, [n, V]
    z       logits of the target, [n, V]: t, or with TAID (1 - taid_t) s + taid_t t, a constant
    q, p    softmax(s / T), softmax(z / T)
    loss    alpha CE(s, y) + (1 - alpha) T^2 D(p, q), [n]

    logits --measure--> statistics --+-- losses -> [n]     --+-- slope -> [n, V] by s
                                     +-- metrics -> [n]      +-- temperature_slope -> [n]
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels import by_temperature as by_t
from jaxdistill.kernels import choice, rows
from jaxdistill.kernels import measure as measuring
from jaxdistill.kernels import statistics as stats
from jaxdistill.kernels.operands import Coefficients, LossSpec, VocabularyShard, taid_target
from jaxdistill.kernels.statistics import ECHO, LOWEST, MOMENTS, Rows, Scales, top_of
from jaxdistill.kernels.tiling import Work

POSSIBLE = "possible"


class Divergence(NamedTuple):
    """The divergence of each row, and what its slopes need beside the statistics.

    Attributes:
      value: D without its T^2, [n].
      slope_sum: sum_v dlogq of a named kind, [n].
      pull: what the slope by the logits needs of another: arrays [n, ...], such as the slope by
        s / T of a function of whole rows, or the cotangents of known tokens.
      within: what the slope by the temperature needs of it; it stays where it was made.
    """

    value: Array
    slope_sum: Array | None = None
    pull: Any = None
    within: Any = None


class TokenLosses(NamedTuple):
    """The loss of each row and the terms that it weighs.

    Attributes:
      loss: alpha CE + (1 - alpha) T^2 D, [n].
      cross_entropy: CE, [n], or None without labels.
      divergence: T^2 D, [n], or None without a teacher.
      unscaled: D, or None without a teacher.
    """

    loss: Array
    cross_entropy: Array | None
    divergence: Array | None
    unscaled: Divergence | None


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """n rows of logits on one device, with all that their loss depends on.

    Attributes:
      spec: what is computed.
      implementation: of the statistics, from `choice.choose`.
      coefficients: the numbers of the formula; temperature is [] or [n].
      vocabulary: the columns on this device.
      student: logits [n, V] as they came.
      teacher: logits [n, V], or None.
      labels: [n], or None.
      kept: whether clamped logits are made once, in a cache that holds them, and not in each loop.
    """

    spec: LossSpec
    implementation: str
    coefficients: Coefficients
    vocabulary: VocabularyShard
    student: Array
    teacher: Array | None
    labels: Array | None
    kept: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def reads_in_passes(self) -> bool:
        """Whether metrics cost passes of their own, and do not come with the loss's."""
        return self.implementation == "xla" and choice.reads_in_passes(choice.current_device())

    @property
    def elementwise(self) -> bool:
        """Whether the slope is elementwise in the logits, but for numbers of its row."""
        return self.spec.kind is None or isinstance(self.spec.kind, str)

    # ------------------------------------------------------------------------------- statistics

    @functools.cached_property
    def logits(self) -> Rows:
        """Clamped float32 logits by model, "s", "t" and with TAID "z"; none is a constant yet."""
        logits = {"s": stats.clamp(self.student)}
        if self.teacher is not None:
            logits["t"] = stats.clamp(self.teacher)
            if self.coefficients.taid_t is not None:
                logits["z"] = taid_target(logits["s"], logits["t"], self.coefficients.taid_t)
        return jax.lax.optimization_barrier(logits) if self.kept else logits

    @property
    def target(self) -> Array:
        """z: the logits of the distribution that the divergence is measured to."""
        return self.logits["z" if "z" in self.logits else "t"]

    @functools.cached_property
    def divergence_row(self) -> rows.Row | None:
        """The kind's row of the table, None for a function or where there is no divergence."""
        kind = self.spec.kind
        return rows.make(kind, *self.coefficients.parameters) if isinstance(kind, str) else None

    def loss_statistics(self) -> tuple[str, ...]:
        """The statistics that the loss and its slopes are made of."""
        names = ["sum_s1"] if self.spec.labels else []
        if self.divergence_row is not None:
            names += ["sum_s", "sum_z"]
            reads = self.divergence_row.closed.reads if self.divergence_row.closed else ()
            names += [{"forward": "gap_z", "reverse": "gap_s"}[direction] for direction in reads]
        return tuple(names)

    def metric_statistics(self) -> tuple[str, ...]:
        """The statistics that the metrics at T = 1 are made of."""
        names = ("sum_s1", "self_s1")
        return names if self.spec.kind is None else (*names, "sum_t1", "self_t1", "gap_t1", ECHO)

    @property
    def given(self) -> Rows:
        """Logits as they came, by model."""
        return (
            {"s": self.student} if self.teacher is None else {"s": self.student, "t": self.teacher}
        )

    def measure(self, names: Sequence[str]) -> Rows:
        """Statistics of whole rows by name, [n] each, merged over the shards of the vocabulary."""
        twins = self.twins(names)
        measured = measuring.measure(
            tuple(dict.fromkeys(twins.values())), self.given, self.logits, self.coefficients,
            self.implementation, self.vocabulary,
        )  # fmt: skip
        tops = {name: top for name, top in measured.items() if name.startswith("max_")}
        named = {name: measured[twin] for name, twin in twins.items()}
        return tops | named | self.of_smoothing()

    def of_smoothing(self) -> Rows:
        """By name what label smoothing reads beside: how many columns can be drawn, [n]."""
        if self.coefficients.smoothing is None:
            return {}
        entries = (self.logits["s"] > LOWEST / 2).astype(jnp.float32)
        return {POSSIBLE: self.vocabulary.sum(self._sum(entries))}

    def twins(self, names: Sequence[str]) -> dict[str, str]:
        """By name what is measured for it: at a temperature of 1 the tempered sum is the plain one.

        With TAID the target is no model, and the teacher's own sums stay plain.
        """
        if not self.spec.at_one:
            return {name: name for name in names}
        tempered = {"sum_s1": "sum_s", "self_s1": "self_s"}
        if self.coefficients.taid_t is None:
            tempered |= {"sum_t1": "sum_z", "self_t1": "self_z", "gap_t1": "gap_z"}
        return {name: tempered.get(name, name) for name in names}

    def log_probs(self, statistics: Rows, name: str) -> Array:
        """log softmax of the model whose sum has this name, at that sum's temperature: [n, V].

        Maximum and log-sum stay two numbers: added into one, logits of 300 would cost the
        log-probabilities their last five bits.
        """
        moment = MOMENTS[name]
        # Known to be 1, both names ask for the same array, and XLA makes it once.
        scales = Scales(1.0, 1.0) if self.spec.at_one else self.coefficients.scales
        top, k = top_of(statistics, moment.model), scales.of(moment)
        entries = self.logits[moment.model if moment.model in self.logits else "t"]
        shifted = (entries - as_column(top)) * as_column(jnp.asarray(k, jnp.float32))
        return shifted - as_column(jnp.log(statistics[name]))

    # ------------------------------------------------------------------------------------ losses

    @property
    def t2(self) -> Any:
        """The factor of the divergence: T^2, or 1."""
        return self.coefficients.temperature**2 if self.spec.scale_by_t2 else jnp.float32(1)

    def losses(self, statistics: Rows) -> TokenLosses:
        """The loss of each row and its terms, [n] each."""
        alpha = self.coefficients.alpha
        loss = jnp.zeros(len(self.student), jnp.float32)
        cross_entropy = divergence = unscaled = None
        if self.labels is not None:
            cross_entropy = self.cross_entropy(statistics)
            loss += alpha * cross_entropy
        if self.spec.kind is not None:
            unscaled = self.divergence(statistics)
            divergence = self.t2 * unscaled.value
            loss += (1 - alpha) * divergence
        return TokenLosses(loss, cross_entropy, divergence, unscaled)

    def cross_entropy(self, statistics: Rows) -> Array:
        """-(1 - eps) log q_y - eps mean_v log q_v at T = 1, [n]; NaN for a label of no column."""
        assert self.labels is not None, "spec.labels says that there are some"
        s, top, vocabulary = self.logits["s"], statistics["max_s"], self.vocabulary
        smoothing = self.coefficients.smoothing
        column = vocabulary.column(self.labels)
        here = column >= 0
        picked = jnp.take_along_axis(s, jnp.maximum(column, 0)[:, None], axis=1)[:, 0]
        at_label = vocabulary.sum(jnp.where(here, picked, 0.0))
        known = vocabulary.max(here.astype(jnp.float32)) > 0
        log_sum = jnp.log(statistics["sum_s1"])
        value = jnp.where(known, log_sum - (at_label - top), jnp.nan)
        if smoothing is None:
            return value
        total = vocabulary.sum(self._sum(jnp.where(s > LOWEST / 2, s - top[:, None], 0.0)))
        return (1 - smoothing) * value + smoothing * (log_sum - total / statistics[POSSIBLE])

    def cross_entropy_slope(self, statistics: Rows) -> Array:
        """d CE / d s = q - (1 - eps) onehot(y) - eps / V, [n, V]."""
        assert self.labels is not None, "spec.labels says that there are some"
        s, smoothing = self.logits["s"], self.coefficients.smoothing
        column = self.vocabulary.column(self.labels)
        onehot = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) == column[:, None]
        q = jnp.exp(self.log_probs(statistics, "sum_s1"))
        if smoothing is None:
            return q - onehot
        uniform = jnp.where(s > LOWEST / 2, (smoothing / statistics[POSSIBLE])[:, None], 0.0)
        return q - (1 - smoothing) * onehot - uniform

    def divergence(self, statistics: Rows) -> Divergence:
        """D(p, q) of each row, without its T^2."""
        row = self.divergence_row
        if row is None:
            return self._function()
        if row.closed:
            log_s, log_z = jnp.log(statistics["sum_s"]), jnp.log(statistics["sum_z"])
            kl = {}
            if "forward" in row.closed.reads:
                kl["forward"] = statistics["gap_z"] / statistics["sum_z"] + (log_s - log_z)
            if "reverse" in row.closed.reads:
                kl["reverse"] = statistics["gap_s"] / statistics["sum_s"] + (log_z - log_s)
            # Rounding leaves less than nothing of what is nothing; no divergence is below 0.
            return Divergence(jnp.maximum(row.closed.value(kl), 0.0), row.closed.slope_sum(kl))
        if self.implementation == "mosaic_gpu":
            from jaxdistill.kernels import mosaic_gpu

            assert isinstance(self.spec.kind, str) and self.teacher is not None, "it has a row"
            make = functools.partial(rows.make, self.spec.kind)  # with the kind's own defaults
            alike = measuring.of_one_dtype(self.given)
            work = Work((self.spec.kind,), mixed=self.coefficients.taid_t is not None)
            value, slope_sum = mosaic_gpu.row_sums(
                make, alike, self.coefficients, statistics, measuring.tiling_of(alike, work),
                choice.INTERPRET,
            )  # fmt: skip
        else:
            log_q, log_p = (self.log_probs(statistics, name) for name in ("sum_s", "sum_z"))
            value, slope_sum = (self._sum(of(log_p, log_q)) for of in (row.value, row.dlogq))
        total = jnp.maximum(self.vocabulary.sum(value), 0.0)
        return Divergence(total, self.vocabulary.sum(slope_sum))

    def _sum(self, entries: Array) -> Array:
        """The sum over the columns here, [n]."""
        return stats.row_sum(entries) if self.reads_in_passes else jnp.sum(entries, axis=1)

    def _function(self) -> Divergence:
        """The divergence by a function of whole rows."""
        k, function = 1 / self.coefficients.temperature, self.spec.kind
        assert callable(function), "a named kind has a row"
        evaluate = lambda s, z: function(s, z, self.labels)
        value, vjp = jax.vjp(evaluate, self.logits["s"] * as_column(k), self.target * as_column(k))
        by_student, by_target = vjp(jnp.ones_like(value))
        return Divergence(value, pull=by_student, within=by_target)

    # ------------------------------------------------------------------------------------ slopes

    def slope(self, statistics: Rows, losses: TokenLosses) -> Array:
        """d loss / d s, [n, V]."""
        alpha, temperature = self.coefficients.alpha, self.coefficients.temperature
        parts = []
        if self.labels is not None:
            parts.append(alpha * self.cross_entropy_slope(statistics))
        if losses.unscaled is not None:
            by_scaled = self.divergence_slope(statistics, losses.unscaled)
            parts.append((1 - alpha) * (as_column(self.t2 / temperature) * by_scaled))
        slope: Any = sum(parts)
        return slope

    def temperature_slope(self, statistics: Rows, losses: TokenLosses) -> Array:
        """d loss / d T, [n]."""
        if losses.unscaled is None:
            return jnp.zeros_like(losses.loss)
        moved = self.divergence_temperature_slope(statistics, losses.unscaled)
        return (1 - self.coefficients.alpha) * moved

    def scaled_slope(self, value: Array, moved: Array) -> Array:
        """d (T^2 D) / dT from D and d D / dT, [n]; d D / dT where the divergence is not scaled."""
        if not self.spec.scale_by_t2:
            return moved
        return self.t2 * moved + 2 * self.coefficients.temperature * value

    def divergence_slope(self, statistics: Rows, divergence: Divergence) -> Array:
        """d D / d (s / T), [n, V]: of a named kind g - q sum(g), g = dlogq."""
        row = self.divergence_row
        if row is None:
            return divergence.pull
        assert divergence.slope_sum is not None, "a named kind has one"
        log_q = self.log_probs(statistics, "sum_s")
        log_p = self.log_probs(statistics, "sum_z")
        return row.dlogq(log_p, log_q) - jnp.exp(log_q) * divergence.slope_sum[:, None]

    def divergence_temperature_slope(self, statistics: Rows, divergence: Divergence) -> Array:
        """d (T^2 D) / dT, [n], or d D / dT where it is not scaled by T^2."""
        row = self.divergence_row
        if row is None:
            parts = divergence.pull * self.logits["s"] + divergence.within * self.target
            moved = -jnp.sum(parts, axis=1) * (1 / self.coefficients.temperature) ** 2
            return self.scaled_slope(divergence.value, moved)
        return by_t.slope(
            row,
            self.logits["s"] - top_of(statistics, "s")[:, None],
            self.target - top_of(statistics, "z")[:, None],
            jnp.log(statistics["sum_s"])[:, None],
            jnp.log(statistics["sum_z"])[:, None],
            as_column(self.coefficients.temperature),
            self.spec.scale_by_t2,
            lambda entries: self.vocabulary.sum(jnp.sum(entries, axis=1, keepdims=True)),
        )[:, 0]

    # ----------------------------------------------------------------------------------- metrics

    def target_entropy(self, statistics: Rows) -> Array:
        """Entropy of p, [n]; TAID's cross-entropy is its divergence and this."""
        total = statistics["sum_z"]
        return jnp.log(total) - statistics["self_z"] / total

    def metrics(self, statistics: Rows) -> dict[str, Array]:
        """At T = 1, [n] each: entropies, KL(teacher || student), whether the top tokens agree."""

        def entropy(model: str) -> Array:
            total = statistics[f"sum_{model}1"]
            return jnp.maximum(jnp.log(total) - statistics[f"self_{model}1"] / total, 0.0)

        metrics = {"student/entropy": entropy("s")}
        if self.spec.kind is not None:
            log_ratio = jnp.log(statistics["sum_s1"]) - jnp.log(statistics["sum_t1"])
            kl = statistics["gap_t1"] / statistics["sum_t1"] + log_ratio
            metrics["loss/kl_t1"] = jnp.maximum(kl, 0.0)
            agree = statistics[ECHO] == statistics["max_t"]
            metrics["agree/top1"] = agree.astype(jnp.float32)
            metrics["teacher/entropy"] = entropy("t")
        return metrics


def as_column(x: Any) -> Any:
    """[n] as [n, 1]; a scalar as it is."""
    return x[:, None] if x.ndim else x
