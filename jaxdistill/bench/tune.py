"""Times the kernel's tilings on this device and writes the best of each problem into the table.

A problem is what a call looks up: rows of a chunk, columns with their padding, and how many values
of how many models the kernel carries.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill.bench import cases, timing
from jaxdistill.bench.shapes import Shape
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice, measure, rows, tiling
from jaxdistill.kernels.linear_divergence.chunk import chunk_size, loss_statistics
from jaxdistill.kernels.operands import Coefficients, LossSpec, VocabularyShard
from jaxdistill.kernels.sparse.definition import Known
from jaxdistill.kernels.sparse.rows import SparseRows
from jaxdistill.kernels.statistics import LEAD, Rows
from jaxdistill.kernels.token_loss import TokenRows

TAID = "taid"  # named among kinds: forward_kl to TAID's mixture


class Problem(NamedTuple):
    """One kernel that some call runs.

    Attributes:
      tokens: rows that it is given.
      vocab: columns, with padding.
      dtype: of the logits.
      names: of the statistics; none for the second read of a divergence without a closed form.
      models: whose logits it reads.
      mixed: whether it makes TAID's mixture of both.
    """

    tokens: int
    vocab: int
    dtype: str
    names: tuple[str, ...]
    models: int
    mixed: bool = False

    @property
    def values(self) -> int:
        """How many values it carries for each row."""
        return measure.values(self.names, self.models) if self.names else measure.SECOND_READ

    def key(self, device: choice.Device) -> str:
        """Where the table holds it."""
        sizes = (self.tokens, self.vocab, self.dtype, device.kind)
        return tiling.key(*sizes, self.values, self.models)


def tune(
    path: str,
    shapes: tuple[Shape, ...],
    rounds: int,
    notice: Callable[[str], None],
    kinds: tuple[str, ...] = ("forward_kl",),
) -> dict[str, tiling.Tiling]:
    """The fastest tiling of every problem that the kernel runs on; also written to `path`.

    Args:
      path: of the table.
      shapes: of the problems.
      rounds: of timing.
      notice: receives one line for each entry.
      kinds: of the divergences, and "taid".

    Raises:
      ConfigError: for an unknown kind, or if the kernel does not run on this device for any of the
        shapes.
    """
    device = choice.current_device()
    best: dict[str, tiling.Tiling] = {}
    reasons = []
    todo = {one.key(device): one for shape in shapes for one in problems(shape, kinds)}
    for key, problem in todo.items():
        state = choice.support(problem.vocab, problem.dtype, tokens=problem.tokens)["mosaic_gpu"]
        if not state.runs:
            reasons.append(state.reason)
            continue
        best[key] = _best(problem, rounds, device)
        notice(f"{key}: {best[key]}")
    if not best:
        raise ConfigError(f"there is nothing to tune: mosaic_gpu {'; '.join(sorted(set(reasons)))}")
    tiling.save(path, best)
    return best


def problems(shape: Shape, kinds: tuple[str, ...] = ("forward_kl",)) -> Iterator[Problem]:
    """What the losses of a shape look up: of given logits, and of a head on one device.

    The head loss runs with and without its metrics, with labels and without. One model alone is
    read for cross-entropy, known tokens and shared columns, and by `linear_logprobs` in float32.

    Raises:
      ConfigError: for an unknown kind.
    """
    padded = shape.vocab + -shape.vocab % 64
    chunk = lambda dtype: chunk_size(shape.tokens, padded, "gpu", jnp.dtype(dtype).itemsize)
    head = functools.partial(Problem, chunk(shape.dtype), padded, shape.dtype)
    given = functools.partial(Problem, shape.tokens, shape.vocab, shape.dtype)
    for kind, labels in itertools.product(kinds, (True, False)):
        one, mixed = _rows(kind, labels), kind == TAID
        assert one.divergence_row is not None, "a named kind has one"
        reads = [()] if one.divergence_row.closed is None else []
        if shape.vocab % 64 == 0:  # others are XLA's where logits are given
            yield from (given(names, 2, mixed) for names in (one.loss_statistics(), *reads))
        loss, metrics = loss_statistics(one), one.metric_statistics()
        sets = (*(_measured(one, names) for names in (loss, (*loss, *metrics))), *reads)
        yield from (head(names, 2, mixed) for names in sets)
    for alone in (_rows(None, True), _known(labels=True), _known(labels=False)):
        loss, metrics = alone.loss_statistics(), alone.metric_statistics()
        sets = (loss, metrics, (*loss, *metrics))
        yield from (head(_measured(alone, names), 1) for names in sets)
    yield Problem(chunk("float32"), padded, "float32", ("sum_s", "self_s", LEAD), 1)


def _measured(rows: TokenRows, names: tuple[str, ...]) -> tuple[str, ...]:
    """What a kernel carries for these statistics, each once."""
    return tuple(dict.fromkeys(rows.twins(names).values()))


def _rows(kind: str | None, labels: bool) -> TokenRows:
    """Rows of one logit: what they ask of a kernel is what those of training ask."""
    numbers = Coefficients(jnp.float32(0), jnp.float32(1))
    taid = kind == TAID
    if taid:
        kind, numbers = "forward_kl", numbers._replace(taid_t=jnp.float32(0.5))
    one, shard = jnp.zeros((1, 1)), VocabularyShard((), 0, 1)
    teacher = None if kind is None else one
    spec = LossSpec(kind, labels, at_one=taid)  # other temperatures are traced numbers
    return TokenRows(spec, "mosaic_gpu", numbers, shard, one, teacher, jnp.zeros(1, int))


def _known(labels: bool) -> SparseRows:
    """Rows of one logit beside a teacher of whom one token is known."""
    plain = _rows(None, labels)
    known = Known(jnp.zeros((1, 1), int), jnp.zeros((1, 1)))
    spec = LossSpec("forward_kl", labels)
    return SparseRows(
        spec, "mosaic_gpu", plain.coefficients, plain.vocabulary, plain.student, None, plain.labels,
        known, 1,
    )  # fmt: skip


def candidates(problem: Problem, device: choice.Device) -> list[tiling.Tiling]:
    """The heuristic's tiling and its neighbours, a dozen."""
    sizes = (problem.tokens, problem.vocab, problem.dtype, device.kind)
    first = tiling.heuristic(*sizes, problem.values, problem.models)
    splits = sorted({max(1, first.split + step) for step in (-1, 0, 1)})
    neighbours = [
        tiling.within(tiling.Tiling(columns, stages, split), problem.vocab, device.kind)
        for columns in (64, 128)
        for stages in (2, 4)
        for split in splits
        if problem.vocab % columns == 0
    ]
    return list(dict.fromkeys([first, *neighbours]))


def _best(problem: Problem, rounds: int, device: choice.Device) -> tiling.Tiling:
    from jaxdistill.kernels import mosaic_gpu

    keys = jax.random.split(jax.random.key(0), problem.models)
    shape = (problem.tokens, problem.vocab)
    logits: Rows = {
        model: (3 * jax.random.normal(key, shape)).astype(problem.dtype)
        for model, key in zip("st", keys, strict=False)
    }
    taid_t = jnp.float32(0.5) if problem.mixed else None
    temperature = jnp.float32(cases.TEMPERATURE)
    coefficients = Coefficients(jnp.float32(0), temperature, (), taid_t)
    tops = {name: jnp.ones(problem.tokens) for name in ("max_s", "max_t", "max_z")}
    measured = tops | {name: jnp.ones(problem.tokens) for name in ("sum_s", "sum_z")}

    def run(logits: Rows, cut: tiling.Tiling) -> Any:
        if problem.names:
            return mosaic_gpu.statistics(problem.names, logits, coefficients, cut)
        row = functools.partial(rows.make, "generalized_jsd")  # the kind hardly matters to a read
        return mosaic_gpu.row_sums(row, logits, coefficients, measured, cut)

    programs = {}
    for one in candidates(problem, device):
        try:
            programs[one] = jax.jit(functools.partial(run, cut=one)).lower(logits).compile()
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            continue  # more shared memory or registers than a block can have
    calls = {str(one): lambda program=program: program(logits) for one, program in programs.items()}
    times = timing.in_turn(calls, rounds, device.platform)
    return min(programs, key=lambda one: times[str(one)].median)
