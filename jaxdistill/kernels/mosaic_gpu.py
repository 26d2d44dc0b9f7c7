"""The GPU kernel: statistics of rows of logits in one read, with Pallas on Mosaic GPU.

A ring of bulk copies (TMA) streams tiles of both models into shared memory. One warpgroup owns 64
rows; in the WGMMA layout a row lies on 4 lanes: reducing it takes 2 shuffles and no barrier.
Statistics are carried in registers, in base 2, relative to *scaled* maxima: one multiply-add per
logit and exponential. The vocabulary is split over blocks; the parts merge outside.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdistill.kernels import rows
from jaxdistill.kernels import statistics as stats
from jaxdistill.kernels.operands import Coefficients, taid_target
from jaxdistill.kernels.statistics import ECHO, LOWEST, MOMENTS, Arithmetic, Rows, Scales
from jaxdistill.kernels.tiling import Tiling

LOG2E = 1.4426950408889634
ROWS = 64  # of a tile: what one warpgroup's WGMMA layout holds
_UNIT = Scales(1.0, 1.0)  # maxima that are scaled already
_BELOW = -(2.0**126)  # the maximum of no entries: below any scaled one, finite less another


def statistics(
    names: Sequence[str],
    student: Array,
    teacher: Array,
    coefficients: Coefficients,
    tiling: Tiling,
    interpret: Any = None,
) -> Rows:
    """The statistics of whole rows, each logit read once.

    Args:
      names: of `statistics.MOMENTS`, and "echo".
      student: [N, V] float32, bfloat16 or float16, V a multiple of `tiling.columns`.
      teacher: [N, V].
      coefficients: temperature (a scalar) and TAID's t are read.
      tiling: of the kernel.
      interpret: `plgpu.InterpretGPUParams()` to run it on a CPU.

    Returns:
      name -> [N] float32.
    """
    groups = _groups(names)
    kernel = functools.partial(_kernel, groups, coefficients.taid_t is not None, tiling, interpret)
    cold = LOG2E / coefficients.temperature
    taid_t = jnp.float32(0) if coefficients.taid_t is None else coefficients.taid_t
    scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in (cold, taid_t)])
    parts = kernel(student, teacher, scalars)
    merged = {
        group: stats.combine(
            part, _UNIT, lambda x: jnp.max(x, 0), lambda x: jnp.sum(x, 0), jnp.exp2
        )
        for group, part in parts.items()
    }
    return _in_natural_units(merged, scalars[0])


def _groups(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names by what their maxima are multiplied by: "tempered", "plain", or "raw" for the echo."""
    groups = {
        "raw": tuple(n for n in names if n == ECHO),
        "tempered": tuple(n for n in names if n != ECHO and MOMENTS[n].tempered),
        "plain": tuple(n for n in names if n != ECHO and not MOMENTS[n].tempered),
    }
    return {group: members for group, members in groups.items() if members}


def _keys(members: Sequence[str], mixed: bool) -> list[str]:
    tops = [f"max_{model}" for model in stats.models(members, mixed)]
    return [*tops, *members]


def _start(name: str) -> float:
    return LOWEST if name == ECHO else _BELOW if name.startswith("max_") else 0.0


def _update(carry: Rows, members: Sequence[str], logits: Rows, tops: Rows, k: Any, by) -> Rows:
    """A group's statistics after one more tile; `tops` holds the tile's unscaled maxima."""
    scaled = {
        name: jnp.maximum(old, tops[name] if k is None else tops[name] * k)
        for name, old in carry.items()
        if name.startswith("max_")
    }
    k = 1.0 if k is None else k
    tile = stats.measure(members, logits, scaled, Scales(k, k), by)
    moved = stats.rescale(carry, scaled, _UNIT, jnp.exp2)
    add = lambda name: jnp.maximum if name == ECHO else jnp.add
    return scaled | {name: add(name)(moved[name], tile[name]) for name in members}


def _kernel(
    groups: dict[str, tuple[str, ...]],
    mixed: bool,
    tiling: Tiling,
    interpret: Any,
    student: Array,
    teacher: Array,
    scalars: Array,
) -> dict[str, Rows]:
    """Statistics [split, N] of each group, relative to scaled maxima."""
    keys = {group: _keys(members, mixed) for group, members in groups.items()}
    flat = [(group, key) for group, members in keys.items() for key in members]
    seen = sorted({key for _, key in flat if key.startswith("max_")})

    def update(carry, logits, tile, scalars_gmem, _):
        cold, taid_t = scalars_gmem[0], scalars_gmem[1]
        scales = {"tempered": cold, "plain": LOG2E, "raw": None}
        if mixed:
            logits["z"] = taid_target(logits["s"], logits["t"], taid_t)
        tops = {key: jnp.max(logits[key[4:]], axis=1) for key in seen}
        old = dict(zip(flat, carry, strict=True))
        new: dict[tuple[str, str], Array] = {}
        for group, members in groups.items():
            mine = {key: old[group, key] for key in keys[group]}
            updated = _update(mine, members, logits, tops, scales[group], tile.arithmetic)
            new |= {(group, key): value for key, value in updated.items()}
        return tuple(new[place] for place in flat)

    start = tuple(_start(key) for _, key in flat)
    run = _stream(update, start, tiling, interpret)
    outputs = dict(zip(flat, run(student, teacher, scalars, ()), strict=True))
    return {group: {key: outputs[group, key] for key in keys[group]} for group in groups}


def row_sums(
    row: Callable[..., rows.Row],
    student: Array,
    teacher: Array,
    coefficients: Coefficients,
    measured: Rows,
    tiling: Tiling,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """sum_v value and sum_v dlogq of a divergence without a closed form: a second read.

    Args:
      row: parameters (traced scalars) -> the divergence's row.
      student: [N, V].
      teacher: [N, V].
      coefficients: of the loss.
      measured: the statistics of the rows, "sum_s" and "sum_z" among them.
      tiling: of the kernel.
      interpret: as in `statistics`.

    Returns:
      [N] and [N], float32.
    """
    mixed = coefficients.taid_t is not None
    cold = 1.0 / coefficients.temperature
    scalars = (cold, coefficients.taid_t if mixed else 0.0, *coefficients.parameters)
    per_row = [measured["max_s"], jnp.log(measured["sum_s"])]
    per_row += [stats.top_of(measured, "z"), jnp.log(measured["sum_z"])]

    def update(carry, logits, tile, scalars_gmem, per_row_gmem):
        k, taid_t = scalars_gmem[0], scalars_gmem[1]
        table = row(*(scalars_gmem[2 + i] for i in range(len(coefficients.parameters))))
        target = logits["t"]
        if mixed:
            target = taid_target(logits["s"], logits["t"], taid_t)
        top_s, log_s, top_z, log_z = map(tile.spread_row, per_row_gmem)
        log_q = (logits["s"] - top_s) * k - log_s
        log_p = (target - top_z) * k - log_z
        total = tile.arithmetic.total
        value, slope = table.value(log_p, log_q), table.dlogq(log_p, log_q)
        return carry[0] + total(tile.inside(value)), carry[1] + total(tile.inside(slope))

    scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars])
    run = _stream(update, (0.0, 0.0), tiling, interpret)
    value, slope = run(student, teacher, scalars, tuple(per_row))
    return jnp.sum(value, 0), jnp.sum(slope, 0)


class _Tile(NamedTuple):
    """What a kernel's arithmetic needs to know of its tile."""

    arithmetic: Arithmetic
    spread_row: Callable[[Any], Array]  # a [ROWS] block of device memory, over the columns
    inside: Callable[[Array], Array]  # 0 in columns beyond the vocabulary


def _stream(
    update: Callable[..., tuple[Array, ...]],
    start: tuple[float, ...],
    tiling: Tiling,
    interpret: Any,
) -> Callable[..., tuple[Array, ...]]:
    """A kernel that carries row values over all tiles of two arrays of logits.

    Args:
      update: (carry, {"s", "t"} clamped float32 tiles, tile, scalars, per-row blocks) -> carry.
      start: what every row's values start with.
      tiling: of the kernel.
      interpret: to run it on a CPU.

    Returns:
      (student, teacher [N, V], scalars, per-row arrays [N]) -> one [split, N] for each value.
    """
    columns, real = tiling.columns, interpret is None
    layout = plgpu.Layout.WGMMA
    shape = (ROWS, columns)

    def run(student, teacher, scalars, per_row):
        tokens, vocab = student.shape
        blocks = pl.cdiv(vocab, columns)
        per_split = pl.cdiv(blocks, tiling.split)
        split = pl.cdiv(blocks, per_split)  # fewer where the last ones would have no tile
        # Compiled in only where some tile has dead columns: uneven splits, a width no tile divides.
        masked = vocab % columns != 0 or per_split * split != blocks
        padded = pl.cdiv(tokens, ROWS) * ROWS
        per_row = [jnp.pad(x, (0, padded - tokens)) for x in per_row]
        # float16 has no LOWEST, and its least number is a possible logit: there only -inf is none.
        has_lowest = float(jnp.finfo(student.dtype).min) <= LOWEST
        lowest = LOWEST if has_lowest else -jnp.inf
        spread = lambda x: lax.broadcast_in_dim(x, shape, (0,)) if x.ndim else x
        shift = _fused if real else _as_if_fused
        arithmetic = Arithmetic(
            jnp.exp2, spread, shift, lambda x: jnp.max(x, axis=1), lambda x: jnp.sum(x, axis=1)
        )

        def body(student_gmem, teacher_gmem, scalars_gmem, *rest):
            per_row_gmem, outputs = rest[: len(per_row)], rest[len(per_row) :]
            block = pl.ds(lax.axis_index("row") * ROWS, ROWS)
            first = lax.axis_index("split") * per_split

            def load_row(ref):
                here = ref.at[block]
                return plgpu.load(here, layout=layout.reduce(1)) if real else here[...]

            def step(index, student_smem, teacher_smem, carry):
                load = lambda ref: plgpu.load(ref, layout=layout) if real else ref[...]
                logits = {"s": load(student_smem), "t": load(teacher_smem)}
                inside = None
                if masked:
                    iota = (
                        plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
                        if real
                        else lax.broadcasted_iota(jnp.int32, shape, 1)
                    )
                    inside = (first + index[0]) * columns + iota < vocab
                    logits = {m: jnp.where(inside, x, lowest) for m, x in logits.items()}
                if has_lowest:
                    # Clamped before they are widened: two 16-bit logits in one instruction.
                    logits = {m: jnp.maximum(x, lowest) for m, x in logits.items()}
                logits = {m: x.astype(jnp.float32) for m, x in logits.items()}
                if not has_lowest:
                    logits = {m: jnp.maximum(x, LOWEST) for m, x in logits.items()}
                tile = _Tile(
                    arithmetic,
                    lambda ref: spread(load_row(ref)),
                    lambda x: x if inside is None else jnp.where(inside, x, 0.0),
                )
                return update(carry, logits, tile, scalars_gmem, per_row_gmem)

            def full(value):
                filled = jnp.full((ROWS,), value, jnp.float32)
                return plgpu.layout_cast(filled, layout.reduce(1)) if real else filled

            spec = plgpu.BlockSpec(
                shape, lambda j: (0, first + j), transforms=_transforms(student, columns, real)
            )
            pipeline = plgpu.emit_pipeline(
                step,
                grid=(per_split,),
                in_specs=[spec, spec],
                max_concurrent_steps=tiling.stages,
                init_carry=tuple(map(full, start)),
            )
            carried = pipeline(student_gmem.at[block], teacher_gmem.at[block])
            for output, value in zip(outputs, carried, strict=True):
                output[lax.axis_index("split"), block] = value

        kernel = plgpu.kernel(
            body,
            out_type=[jax.ShapeDtypeStruct((split, padded), jnp.float32)] * len(start),
            grid=(padded // ROWS, split),
            grid_names=("row", "split"),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=interpret,
        )
        return tuple(x[:, :tokens] for x in kernel(student, teacher, scalars, *per_row))

    return run


def _fused(x: Array, top: Array, k: Any, spread: Callable[[Array], Array]) -> Array:
    """x k - top, which the compiler makes one multiply-add: the product is not rounded."""
    return x * k - spread(top)


def _as_if_fused(x: Array, top: Array, k: Any, spread: Callable[[Array], Array]) -> Array:
    """The same on a CPU, where the interpreter rounds the product."""
    k = jnp.broadcast_to(jnp.asarray(k, jnp.float32), x.shape)
    product = x * k
    return (product - spread(top)) + stats.product_error(x, k, product)


def _transforms(array: Array, columns: int, real: bool) -> tuple:
    """How a tile lies in shared memory, so that 4 lanes of a row meet no bank conflict."""
    if not real:
        return ()
    swizzle = min(128, columns * array.dtype.itemsize)
    tiled = plgpu.TilingTransform((8, swizzle // array.dtype.itemsize))
    return tiled, plgpu.SwizzleTransform(swizzle)


def _in_natural_units(merged: dict[str, Rows], cold: Array) -> Rows:
    """From base 2 and scaled maxima to the definition's units: base e, maxima of logits.

    A scaled maximum is rounded, so it stands for a logit next to the largest one. The statistics
    are moved to a common logit of all groups; what that shifts is known exactly.
    """
    joined: Rows = {}
    for group, statistics in merged.items():
        tops = {name: x for name, x in statistics.items() if name.startswith("max_")}
        moments = {name: x for name, x in statistics.items() if name not in tops}
        if group == "raw":
            joined |= statistics
            continue
        k = cold if group == "tempered" else jnp.float32(LOG2E)
        # A part of nothing but impossible entries stands at LOWEST, however division rounds.
        nothing = {name: top <= LOWEST / 2 * k for name, top in tops.items()}
        joined = {
            name: jnp.where(nothing[name], LOWEST, top / k) for name, top in tops.items()
        } | joined
        # What the common logit is when scaled: its product with k, and what rounding took from it.
        product = lax.optimization_barrier({name: joined[name] * k for name in tops})
        before = {
            name: jnp.where(
                nothing[name],
                0.0,
                top - product[name] - stats.product_error(joined[name], k, product[name]),
            )
            for name, top in tops.items()
        }
        zero = jax.tree.map(jnp.zeros_like, before)
        moved = stats.rescale(before | moments, zero, _UNIT, jnp.exp2)
        unit = lambda name: 1.0 if MOMENTS[name].of == "one" else 1.0 / LOG2E
        joined |= {name: moved[name] * unit(name) for name in moments}
    return joined
