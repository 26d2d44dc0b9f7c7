"""How a model's next-token distribution compares with another's and with the text, in sums."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.errors import DataError
from jaxdistill.measure.scoring import chunk_logits, over_chunks
from jaxdistill.models import DecoderConfig, decoder
from jaxdistill.types import Batch

BINS = 15


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def sums(
    config: DecoderConfig,
    teacher: DecoderConfig | None,
    vocab: int,
    dtype: DTypeLike,
    params: Any,
    teacher_params: Any,
    batch: Batch,
) -> dict[str, Array]:
    """Sums over the counted tokens of a batch; no more than a chunk of logits exists at a time.

    Returns:
      count [] and, as sums, nll and bins [15, 3]: per bin of the highest probability how many
      tokens, the sum of that probability, and how often that token came. With a teacher also
      forward_kl = KL(teacher || student), reverse_kl = KL(student || teacher),
      accept = sum_v min(p_v, q_v), top1 (same most likely token), top5 (share of the five most
      likely that are the same).
    """
    run = functools.partial(
        decoder.apply,
        tokens=batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        compute_dtype=dtype,
    )
    ours = run(config, params)
    theirs = None if teacher is None else run(teacher, teacher_params)
    rows, length = batch.tokens.shape

    def make(hidden_BCD, targets_BC, mask_BC, teacher_BCD):
        weights_BC = mask_BC.astype(jnp.float32)
        logq_BCV = jax.nn.log_softmax(chunk_logits(hidden_BCD, ours, vocab), axis=-1)
        picked_BC = jnp.take_along_axis(logq_BCV, targets_BC[..., None], -1)[..., 0]
        found = {"count": jnp.sum(weights_BC), "nll": -jnp.sum(picked_BC * weights_BC)}
        found["bins"] = _bins(logq_BCV, targets_BC, weights_BC)
        if theirs is None:
            return found
        logp_BCV = jax.nn.log_softmax(chunk_logits(teacher_BCD, theirs, vocab), axis=-1)
        values = _compared(logq_BCV, logp_BCV)
        return found | {name: jnp.sum(value * weights_BC) for name, value in values.items()}

    beside = ours.hidden if theirs is None else theirs.hidden
    parts = over_chunks(make, rows, vocab, length, ours.hidden, batch.targets, batch.mask, beside)
    return jax.tree.map(lambda array: jnp.sum(array, axis=0), parts)


def _compared(logq: Array, logp: Array) -> dict[str, Array]:
    """Per token what tells two distributions [B, C, V] apart: [B, C] each."""
    q, p = jnp.exp(logq), jnp.exp(logp)
    several = min(5, logq.shape[-1])
    ours, theirs = jax.lax.top_k(logq, several)[1], jax.lax.top_k(logp, several)[1]
    same = jnp.any(ours[..., :, None] == theirs[..., None, :], axis=-1)
    # 0 * (log 0 - x) is 0 in a divergence and NaN in floating point.
    term = lambda a, difference: jnp.sum(jnp.where(a > 0, a * difference, 0.0), axis=-1)
    return {
        "forward_kl": term(p, logp - logq),
        "reverse_kl": term(q, logq - logp),
        "accept": jnp.sum(jnp.minimum(p, q), axis=-1),
        "top1": (ours[..., 0] == theirs[..., 0]).astype(jnp.float32),
        "top5": jnp.mean(same.astype(jnp.float32), axis=-1),
    }


def _bins(logq_BCV: Array, targets_BC: Array, weights_BC: Array) -> Array:
    """[15, 3] of count, confidence and hits by bins of equal width of the highest probability."""
    sure_BC = jnp.exp(jnp.max(logq_BCV, axis=-1))
    hit_BC = (jnp.argmax(logq_BCV, axis=-1) == targets_BC).astype(jnp.float32)
    index_BC = jnp.clip(jnp.ceil(sure_BC * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    inside_BCK = jax.nn.one_hot(index_BC, BINS, dtype=jnp.float32) * weights_BC[..., None]
    each_3BC = jnp.stack([jnp.ones_like(sure_BC), sure_BC, hit_BC])
    return jnp.einsum("BCK,ABC->KA", inside_BCK, each_3BC)


def measure(
    config: DecoderConfig,
    params: Any,
    batches: Iterable[Batch],
    *,
    vocab: int,
    teacher: DecoderConfig | None = None,
    teacher_params: Any = None,
    text_bytes: int | None = None,
    compute_dtype: DTypeLike = jnp.bfloat16,
) -> dict[str, Any]:
    """Perplexity, bits per byte, calibration and, with a teacher, agreement on a set of batches.

    Args:
      config: of the model.
      params: its parameters.
      batches: on the mesh of the parameters.
      vocab: how many rows of the heads are tokens.
      teacher: configuration of the model to compare with.
      teacher_params: its parameters.
      text_bytes: bytes of text that the counted tokens stand for.
      compute_dtype: dtype of activations.

    Returns:
      perplexity = exp(nll / count); bits_per_byte = nll / log 2 / bytes where they are given; ece;
      reliability (see `reliability`); tokens; with a teacher kl_t1 = KL(teacher || student),
      reverse_kl, agree_top1, agree_top5, acceptance = E[sum_v min(p_v, q_v)].

    Raises:
      DataError: if nothing is counted.
    """
    total: dict[str, np.ndarray] = {}
    dtype = np.dtype(compute_dtype)
    for batch in batches:
        part = sums(config, teacher, vocab, dtype, params, teacher_params, batch)
        for name, value in jax.device_get(part).items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    count = float(total.get("count", 0.0))
    if not count:
        raise DataError("evaluation: no token of the held-out data counts in the loss")
    mean = {name: float(value) / count for name, value in total.items() if value.ndim == 0}
    bars, ece = reliability(total["bins"])
    result: dict[str, Any] = {
        "perplexity": math.exp(mean["nll"]) if mean["nll"] < 700 else math.inf,
        "tokens": int(count),
        "ece": ece,
        "reliability": bars,
    }
    if text_bytes:
        result["bits_per_byte"] = mean["nll"] * count / math.log(2) / text_bytes
    names = {
        "forward_kl": "kl_t1",
        "reverse_kl": "reverse_kl",
        "top1": "agree_top1",
        "top5": "agree_top5",
        "accept": "acceptance",
    }
    return result | {ours: mean[name] for name, ours in names.items() if name in mean}


def reliability(bins: np.ndarray) -> tuple[list[Mapping[str, float]], float]:
    """The bars of a reliability diagram, and the expected calibration error.

        ECE = sum over bins of (count / all) * |hits / count - confidence / count|

    Args:
      bins: [K, 3] of count, sum of confidence and hits.

    Returns:
      (per bin that is not empty {share, confidence, accuracy}, ECE).

    Reference: Guo et al. 2017, arXiv 1706.04599.
    """
    total = bins[:, 0].sum()
    bars: list[Mapping[str, float]] = [
        {"share": n / total, "confidence": sure / n, "accuracy": hits / n}
        for n, sure, hits in bins.tolist()
        if n
    ]
    gaps = [bar["share"] * abs(bar["accuracy"] - bar["confidence"]) for bar in bars]
    return bars, float(sum(gaps))


def speculative_speedup(acceptance: float, draft: int) -> float:
    """Expected tokens per call of the large model with `draft` tokens guessed by the small one.

        (1 - a ** (g + 1)) / (1 - a)

    Reference: Leviathan, Kalman, Matias 2023, arXiv 2211.17192.

    >>> speculative_speedup(0.5, 1), speculative_speedup(1.0, 4)
    (1.5, 5.0)
    """
    if acceptance >= 1:
        return float(draft + 1)
    return (1 - acceptance ** (draft + 1)) / (1 - acceptance)
