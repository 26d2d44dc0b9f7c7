"""Rows of two models' logits whose vocabularies share only listed columns."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels import by_temperature as by_t
from jaxdistill.kernels import logprob_rows, rows
from jaxdistill.kernels import statistics as stats
from jaxdistill.kernels.columns.definition import Columns, listed
from jaxdistill.kernels.measure import measure
from jaxdistill.kernels.operands import FARTHEST, VocabularyShard
from jaxdistill.kernels.statistics import LOWEST, MOMENTS, Rows
from jaxdistill.kernels.token_loss import Divergence, TokenRows, as_column


class Side(NamedTuple):
    """One model's rows over a temperature, and what the divergence sees of them.

    Attributes:
      x: (logits - top) / T, [n, V here].
      others: the columns of all other tokens, bool [1, V here].
      rest: log of the others' sum, of x, [n], or None where they are masked.
      entries: this device's share of the shared tokens, and of the bucket behind them, [n, E].
    """

    x: Array
    others: Array
    rest: Array | None
    entries: Array


class Compared(NamedTuple):
    """A divergence of two sides: value [n], and the slopes by their entries, [n, E] each.

    `tops` and `log_sums`, [n, 1] each, are of the student's and the teacher's entries.
    """

    value: Array
    by_student: Array
    by_teacher: Array
    tops: tuple[Array, ...]
    log_sums: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class ColumnRows(TokenRows):
    """n rows on one device, the teacher's of another width than the student's.

    Attributes:
      columns: of the tokens that both have.
      others: "mask" or "bucket".
      teacher_vocabulary: the teacher's columns on this device.
    """

    columns: Columns
    others: str
    teacher_vocabulary: VocabularyShard

    @functools.cached_property
    def logits(self) -> Rows:
        """Clamped float32 logits by model."""
        assert self.teacher is not None, "columns are of two models"
        logits = {"s": stats.clamp(self.student), "t": stats.clamp(self.teacher)}
        return jax.lax.optimization_barrier(logits) if self.kept else logits

    @property
    def elementwise(self) -> bool:
        """Whether the slope is elementwise in the logits: shared tokens are scattered."""
        return False

    @property
    def reads_in_passes(self) -> bool:
        """Whether metrics cost passes of their own: the columns are brought together anew."""
        return True

    def loss_statistics(self) -> tuple[str, ...]:
        """The statistics that the loss and its slopes are made of."""
        return ("sum_s1", "sum_t1")

    def metric_statistics(self) -> tuple[str, ...]:
        """The statistics that the metrics at T = 1 are made of."""
        return ("sum_s1", "self_s1", "sum_t1", "self_t1")

    def measure(self, names: Sequence[str]) -> Rows:
        """Statistics of whole rows by name, [n] each; either model has a width of its own."""
        measured: Rows = {}
        for model, shard in (("s", self.vocabulary), ("t", self.teacher_vocabulary)):
            mine = [name for name in names if MOMENTS[name].model == model]
            given, clamped = {model: self.given[model]}, {model: self.logits[model]}
            measured |= measure(mine, given, clamped, self.coefficients, self.implementation, shard)
        return measured | self.of_smoothing()

    def _shard(self, model: str) -> VocabularyShard:
        return self.vocabulary if model == "s" else self.teacher_vocabulary

    def _places(self, model: str) -> tuple[Array, Array]:
        """Where the shared tokens are here, -1 for one elsewhere, [C]; all others, bool [1, V]."""
        own = self.columns.student if model == "s" else self.columns.teacher
        columns = self._shard(model).column(own)
        return columns, ~listed(columns, self.logits[model].shape[1])[None, :]

    def _side(self, model: str, top: Array, temperature: Any) -> Side:
        s = self.logits[model]
        columns, others = self._places(model)
        x = logprob_rows.shifted(s, top, temperature)
        mine = self._first
        none = jnp.where(mine & (self.columns.student < 0), LOWEST, 0.0)
        parts = [jnp.where(columns >= 0, x[:, jnp.maximum(columns, 0)], none)]
        rest = None
        if self.others == "bucket":
            rest = logprob_rows.log_mass(s, others, top, temperature, self._shard(model))
            parts.append(jnp.where(mine, jnp.maximum(rest, LOWEST), 0.0)[:, None])
        whole = jnp.concatenate(parts, axis=1)
        return Side(x, others, rest, self._scatter(whole))

    def _scatter(self, whole: Array, beyond: float = LOWEST) -> Array:
        """Each device's share of entries [n, C] of which each device has some, the others 0.

        A share that is filled up to the size of the others is filled with `beyond`.
        """
        axes, entries = self.vocabulary.axes, whole.shape[1]
        if not axes:
            return whole
        size = jax.lax.axis_size(axes)
        share = -(-entries // size)
        whole = jnp.pad(whole, ((0, 0), (0, share * size - entries)))
        mine = jax.lax.psum_scatter(whole, axes, scatter_dimension=1, tiled=True)
        index = jax.lax.axis_index(axes) * share + jnp.arange(share)
        return jnp.where(index[None, :] < entries, mine, beyond)

    def _gather(self, mine: Array) -> Array:
        """Entries [n, C] of all devices."""
        axes = self.vocabulary.axes
        if axes:
            mine = jax.lax.all_gather(mine, axes, axis=1, tiled=True)
        return mine[:, : len(self.columns.student) + (self.others == "bucket")]

    def _compare(self, row: rows.Row, student: Side, teacher: Side) -> Compared:
        sides, total = (student.entries, teacher.entries), self._total
        tops = tuple(self.vocabulary.max(jnp.max(x, axis=1))[:, None] for x in sides)
        apart = [x - top for x, top in zip(sides, tops, strict=True)]
        log_sums = tuple(jnp.log(total(jnp.exp(x))) for x in apart)
        log_q, log_p = (x - log_sum for x, log_sum in zip(apart, log_sums, strict=True))
        g, h = row.dlogq(log_p, log_q), row.dlogp(log_p, log_q)
        return Compared(
            rows.not_below_zero(total(row.value(log_p, log_q))[:, 0]),
            g - jnp.exp(log_q) * total(g),
            h - jnp.exp(log_p) * total(h),
            tops,
            log_sums,
        )

    def _total(self, entries: Array) -> Array:
        """The sum over what both sides share, [n, 1]."""
        return self.vocabulary.sum(jnp.sum(entries, axis=1, keepdims=True))

    def divergence(self, statistics: Rows) -> Divergence:
        """D of each row, without its T^2; it pulls by what the student's side is compared to."""
        row = self.divergence_row
        assert row is not None, "a named kind has one"
        temperature = self.coefficients.temperature
        sides = tuple(self._side(m, statistics[f"max_{m}"], temperature) for m in "st")
        compared = self._compare(row, *sides)
        pull = compared.by_student, sides[0].rest
        return Divergence(compared.value, pull=pull, within=(sides, compared))

    def divergence_slope(self, statistics: Rows, divergence: Divergence) -> Array:
        """d D / d (s / T), [n, V]."""
        by_student, rest = divergence.pull
        s, temperature = self.logits["s"], self.coefficients.temperature
        x = logprob_rows.shifted(s, statistics["max_s"], temperature)
        return self._spread(x, rest, self._gather(by_student))

    def divergence_temperature_slope(self, statistics: Rows, divergence: Divergence) -> Array:
        """d (T^2 D) / dT, [n], or d D / dT where it is not scaled by T^2."""
        (student, teacher), compared = divergence.within
        return self._temperature_slope(student, teacher, compared)

    def _temperature_slope(self, student: Side, teacher: Side, compared: Compared) -> Array:
        """d (T^2 D) / dT, [n], or d D / dT where it is not scaled by T^2."""
        row, temperature = self.divergence_row, as_column(self.coefficients.temperature)
        assert row is not None, "a named kind has one"
        sides = (student, teacher)
        # What stands at LOWEST is no entry, of either side.
        s, z = (
            jnp.where(side.entries <= FARTHEST, LOWEST, (side.entries - top) * temperature)
            for side, top in zip(sides, compared.tops, strict=True)
        )
        log_s, log_z = compared.log_sums

        def slope(held: Array | None) -> Array:
            scaled, total = self.spec.scale_by_t2, self._total
            return by_t.slope(row, s, z, log_s, log_z, temperature, scaled, total, held)

        if self.others == "mask":
            return slope(None)[:, 0]
        # A bucket is log sum e^x of the others. With H their entropy, it moves as if of its logit
        # T H stayed. T H of the teacher stays on both sides, and the rest is a product of two
        # differences: with the student's own H, what is nearly equal would cancel to rounding.
        own, taught = (
            self._entropy(side, shard)
            for side, shard in zip(sides, (self.vocabulary, self.teacher_vocabulary), strict=True)
        )
        held = self._at_bucket(taught[:, None] * temperature)
        apart = self._total(compared.by_student * self._at_bucket((own - taught)[:, None]))
        return (slope(held) + as_column(self.t2) * apart / temperature)[:, 0]

    def _at_bucket(self, value: Array) -> Array:
        """[n, 1] at the bucket and 0 at all other entries: this device's share, [n, E]."""
        value = jnp.where(self._first, value, 0.0)
        return self._scatter(jnp.pad(value, ((0, 0), (len(self.columns.student), 0))), beyond=0.0)

    @property
    def _first(self) -> Array:
        """Whether this device is the first of those that share the vocabulary."""
        axes = self.vocabulary.axes
        return jax.lax.axis_index(axes) == 0 if axes else jnp.bool_(True)

    def _entropy(self, side: Side, shard: VocabularyShard) -> Array:
        """Entropy of a row among the tokens that only one side has, [n]; 0 where it has none."""
        assert side.rest is not None, "there is a bucket"
        log_q = jnp.where(side.others, side.x - side.rest[:, None], LOWEST)
        return -shard.sum(jnp.sum(jnp.exp(log_q) * log_q, axis=1))

    def _spread(self, x: Array, rest: Array | None, slope: Array) -> Array:
        """The student's slope by x, [n, V here], from that by all entries, [n, E]."""
        columns, others = self._places("s")
        shared = len(columns)
        at = jnp.where(columns < 0, x.shape[1], columns)
        spread = jnp.zeros_like(x).at[:, at].set(slope[:, :shared], mode="drop")
        if rest is None:
            return spread
        share = jnp.where(others, jnp.exp(x - rest[:, None]), 0.0)
        return spread + share * slope[:, shared:]

    def metrics(self, statistics: Rows) -> dict[str, Array]:
        """At T = 1, [n] each: entropies of whole rows; the rest of what both sides share."""

        def entropy(model: str) -> Array:
            total = statistics[f"sum_{model}1"]
            return jnp.log(total) - statistics[f"self_{model}1"] / total

        def mass(model: str, side: Side, shard: VocabularyShard) -> Array:
            outside = logprob_rows.log_mass(
                self.logits[model], ~side.others, statistics[f"max_{model}"], one, shard
            )
            return jnp.exp(outside) / statistics[f"sum_{model}1"]

        one = jnp.float32(1)
        student, teacher = (self._side(m, statistics[f"max_{m}"], one) for m in "st")
        leads = lambda side: (
            side.entries == self.vocabulary.max(jnp.max(side.entries, axis=1))[:, None]
        )
        both = jnp.any(leads(student) & leads(teacher), axis=1).astype(jnp.float32)
        return {
            "student/entropy": entropy("s"),
            "teacher/entropy": entropy("t"),
            "student/kept_mass": mass("s", student, self.vocabulary),
            "teacher/kept_mass": mass("t", teacher, self.teacher_vocabulary),
            "loss/kl_t1": self._compare(rows.FORWARD_KL, student, teacher).value,
            "agree/top1": self.vocabulary.max(both),
        }
