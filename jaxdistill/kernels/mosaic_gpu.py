"""The GPU kernel: statistics of rows of logits in one read, with Pallas on Mosaic GPU.

Of two models together, or of one alone. Statistics are carried in registers, in base 2, relative
to *scaled* maxima: one multiply-add per logit and exponential. The vocabulary is split over blocks;
the parts merge outside. `mosaic_stream` is the frame.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxdistill.kernels import rows
from jaxdistill.kernels import statistics as stats
from jaxdistill.kernels.mosaic_stream import Tile, stream
from jaxdistill.kernels.operands import Coefficients, taid_target
from jaxdistill.kernels.statistics import AT_TOP, LEAD, LOWEST, MOMENTS, Rows, Scales
from jaxdistill.kernels.tiling import Tiling

LOG2E = 1.4426950408889634
_UNIT = Scales(1.0, 1.0)  # maxima that are scaled already
_BELOW = -(2.0**126)  # the maximum of no entries: below any scaled one, finite less another


def statistics(
    names: Sequence[str],
    logits: Rows,
    coefficients: Coefficients,
    tiling: Tiling,
    interpret: Any = None,
) -> Rows:
    """The statistics of whole rows, each logit read once.

    Args:
      names: of `statistics.MOMENTS`, "echo" and "lead".
      logits: [N, V] by model, "s" and "t" or one of them, of one dtype: float32, bfloat16 or
        float16; V a multiple of `tiling.columns`.
      coefficients: temperature (a scalar) and TAID's t are read.
      tiling: of the kernel.
      interpret: `plgpu.InterpretGPUParams()` to run it on a CPU.

    Returns:
      name -> [N] float32.
    """
    mixed = coefficients.taid_t is not None and len(logits) == 2
    taid_t = coefficients.taid_t if mixed else 0.0
    scalars = (LOG2E / coefficients.temperature, taid_t)
    scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars])
    parts = _parts(_groups(names), mixed, logits, scalars, tiling, interpret)
    merged = {
        group: stats.combine(
            part, _UNIT, lambda x: jnp.max(x, 0), lambda x: jnp.sum(x, 0), jnp.exp2
        )
        for group, part in parts.items()
    }
    found = _in_natural_units(merged, scalars[0])
    if LEAD in found:
        found[LEAD] = -_within_tile(-found[LEAD], logits["s"], tiling.columns)
    return found


def _groups(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names by what their maxima are multiplied by: "tempered", "plain", or "raw" at the top."""
    groups = {
        "raw": tuple(n for n in names if n in AT_TOP),
        "tempered": tuple(n for n in names if n not in AT_TOP and MOMENTS[n].tempered),
        "plain": tuple(n for n in names if n not in AT_TOP and not MOMENTS[n].tempered),
    }
    return {group: members for group, members in groups.items() if members}


def _keys(members: Sequence[str], mixed: bool) -> list[str]:
    tops = [f"max_{model}" for model in stats.models(members, mixed)]
    return [*tops, *members]


def _start(name: str) -> float:
    return LOWEST if name in AT_TOP else _BELOW if name.startswith("max_") else 0.0


def _update(
    carry: Rows, members: Sequence[str], logits: Rows, tops: Rows, k: Any, at: Tile
) -> Rows:
    """A group's statistics after one more tile; `tops` holds the tile's unscaled maxima."""
    scaled = {
        name: jnp.maximum(old, tops[name] if k is None else tops[name] * k)
        for name, old in carry.items()
        if name.startswith("max_")
    }
    k = 1.0 if k is None else k
    by = at.arithmetic
    tile = stats.measure([n for n in members if n != LEAD], logits, scaled, Scales(k, k), by)
    if LEAD in members:
        # The tile's first column stands for all of it: one number for each row, not for each logit.
        first = -jnp.asarray(at.first).astype(jnp.float32)
        tile[LEAD] = jnp.where(tops["max_s"] == scaled["max_s"], first, LOWEST)
    moved = stats.rescale(carry, scaled, _UNIT, jnp.exp2)
    add = lambda name: jnp.maximum if name in AT_TOP else jnp.add
    return scaled | {name: add(name)(moved[name], tile[name]) for name in members}


def _parts(
    groups: dict[str, tuple[str, ...]],
    mixed: bool,
    logits: Rows,
    scalars: Array,
    tiling: Tiling,
    interpret: Any,
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
            updated = _update(mine, members, logits, tops, scales[group], tile)
            new |= {(group, key): value for key, value in updated.items()}
        return tuple(new[place] for place in flat)

    start = tuple(_start(key) for _, key in flat)
    carried = stream(update, start, logits, scalars, (), tiling, interpret)
    outputs = dict(zip(flat, carried, strict=True))
    return {group: {key: outputs[group, key] for key in keys[group]} for group in groups}


def _within_tile(first: Array, logits: Array, columns: int) -> Array:
    """The lowest column of the largest logit, [n] float32, in the tile that begins at `first`."""
    vocab = logits.shape[1]
    tile = first[:, None].astype(jnp.int32) + jnp.arange(columns)[None, :]
    here = jnp.take_along_axis(logits, jnp.clip(tile, 0, vocab - 1), axis=1)
    here = jnp.where(tile < vocab, stats.clamp(here), stats.NOTHING)
    return first + jnp.argmax(here, axis=1).astype(jnp.float32)


def row_sums(
    row: Callable[..., rows.Row],
    logits: Rows,
    coefficients: Coefficients,
    measured: Rows,
    tiling: Tiling,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """sum_v value and sum_v dlogq of a divergence without a closed form: a second read.

    Args:
      row: parameters (traced scalars) -> the divergence's row.
      logits: "s" and "t", [N, V] each.
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
    value, slope = stream(update, (0.0, 0.0), logits, scalars, per_row, tiling, interpret)
    return jnp.sum(value, 0), jnp.sum(slope, 0)


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
