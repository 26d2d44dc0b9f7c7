"""How fast and how large a model is: prefill, decode, throughput, memory, bytes."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdistill.compress import sparsify
from jaxdistill.evaluate.meter import MeterStep
from jaxdistill.models import (
    DecoderConfig,
    Model,
    count_non_embedding_parameters,
    count_parameters,
    decoder,
)
from jaxdistill.sharding import on_mesh
from jaxdistill.types import Batch


def measure(
    model: Model,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 10,
) -> dict[str, float]:
    """Latencies of generating, after a warm-up that compiles; greedy, no end token stops it.

    Args:
      model: on its devices.
      prompt_tokens: of every row.
      new_tokens: after the first one, of every row.
      batch_size: rows at a time.
      repeats: timings of each kind.

    Returns:
      prefill_ms_p50 and _p95: from prompt to first token; decode_ms_p50 and _p95: per further
      token, each repeat a mean over its tokens; decode_tokens_per_second: of all rows together.
    """
    run = _generating(model, prompt_tokens, batch_size)
    first = timed(run(1), repeats)
    whole = timed(run(1 + new_tokens), repeats)
    steps = np.maximum(whole - np.median(first), 1e-9) / new_tokens
    return {
        "prefill_ms_p50": 1e3 * float(np.quantile(first, 0.5)),
        "prefill_ms_p95": 1e3 * float(np.quantile(first, 0.95)),
        "decode_ms_p50": 1e3 * float(np.quantile(steps, 0.5)),
        "decode_ms_p95": 1e3 * float(np.quantile(steps, 0.95)),
        "decode_tokens_per_second": batch_size / float(np.quantile(steps, 0.5)),
    }


def fastest_token(
    model: Model, *, prompt_tokens: int = 128, new_tokens: int = 64, repeats: int = 7
) -> float | None:
    """Seconds of one further token of one row, of the fastest runs: other work disturbs them least.

    None where the runs without further tokens differ by as much as the token takes.
    """
    run = _generating(model, prompt_tokens, 1)
    first = timed(run(1), repeats)
    further = timed(run(1 + new_tokens), repeats).min() - first.min()
    return None if further < 2 * (np.median(first) - first.min()) else float(further) / new_tokens


def _generating(model: Model, length: int, rows: int) -> Callable[[int], Callable[[], Any]]:
    """count -> a call that makes so many tokens after prompts of this shape."""
    endless = Model(dataclasses.replace(model.config, eos_ids=()), model.params)
    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))
    prompts = drawn.tolist()
    return lambda count: lambda: endless.generate(prompts, max_new_tokens=count)


def timed(run: Callable[[], Any], repeats: int) -> np.ndarray:
    """Seconds of `repeats` calls after one that is not counted; each waits for its result."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return np.asarray(seconds)


def tokens_per_second(
    step: MeterStep, params: Any, batch: Batch, mesh: Mesh, repeats: int = 3
) -> float:
    """Scored tokens a second, padding not counted: the median of `repeats` after a warm-up.

    Args:
      step: `meter.scoring_step`.
      params: of the model.
      batch: on the mesh.
      mesh: of both.
      repeats: timings.
    """
    tokens = int(jnp.sum(batch.segment_ids > 0))
    with jax.set_mesh(mesh):
        seconds = timed(lambda: jax.block_until_ready(step(params, None, batch, {})), repeats)
    return tokens / float(np.median(seconds))


def size(config: DecoderConfig, params: Any) -> dict[str, int | float]:
    """Parameters, those outside embedding and head, bytes as they are held, and zeros if any.

    "zeros" is the share of the layers' projections that is exactly 0, from 0.1 % on.

    Whole numbers below a byte count by their bits, which is what they take on disk.
    """
    zeros = sparsify.zeros(params)
    return ({"zeros": zeros} if zeros >= 1e-3 else {}) | {
        "parameters": count_parameters(config),
        "parameters_non_embedding": count_non_embedding_parameters(config),
        "bytes": sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(params)),
    }


def leaf_bytes(leaf: Any) -> int:
    """Bytes of an array, two 4-bit numbers to a byte."""
    kind = leaf.dtype
    bits = jnp.iinfo(kind).bits if jnp.issubdtype(kind, jnp.integer) else 8 * kind.itemsize
    return math.ceil(leaf.size * bits / 8)


def peak_bytes(model: Model, rows: int, length: int) -> int | None:
    """Bytes that the compiler plans for scoring [rows, length] tokens: weights and work space.

    Per device, and the same on every backend. None where the compiler does not report it.
    """
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    dtype = np.dtype(model.params["embedding"].dtype)

    def last(params: Any, tokens: Any) -> Any:
        outputs = decoder.apply(model.config, params, tokens, compute_dtype=dtype)
        part = dataclasses.replace(outputs, hidden=outputs.hidden[:, -1:])
        return decoder.logits(part)

    with on_mesh(model.params):
        plan = jax.jit(last).lower(model.params, tokens).compile().memory_analysis()
    if plan is None:
        return None
    return int(plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes)
