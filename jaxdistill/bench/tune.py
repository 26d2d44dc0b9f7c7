"""Times the kernel's tilings on this device and writes the best of each problem into the table.

A problem is what a call looks up: rows of a chunk, columns with their padding, and what the kernel
carries of which models.
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
from jaxdistill.kernels import choice, rows, tiling
from jaxdistill.kernels.linear_divergence.chunk import chunk_size, loss_statistics
from jaxdistill.kernels.operands import Coefficients, LossSpec, VocabularyShard
from jaxdistill.kernels.sparse.definition import SparseTeacher
from jaxdistill.kernels.sparse.rows import SparseRows
from jaxdistill.kernels.statistics import LEAD, Rows
from jaxdistill.kernels.tiling import Work
from jaxdistill.kernels.token_loss import TokenRows
from jaxdistill.ranges import ENTRIES

TAID = "taid"  # named among kinds: forward_kl to TAID's mixture


class TuningProblem(NamedTuple):
    """One kernel that some call runs.

    Attributes:
      tokens: rows that it is given.
      vocab: columns, with padding.
      dtype: of the logits.
      work: what it does with them.
    """

    tokens: int
    vocab: int
    dtype: str
    work: Work

    def key(self, device: choice.Device) -> str:
        """Where the table holds it."""
        return tiling.key(self.tokens, self.vocab, self.dtype, device.kind, self.work)


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


def problems(shape: Shape, kinds: tuple[str, ...] = ("forward_kl",)) -> Iterator[TuningProblem]:
    """What the losses of a shape look up: of given logits, and of a head on one device.

    The head loss runs with and without its metrics, with labels and without, at a temperature that
    is known to be 1 and at others. One model alone is read for cross-entropy, known tokens and
    shared columns, and by `linear_logprobs` in float32.

    Raises:
      ConfigError: for an unknown kind.
    """
    padded = shape.vocab + -shape.vocab % 64
    chunk = lambda dtype: chunk_size(shape.tokens, padded, "gpu", jnp.dtype(dtype).itemsize)
    head = functools.partial(TuningProblem, chunk(shape.dtype), padded, shape.dtype)
    given = functools.partial(TuningProblem, shape.tokens, shape.vocab, shape.dtype)
    for kind, labels, at_one in itertools.product(kinds, (True, False), (True, False)):
        mixed = kind == TAID
        if mixed and not at_one:
            continue  # it has no temperature
        one = _rows(kind, labels, at_one)
        assert one.divergence_row is not None, "a named kind has one"
        loss, metrics = loss_statistics(one), one.metric_statistics()
        does = functools.partial(Work, mixed=mixed)
        reads = [] if one.divergence_row.closed else [does((kind,))]
        if shape.vocab % 64 == 0:  # others are XLA's where logits are given
            yield from map(given, (does(_measured(one, one.loss_statistics())), *reads))
        sets = (_measured(one, loss), _measured(one, (*loss, *metrics)))
        yield from map(head, (*map(does, sets), *reads))
    for labels, at_one in itertools.product((True, False), (True, False)):
        for alone in (_known(labels, at_one), *([_rows(None, True, at_one)] if labels else ())):
            loss, metrics = alone.loss_statistics(), alone.metric_statistics()
            for names in (loss, metrics, (*loss, *metrics)):
                yield head(Work(_measured(alone, names), 1))
    yield TuningProblem(chunk("float32"), padded, "float32", Work(("sum_s", "self_s", LEAD), 1))


def _measured(rows: TokenRows, names: tuple[str, ...]) -> tuple[str, ...]:
    """What a kernel carries for these statistics, each once."""
    return tuple(dict.fromkeys(rows.twins(names).values()))


def _rows(kind: str | None, labels: bool, at_one: bool) -> TokenRows:
    """Rows of one logit: what they ask of a kernel is what those of training ask."""
    numbers = Coefficients(jnp.float32(0), jnp.float32(1))
    if kind == TAID:
        kind, numbers = "forward_kl", numbers._replace(taid_t=jnp.float32(0.5))
    one, shard = jnp.zeros((1, 1)), VocabularyShard((), 0, 1)
    teacher = None if kind is None else one
    spec = LossSpec(kind, labels, at_one=at_one)
    return TokenRows(spec, "mosaic_gpu", numbers, shard, one, teacher, jnp.zeros(1, int))


def _known(labels: bool, at_one: bool) -> SparseRows:
    """Rows of one logit beside a teacher of whom one token is known."""
    plain = _rows(None, labels, at_one)
    known = SparseTeacher(jnp.zeros((1, 1), int), jnp.zeros((1, 1)))
    spec = LossSpec("forward_kl", labels, at_one=at_one)
    return SparseRows(
        spec, "mosaic_gpu", plain.coefficients, plain.vocabulary, plain.student, None, plain.labels,
        known, 1,
    )  # fmt: skip


def candidates(problem: TuningProblem, device: choice.Device) -> list[tiling.Tiling]:
    """The heuristic's tiling and its neighbours, a dozen."""
    sizes = (problem.tokens, problem.vocab, problem.dtype, device.kind)
    first = tiling.heuristic(*sizes, problem.work)
    splits = sorted({max(1, first.split + step) for step in (-1, 0, 1)})
    neighbours = [
        tiling.within(tiling.Tiling(columns, stages, split), problem.vocab, device.kind)
        for columns in (64, 128)
        for stages in (2, 4)
        for split in splits
        if problem.vocab % columns == 0
    ]
    return list(dict.fromkeys([first, *neighbours]))


def _best(problem: TuningProblem, rounds: int, device: choice.Device) -> tiling.Tiling:
    from jaxdistill.kernels import mosaic_gpu

    work = problem.work
    keys = jax.random.split(jax.random.key(0), work.models)
    shape = (problem.tokens, problem.vocab)
    logits: Rows = {
        model: (3 * jax.random.normal(key, shape)).astype(problem.dtype)
        for model, key in zip("st", keys, strict=False)
    }
    second = next((kind for kind in work.sums if kind in rows.KINDS), None)
    named = {} if second is None else ENTRIES[second]
    parameters = tuple(jnp.float32(one.default) for one in named.values())
    coefficients = Coefficients(
        jnp.float32(0),
        jnp.float32(cases.TEMPERATURE),
        parameters,
        jnp.float32(0.5) if work.mixed else None,
    )
    ones = jnp.ones(problem.tokens)
    measured = dict.fromkeys(("max_s", "max_t", "max_z", "sum_s", "sum_z"), ones)

    def run(logits: Rows, cut: tiling.Tiling) -> Any:
        if second is None:
            return mosaic_gpu.statistics(work.sums, logits, coefficients, cut)
        row = functools.partial(rows.make, second)
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
