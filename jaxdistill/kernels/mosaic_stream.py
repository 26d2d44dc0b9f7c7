"""The GPU kernel's frame: tiles of logits stream through shared memory, row values are carried.

A ring of bulk copies (TMA) streams tiles of one or two models into shared memory. One warpgroup
owns 64 rows; in the WGMMA layout a row lies on 4 lanes: reducing it takes 2 shuffles, no barrier.
The vocabulary is split over blocks, each of which writes row values of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdistill.kernels import statistics as stats
from jaxdistill.kernels.statistics import LOWEST, Arithmetic, Rows
from jaxdistill.kernels.tiling import ROWS, Tiling

_LAYOUT = plgpu.Layout.WGMMA


class Tile(NamedTuple):
    """What a kernel's arithmetic needs to know of its tile.

    Attributes:
      arithmetic: of the backend.
      first: the tile's first column.
      spread_row: a [ROWS] block of device memory over the columns.
      inside: 0 in columns beyond the vocabulary.
    """

    arithmetic: Arithmetic
    first: Any
    spread_row: Callable[[Any], Array]
    inside: Callable[[Array], Array]


class _Grid(NamedTuple):
    """How the tiles cover an array [tokens, vocab].

    Attributes:
      vocab: V.
      columns: of a tile.
      blocks: tiles in a row.
      per_split: tiles in a row of each block; the last may have fewer.
      split: blocks that share a row.
      padded: rows, in whole tiles.
      masked: whether the last tile has dead columns: a width that no tile divides. Only then are
        masks compiled in.
    """

    vocab: int
    columns: int
    blocks: int
    per_split: int
    split: int
    padded: int
    masked: bool


def stream(
    update: Callable[..., tuple[Array, ...]],
    start: tuple[float, ...],
    logits: Rows,
    scalars: Array,
    per_row: Sequence[Array],
    tiling: Tiling,
    interpret: Any,
) -> tuple[Array, ...]:
    """Carries row values over all tiles of one or two models' logits.

    Args:
      update: (carry, clamped float32 tiles by model, tile, scalars, per-row blocks) -> carry.
      start: what every row's values start with.
      logits: by model, [N, V] of one shape and dtype.
      scalars: [S] that `update` reads.
      per_row: arrays [N] that it reads.
      tiling: of the kernel.
      interpret: to run it on a CPU.

    Returns:
      One [split, N] for each value.
    """
    tokens, vocab = next(iter(logits.values())).shape
    grid = _grid(tokens, vocab, tiling)
    per_row = [jnp.pad(x, (0, grid.padded - tokens)) for x in per_row]
    body = _body(update, start, tuple(logits), grid, len(per_row), tiling.stages, interpret is None)
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((grid.split, grid.padded), jnp.float32)] * len(start),
        grid=(grid.padded // ROWS, grid.split),
        grid_names=("row", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return tuple(x[:, :tokens] for x in kernel(*logits.values(), scalars, *per_row))


def _grid(tokens: int, vocab: int, tiling: Tiling) -> _Grid:
    blocks = pl.cdiv(vocab, tiling.columns)
    per_split = pl.cdiv(blocks, tiling.split)
    split = pl.cdiv(blocks, per_split)  # fewer where the last ones would have no tile
    masked = vocab % tiling.columns != 0
    padded = pl.cdiv(tokens, ROWS) * ROWS
    return _Grid(vocab, tiling.columns, blocks, per_split, split, padded, masked)


def _body(
    update: Callable[..., tuple[Array, ...]],
    start: tuple[float, ...],
    models: tuple[str, ...],
    grid: _Grid,
    per_row: int,
    stages: int,
    real: bool,
) -> Callable[..., None]:
    """What one block does: its rows, its part of the vocabulary."""
    shape = (ROWS, grid.columns)

    def full(value: float) -> Array:
        filled = jnp.full((ROWS,), value, jnp.float32)
        return plgpu.layout_cast(filled, _LAYOUT.reduce(1)) if real else filled

    def body(*refs):
        logits_gmem, scalars_gmem = refs[: len(models)], refs[len(models)]
        rest = refs[len(models) + 1 :]
        per_row_gmem, outputs = rest[:per_row], rest[per_row:]
        block = pl.ds(lax.axis_index("row") * ROWS, ROWS)
        first = lax.axis_index("split") * grid.per_split
        spread_row = lambda ref: _spread(_load(ref.at[block], _LAYOUT.reduce(1), real), shape)

        def step(index, *tiles_and_carry):
            *tiles, carry = tiles_and_carry
            column = (first + index[0]) * grid.columns
            inside = _inside(column, grid, shape, real) if grid.masked else None
            logits = {
                model: _clamp(_load(ref, _LAYOUT, real), inside)
                for model, ref in zip(models, tiles, strict=True)
            }
            keep = lambda x: x if inside is None else jnp.where(inside, x, 0.0)
            tile = Tile(_arithmetic(shape, real), column, spread_row, keep)
            return update(carry, logits, tile, scalars_gmem, per_row_gmem)

        transforms = _transforms(logits_gmem[0].dtype, grid.columns, real)
        spec = plgpu.BlockSpec(shape, lambda j: (0, first + j), transforms=transforms)
        pipeline = plgpu.emit_pipeline(
            step,
            grid=(jnp.minimum(grid.per_split, grid.blocks - first),),
            in_specs=[spec] * len(models),
            max_concurrent_steps=stages,
            init_carry=tuple(map(full, start)),
        )
        carried = pipeline(*(ref.at[block] for ref in logits_gmem))
        for output, value in zip(outputs, carried, strict=True):
            output[lax.axis_index("split"), block] = value

    return body


def _load(ref: Any, layout: Any, real: bool) -> Array:
    return plgpu.load(ref, layout=layout) if real else ref[...]


def _inside(column: Any, grid: _Grid, shape: tuple[int, int], real: bool) -> Array:
    """Which columns of a tile that begins at `column` lie within the vocabulary."""
    if real:
        iota = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_LAYOUT)
    else:
        iota = lax.broadcasted_iota(jnp.int32, shape, 1)
    return column + iota < grid.vocab


def _clamp(x: Array, inside: Array | None) -> Array:
    """A tile in float32, impossible entries and dead columns finite and of probability 0.

    float16 has no LOWEST, and its least number is a possible logit: there only -inf is none.
    """
    has_lowest = float(jnp.finfo(x.dtype).min) <= LOWEST
    lowest = LOWEST if has_lowest else -jnp.inf
    if inside is not None:
        x = jnp.where(inside, x, lowest)
    if has_lowest:
        # Clamped before it is widened: two 16-bit logits in one instruction.
        return jnp.maximum(x, lowest).astype(jnp.float32)
    return jnp.maximum(x.astype(jnp.float32), LOWEST)


def _spread(x: Array, shape: tuple[int, int]) -> Array:
    return lax.broadcast_in_dim(x, shape, (0,)) if x.ndim else x


def _arithmetic(shape: tuple[int, int], real: bool) -> Arithmetic:
    """Base 2; maxima are scaled already, so that a shift is one multiply-add."""
    return Arithmetic(
        jnp.exp2,
        lambda x: _spread(x, shape),
        _fused if real else _as_if_fused,
        lambda x: jnp.max(x, axis=1),
        lambda x: jnp.sum(x, axis=1),
    )


def _fused(x: Array, top: Array, k: Any, spread: Callable[[Array], Array]) -> Array:
    """x k - top, which the compiler makes one multiply-add: the product is not rounded."""
    return x * k - spread(top)


def _as_if_fused(x: Array, top: Array, k: Any, spread: Callable[[Array], Array]) -> Array:
    """The same on a CPU, where the interpreter rounds the product."""
    k = jnp.broadcast_to(jnp.asarray(k, jnp.float32), x.shape)
    product = x * k
    return (product - spread(top)) + stats.product_error(x, k, product)


def _transforms(dtype: Any, columns: int, real: bool) -> tuple:
    """How a tile lies in shared memory, so that 4 lanes of a row meet no bank conflict."""
    if not real:
        return ()
    swizzle = min(128, columns * dtype.itemsize)
    tiled = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
    return tiled, plgpu.SwizzleTransform(swizzle)
