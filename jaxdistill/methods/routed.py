"""Several teachers of one student: every micro-batch is of one, chosen inside the program."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.teachers import TeacherFunction
from jaxdistill.types import Batch, Mean

PREFIX = "teachers/"  # of what is reported of one teacher: teachers/NAME/WHAT
# What is reported of each teacher -> the mean of the objective that it is.
REPORTED: Mapping[str, str] = {
    "loss": "loss",
    "ce": "loss/ce",
    "kl_t1": "loss/kl_t1",
    "sampled_kl": "loss/sampled_kl",
    "agree_top1": "agree/top1",
}
NORMALISE = ("token", "teacher")

# (teacher, its parameters, part of a batch, more) -> (named means, a tree of sums).
OfOne = Callable[..., tuple[dict[str, Mean], Any]]


@dataclasses.dataclass(frozen=True)
class Routed:
    """Teachers by name; `Batch.route` counts them from 1, in this order.

    With S_k the sum of the loss over the N_k counted tokens of teacher k in the whole batch:

        token:    L = sum_k S_k / sum_k N_k
        teacher:  L = mean of S_k / N_k over the teachers that have tokens in the batch

    Attributes:
      teachers: name -> teacher; the step takes parameters by the same names.
      normalise: `token` or `teacher`.

    Where a loss is a mean of something else than tokens, such as sequences that earned rewards,
    S and N are of that, and of the whole batch.
    """

    teachers: Mapping[str, TeacherFunction]
    normalise: str = "token"

    def counts(self, batch: Batch) -> Array:
        """float32 [teachers], the tokens of each that count in a batch."""
        assert batch.route is not None, "the feed of several teachers fills it"
        numbers = jnp.arange(1, len(self.teachers) + 1)
        of_row = jnp.sum(batch.mask, axis=1, dtype=jnp.float32)
        theirs = batch.route[None, :] == numbers[:, None]
        return jnp.sum(jnp.where(theirs, of_row[None, :], 0.0), axis=1)

    def weights(self, batch: Batch) -> Array | None:
        """float32 [teachers], what each one's sums are multiplied by; None: by nothing."""
        if self.normalise == "token":
            return None
        counts = self.counts(batch)
        met = jnp.maximum(jnp.sum(counts > 0), 1)
        return jnp.sum(counts) / (met * jnp.maximum(counts, 1))

    def numbers(self, batch: Batch) -> dict[str, Array]:
        """tokens of each teacher in a batch, and its share of all."""
        counts = self.counts(batch)
        shares = counts / jnp.maximum(jnp.sum(counts), 1)
        named = {"tokens": counts, "share": shares}
        return {
            f"{PREFIX}{name}/{what}": values[place]
            for place, name in enumerate(self.teachers)
            for what, values in named.items()
        }

    def chosen(self, of_one: OfOne, params: Mapping[str, Any], weights: Array | None) -> Callable:
        """(part, more) -> `of_one` of the teacher of its rows, and zeros where they have none.

        Only that teacher runs, and the loss with it: signals of two may differ in form and size.

        Args:
          of_one: what is computed of a part whose rows are of one teacher, or of none.
          params: of the teachers, by name.
          weights: of `weights`, for the whole batch.
        """

        def branch(place: int, name: str, part: Batch, *more: Any) -> tuple[dict[str, Mean], Any]:
            if part.teacher is not None:  # what was stored of others may have another form
                part = dataclasses.replace(part, teacher=part.teacher.get(name))
            means, sums = of_one(self.teachers[name], params[name], part, *more)
            told = {
                f"{PREFIX}{name}/{what}": means[of] for what, of in REPORTED.items() if of in means
            }
            if weights is not None:
                weight, loss = weights[place], means["loss"]
                means = means | {"loss": Mean(loss.total * weight, loss.count)}
                sums = jax.tree.map(lambda leaf: leaf * weight.astype(leaf.dtype), sums)
            return means | told, sums

        branches = [functools.partial(branch, *one) for one in enumerate(self.teachers)]

        def of_part(part: Batch, *more: Any) -> tuple[dict[str, Mean], Any]:
            assert part.route is not None, "the feed of several teachers fills it"
            shapes = [jax.eval_shape(one, part, *more) for one in branches]
            zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))
            every = {name: mean for means, _ in shapes for name, mean in means.items()}

            def filled(one: Callable) -> Callable:
                def whole(*given: Any) -> tuple[dict[str, Mean], Any]:
                    means, sums = one(*given)
                    return zeros(every) | means, sums

                return whole

            none = lambda *given: (zeros(every), zeros(shapes[0][1]))
            return jax.lax.switch(jnp.max(part.route), [none, *map(filled, branches)], part, *more)

        return of_part


def asked(teacher: TeacherFunction | Routed, params: Any, batch: Batch, of_one: OfOne) -> Callable:
    """(part, more) -> `of_one` of the one teacher, or of that of several which the part is of.

    Args:
      teacher: one, or several.
      params: its parameters, or theirs by name.
      batch: the whole one, which `part` is of; counts come from it.
      of_one: see `Routed.chosen`.
    """
    if isinstance(teacher, Routed):
        return teacher.chosen(of_one, params, teacher.weights(batch))
    return functools.partial(of_one, teacher, params)


def numbers(teacher: TeacherFunction | Routed, batch: Batch) -> dict[str, Array]:
    """What is reported of each of several teachers in a batch; nothing of one alone."""
    return teacher.numbers(batch) if isinstance(teacher, Routed) else {}
