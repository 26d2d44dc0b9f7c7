"""Measures rows of logits by the chosen implementation: two models together, or one alone."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels import choice
from jaxdistill.kernels import statistics as stats
from jaxdistill.kernels.operands import Coefficients, VocabularyShard
from jaxdistill.kernels.statistics import LEAD, Rows
from jaxdistill.kernels.tiling import Tiling, Work, tiling


def measure(
    names: Sequence[str],
    given: Rows,
    clamped: Rows,
    coefficients: Coefficients,
    implementation: str,
    shard: VocabularyShard,
) -> Rows:
    """Statistics of whole rows by name, [n] each, merged over the shards of the vocabulary.

    Args:
      names: of `statistics.MOMENTS`, "echo" and "lead".
      given: logits [n, V here] as they came, "s" and "t" or one of them; a GPU's kernel reads them.
      clamped: the same in float32, with TAID also "z": XLA reads them.
      coefficients: temperature and TAID's t are read.
      implementation: from `choice.choose`.
      shard: the columns here.
    """
    if not names:
        return {}
    scales = coefficients.scales
    if implementation == "mosaic_gpu":
        from jaxdistill.kernels import mosaic_gpu

        alike = of_one_dtype(given)
        mixed = coefficients.taid_t is not None and len(alike) == 2
        cut = tiling_of(alike, Work(tuple(names), len(alike), mixed))
        measured = mosaic_gpu.statistics(names, alike, coefficients, cut, choice.INTERPRET)
    elif choice.reads_in_passes(choice.current_device()):
        measured = stats.in_passes(names, clamped, scales)
    else:
        measured = stats.in_one_pass(names, clamped, scales)
    if LEAD in measured:
        measured[LEAD] -= jnp.asarray(shard.offset, jnp.float32)
    if shard.axes:
        measured = stats.combine(measured, scales, shard.max, shard.sum)
    return measured


def of_one_dtype(logits: Rows) -> Rows:
    """Logits as the kernel takes them: the tiles of both models lie alike in memory."""
    common = jnp.result_type(*(x.dtype for x in logits.values()))
    return {model: x.astype(common) for model, x in logits.items()}


def tiling_of(logits: Rows, work: Work) -> Tiling:
    """The tiling of a kernel that does this with these logits."""
    first: Array = next(iter(logits.values()))
    tokens, vocab = first.shape
    return tiling(tokens, vocab, first.dtype.name, choice.current_device().kind, work)
