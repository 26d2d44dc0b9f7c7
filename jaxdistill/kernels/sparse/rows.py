"""Rows of a student's logits beside a teacher of whom only some tokens are known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels import logprob_rows, rows
from jaxdistill.kernels.logprob_rows import Mass, Picks
from jaxdistill.kernels.sparse import definition
from jaxdistill.kernels.sparse.definition import SparseKind, SparseTeacher
from jaxdistill.kernels.statistics import Rows
from jaxdistill.kernels.token_loss import Divergence, TokenRows


@dataclasses.dataclass(frozen=True)
class SparseRows(TokenRows):
    """n rows on one device; `teacher` is None, and `known` stands in its place.

    Attributes:
      known: of the teacher, at the temperature of the divergence.
      vocab: V, of all devices together.
    """

    known: SparseTeacher
    vocab: int

    @property
    def elementwise(self) -> bool:
        """Whether the slope is elementwise in the logits: known tokens are scattered."""
        return False

    @property
    def reads_in_passes(self) -> bool:
        """Whether metrics cost passes of their own: the student's most likely tokens do."""
        return True

    @property
    def kind(self) -> SparseKind:
        """The kind's entry of the table."""
        assert isinstance(self.spec.kind, str), "checked where it was given"
        return definition.KINDS[self.spec.kind]

    def loss_statistics(self) -> tuple[str, ...]:
        """The statistics that the loss and its slopes are made of."""
        return ("sum_s1", "sum_s") if self.spec.labels else ("sum_s",)

    def metric_statistics(self) -> tuple[str, ...]:
        """The statistics that the metrics at T = 1 are made of."""
        return ("sum_s1", "self_s1")

    @functools.cached_property
    def counts(self) -> Array:
        """Which of the known ids are tokens of their row, bool [n, K]."""
        return definition.is_known(self.known)

    @functools.cached_property
    def picked(self) -> tuple[Array, Array]:
        """Logits of the known tokens, and of the drawn one as a last column; and columns here."""
        ids = jnp.where(self.counts, self.known.ids, -1)
        if self.known.sampled is not None:
            ids = jnp.concatenate([ids, self.known.sampled[:, None]], axis=1)
        return logprob_rows.pick(self.student, ids, self.vocabulary)

    @functools.cached_property
    def others(self) -> Array:
        """The columns of tokens that are not known, bool [n, V]."""
        k = self.known.ids.shape[1]
        return ~logprob_rows.inside(self.picked[1][:, :k], self.student.shape[1])

    def divergence(self, statistics: Rows) -> Divergence:
        """D of each row, without its T^2; it pulls by cotangents of log-probabilities."""
        known, counts = self.known, self.counts
        k, top = known.ids.shape[1], statistics["max_s"]
        log_sum = jnp.log(statistics["sum_s"])
        x = logprob_rows.shifted(self.picked[0], top, self.coefficients.temperature)
        log_q = x - log_sum[:, None]
        value, slope = definition.entries(self.kind, known, counts, log_q[:, :k])
        total, rest = jnp.sum(value, axis=1), None
        if self.kind.ghost:  # of K = V too: an id may be none, and its token is then another
            log_mass = logprob_rows.log_mass(
                self.logits["s"], self.others, top, self.coefficients.temperature, self.vocabulary
            )
            rest_p = definition.rest_of(known, counts, self.vocab)
            total += definition.ghost(rest_p, log_mass - log_sum)
            rest = (log_mass, -rest_p)
            total = rows.not_below_zero(total)
        if known.sampled is not None:
            within = lambda log: jnp.sum(jnp.where(counts, jnp.exp(log), 0.0), axis=1)
            mass_q, mass_p = within(log_q[:, :k]), within(known.logprobs)
            tail, pull = jax.vjp(
                lambda log_q: definition.sampled_tail(known, counts, log_q, mass_q, mass_p),
                log_q[:, k],
            )
            total += tail
            slope = jnp.concatenate([slope, pull(jnp.ones_like(tail))[0][:, None]], axis=1)
        beyond = jnp.any(counts & (known.ids >= self.vocab), axis=1)
        if known.sampled is not None:
            beyond |= known.sampled >= self.vocab
        return Divergence(jnp.where(beyond, jnp.nan, total), pull=(slope, rest))

    def divergence_slope(self, statistics: Rows, divergence: Divergence) -> Array:
        """d D / d (s / T), [n, V]."""
        cotangents, rest = divergence.pull
        masses = []
        if rest is not None:
            log_mass, cotangent = rest
            masses.append(Mass(self.others, log_mass, cotangent))
        return logprob_rows.slopes(
            logprob_rows.shifted(
                self.logits["s"], statistics["max_s"], self.coefficients.temperature
            ),
            jnp.log(statistics["sum_s"]),
            picks=Picks(self.picked[1], cotangents),
            masses=masses,
        )

    def divergence_temperature_slope(self, statistics: Rows, divergence: Divergence) -> Array:
        """d (T^2 D) / dT, [n], the teacher's numbers held."""
        # d (s / T) / dT = -s / T^2; the slope sums to 0 over a row, so shifted logits serve.
        apart = self.logits["s"] - statistics["max_s"][:, None]
        slope = self.divergence_slope(statistics, divergence)
        moved = self.vocabulary.sum(jnp.sum(slope * apart, axis=1))
        return self.scaled_slope(divergence.value, -moved / self.coefficients.temperature**2)

    def metrics(self, statistics: Rows) -> dict[str, Array]:
        """At T = 1, [n] each: entropy, mass on the known tokens, and which of them lead."""
        known, counts = self.known, self.counts
        k = known.ids.shape[1]
        total, picked = statistics["sum_s1"], self.picked[0][:, :k]
        log_q = picked - statistics["max_s"][:, None] - jnp.log(total)[:, None]
        least = logprob_rows.largest(self.logits["s"], min(k, self.vocab), self.vocabulary)[0]
        leads = counts & (picked >= least[:, -1:])
        within = lambda array: jnp.sum(jnp.where(counts, array, 0.0), axis=1)
        return {
            "student/entropy": jnp.log(total) - statistics["self_s1"] / total,
            "student/kept_mass": within(jnp.exp(log_q)),
            "teacher/kept_mass": within(jnp.exp(known.logprobs)),
            "agree/top_k": within(leads) / jnp.maximum(within(counts), 1),
        }
