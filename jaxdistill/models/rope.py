"""Rotary position embedding, plain and stretched: default, linear, llama3, yarn, longrope."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: one of `ROPE_KINDS`.
      factor: how many times the context was stretched; 1 for kind "default".
      original_max_positions: context length before stretching (llama3, yarn and longrope).
      low_freq_factor, high_freq_factor: llama3's band between "stretched" and "left alone".
      beta_fast, beta_slow: yarn's band, in turns per original context.
      attention_factor: multiplier of cos and sin (yarn and longrope); None derives it from `factor`
        (and from yarn's `mscale`, `mscale_all_dim` where both are given).
      truncate: yarn rounds its band to whole dims.
      short_factors, long_factors: longrope's wavelengths over plain ones, in documents of up to
        `original_max_positions` tokens and in longer ones.
      share: the part of each head's dims that is turned, the first ones; the others stay.
      interleaved: dims 2 j and 2 j + 1 turn together; else j and j + d / 2.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None
    share: float = 1.0
    interleaved: bool = False

    def dims(self, head_dim: int) -> int:
        """How many dims of a head are turned."""
        return int(head_dim * self.share)


def frequencies(rope: Rope, head_dim: int, long: bool = False) -> tuple[np.ndarray, float]:
    """Angle per position for each pair of dims, and the multiplier of cos and sin.

        default: f_j = theta ** (-2 j / d),   j = 0 .. d / 2 - 1,   d = share * head_dim

    Args:
      rope: the settings.
      head_dim: dims of a head.
      long: longrope's for documents longer than the original context.

    Returns:
      float32 [d / 2] and a float (1 except for yarn and longrope).

    Reference: RoFormer, Su et al. 2021, arXiv 2104.09864; YaRN, Peng et al. 2023, arXiv 2309.00071
    (section 3); llama3 as in the Llama 3.1 model card's code; LongRoPE, Ding et al. 2024, arXiv
    2402.13753.
    """
    head_dim = rope.dims(head_dim)
    plain = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "default":
        return plain.astype(np.float32), 1.0
    if rope.kind == "linear":
        return (plain / rope.factor).astype(np.float32), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain).astype(np.float32), 1.0
    if rope.kind == "longrope":
        factors = np.asarray(rope.long_factors if long else rope.short_factors)
        return (plain / factors).astype(np.float32), _longrope_attention_factor(rope)
    assert rope.kind == "yarn", rope.kind
    return _yarn(rope, plain, head_dim).astype(np.float32), _yarn_attention_factor(rope)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated."""
    low, high, length = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions
    assert low is not None and high is not None and length is not None, "llama3 needs its band"
    turns = length * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * plain / rope.factor + keep * plain


def _yarn(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """Stretched and plain frequencies blended by a ramp over the dims between two turn counts."""
    length = rope.original_max_positions
    assert length is not None, "yarn needs the original context length"

    def dim_of(turns: float) -> float:
        span = length / (turns * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    stretch = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
    return plain / rope.factor * stretch + plain * (1 - stretch)


def _yarn_attention_factor(rope: Rope) -> float:
    """The published 0.1 ln(factor) + 1, or the quotient of two of them where a model gives both."""

    def magnitude(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _longrope_attention_factor(rope: Rope) -> float:
    """sqrt(1 + ln(factor) / ln(original context))."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    assert rope.original_max_positions is not None, "longrope needs the original context length"
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))


def tables(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, float32 [B, L, 1, d / 2]; computed once for all layers.

    Longrope's frequencies are those of each document's own length. Transformers takes those of the
    longest row for its whole batch: what a document means would depend on its neighbours.
    """
    step, multiplier = frequencies(rope, head_dim)
    step = step.reshape((1,) * (positions.ndim + 1) + (-1,))
    if rope.kind == "longrope":
        other = frequencies(rope, head_dim, long=True)[0].reshape(step.shape)
        assert rope.original_max_positions is not None, "longrope has an original context"
        is_long = document_lengths(positions) > rope.original_max_positions
        step = jnp.where(is_long[..., None, None], other, step)
    angles = positions.astype(jnp.float32)[..., None, None] * step
    return jnp.cos(angles) * multiplier, jnp.sin(angles) * multiplier


def document_lengths(positions: jax.Array) -> jax.Array:
    """For every token [B, L] how many its document has, up to the end of the row.

    >>> document_lengths(jnp.array([[0, 1, 2, 0, 1, 0, 0]])).tolist()
    [[3, 3, 3, 2, 2, 1, 1]]
    """
    length = positions.shape[-1]
    index = jnp.arange(length)[None, :]
    goes_on = jnp.pad(positions[:, 1:] == positions[:, :-1] + 1, ((0, 0), (0, 1)))
    end = jax.lax.cummin(jnp.where(goes_on, length, index), axis=1, reverse=True)
    return positions + end - index + 1


def rotate(
    x_BLHE: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False
) -> jax.Array:
    """Turns dim j together with dim j + d / 2, or 2 j with 2 j + 1, in float32.

    d is twice the width of `cos`; dims from d on stay as they are.
    """
    size = 2 * cos.shape[-1]
    wide = x_BLHE[..., :size].astype(jnp.float32)
    if interleaved:
        first, second = wide[..., ::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        turned = jnp.stack(parts, axis=-1).reshape(wide.shape)
    else:
        turned = jnp.concatenate(parts, axis=-1)
    turned = turned.astype(x_BLHE.dtype)
    if size == x_BLHE.shape[-1]:
        return turned
    return jnp.concatenate((turned, x_BLHE[..., size:]), axis=-1)
