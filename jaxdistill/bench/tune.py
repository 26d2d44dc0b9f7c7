"""Times the kernel's tilings on this device and writes the best of each problem into the table.

A problem is what a call looks up: rows of a chunk, columns with their padding, and how many values
of how many models the kernel carries.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill.bench import cases, timing
from jaxdistill.bench.shapes import Shape
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice, measure, tiling
from jaxdistill.kernels.linear_divergence.chunk import chunk_size
from jaxdistill.kernels.operands import Coefficients, LossSpec, VocabularyShard
from jaxdistill.kernels.statistics import LEAD, Rows
from jaxdistill.kernels.token_loss import TokenRows


class Problem(NamedTuple):
    """One kernel that some call runs.

    Attributes:
      tokens: rows that it is given.
      vocab: columns, with padding.
      dtype: of the logits.
      names: of the statistics.
      models: whose logits it reads.
    """

    tokens: int
    vocab: int
    dtype: str
    names: tuple[str, ...]
    models: int

    def key(self, device: choice.Device) -> str:
        """Where the table holds it."""
        values = measure.values(self.names, self.models)
        return tiling.key(self.tokens, self.vocab, self.dtype, device.kind, values, self.models)


def tune(
    path: str, shapes: tuple[Shape, ...], rounds: int, notice: Callable[[str], None]
) -> dict[str, tiling.Tiling]:
    """The fastest tiling of every problem that the kernel runs on; also written to `path`.

    Raises:
      ConfigError: if the kernel does not run on this device for any of the shapes.
    """
    device = choice.current_device()
    best: dict[str, tiling.Tiling] = {}
    reasons = []
    for problem in dict.fromkeys(one for shape in shapes for one in problems(shape)):
        state = choice.support(problem.vocab, problem.dtype, tokens=problem.tokens)["mosaic_gpu"]
        if not state.runs:
            reasons.append(state.reason)
            continue
        key = problem.key(device)
        best[key] = _best(problem, rounds, device)
        notice(f"{key}: {best[key]}")
    if not best:
        raise ConfigError(f"there is nothing to tune: mosaic_gpu {'; '.join(sorted(set(reasons)))}")
    tiling.save(path, best)
    return best


def problems(shape: Shape) -> Iterator[Problem]:
    """What the losses of a shape look up: of given logits, and of a head on one device.

    The head loss runs with and without its metrics; `linear_logprobs` reads the student alone.
    """
    if shape.vocab % 64 == 0:  # others are XLA's where logits are given
        names = _rows(labels=False).loss_statistics()
        yield Problem(shape.tokens, shape.vocab, shape.dtype, names, 2)
    padded = shape.vocab + -shape.vocab % 64
    chunk = chunk_size(shape.tokens, padded, "gpu", jnp.dtype(shape.dtype).itemsize)
    trained = _rows(labels=True)
    loss, metrics = trained.loss_statistics(), trained.metric_statistics()
    for names in (loss, tuple(dict.fromkeys((*loss, *metrics)))):
        yield Problem(chunk, padded, shape.dtype, names, 2)
    yield Problem(chunk, padded, shape.dtype, ("sum_s", "self_s", LEAD), 1)


def _rows(labels: bool) -> TokenRows:
    """Rows of one logit: what they ask of a kernel is what those of training ask."""
    one, numbers = jnp.zeros((1, 1)), Coefficients(jnp.float32(0), jnp.float32(1))
    spec, shard = LossSpec("forward_kl", labels), VocabularyShard((), 0, 1)
    return TokenRows(spec, "mosaic_gpu", numbers, shard, one, one, jnp.zeros(1, int))


def candidates(problem: Problem, device: choice.Device) -> list[tiling.Tiling]:
    """The heuristic's tiling and its neighbours, a dozen."""
    values = measure.values(problem.names, problem.models)
    sizes = (problem.tokens, problem.vocab, problem.dtype, device.kind)
    first = tiling.heuristic(*sizes, values, problem.models)
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
    coefficients = Coefficients(jnp.float32(0), jnp.float32(cases.TEMPERATURE))
    programs = {}
    for one in candidates(problem, device):
        run = lambda logits, one=one: mosaic_gpu.statistics(
            problem.names, logits, coefficients, one
        )
        try:
            programs[one] = jax.jit(run).lower(logits).compile()
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            continue  # more shared memory or registers than a block can have
    calls = {str(one): lambda program=program: program(logits) for one, program in programs.items()}
    times = timing.in_turn(calls, rounds, device.platform)
    return min(programs, key=lambda one: times[str(one)].median)
