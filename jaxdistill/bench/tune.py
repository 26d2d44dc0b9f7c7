"""Times the kernel's tilings on this device and writes the best of each shape into the table."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.bench import cases, timing
from jaxdistill.bench.shapes import Shape
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice, tiling
from jaxdistill.kernels.operands import Coefficients

NAMES = ("sum_s", "sum_z", "gap_z")


def tune(
    path: str, shapes: tuple[Shape, ...], rounds: int, notice: Callable[[str], None]
) -> dict[str, tiling.Tiling]:
    """The fastest tiling of every shape that the kernel runs on; also written to `path`.

    Raises:
      ConfigError: if the kernel does not run on this device for any of the shapes.
    """
    device = choice.current_device()
    best: dict[str, tiling.Tiling] = {}
    reasons = []
    for shape in shapes:
        state = choice.support(shape.vocab, shape.dtype)["mosaic_gpu"]
        if not state.runs:
            reasons.append(state.reason)
            continue
        key = tiling.key(shape.tokens, shape.vocab, shape.dtype, device.kind)
        best[key] = _best(shape, rounds, device)
        notice(f"{key}: {best[key]}")
    if not best:
        raise ConfigError(f"there is nothing to tune: mosaic_gpu {'; '.join(sorted(set(reasons)))}")
    tiling.save(path, best)
    return best


def candidates(shape: Shape, device: choice.Device) -> list[tiling.Tiling]:
    """The heuristic's tiling and its neighbours."""
    first = tiling.heuristic(shape.tokens, shape.vocab, shape.dtype, device.kind)
    splits = sorted({max(1, first.split + d) for d in (-1, 0, 1, 2)} | {2 * first.split})
    neighbours = [
        tiling.within(tiling.Tiling(columns, stages, split), shape.vocab, device.kind)
        for columns in (64, 128)
        for stages in (2, 3, 4, 6)
        for split in splits
        if shape.vocab % columns == 0
    ]
    return list(dict.fromkeys([first, *neighbours]))


def _best(shape: Shape, rounds: int, device: choice.Device) -> tiling.Tiling:
    from jaxdistill.kernels import mosaic_gpu

    student, teacher = cases.dense(shape).arguments
    coefficients = Coefficients(jnp.float32(0), jnp.float32(cases.TEMPERATURE))
    programs = {}
    for one in candidates(shape, device):
        run = lambda s, t, one=one: mosaic_gpu.statistics(
            NAMES, {"s": s, "t": t}, coefficients, one
        )
        try:
            programs[one] = jax.jit(run).lower(student, teacher).compile()
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            continue  # more shared memory or registers than a block can have
    calls = {
        str(one): lambda program=program: program(student, teacher)
        for one, program in programs.items()
    }
    times = timing.in_turn(calls, rounds, device.platform)
    return min(programs, key=lambda one: times[str(one)].median)
