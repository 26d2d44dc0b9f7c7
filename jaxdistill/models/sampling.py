"""Picks the next token: biases, penalties, then greedy or temperature and filters; row by row."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

_BLOCK = 128  # entries of the vocabulary whose weights are added first when one is drawn


def tally(history: Mapping[str, Array], size: int) -> dict[str, Array]:
    """int32 [B, V] for int32 [B, L]: how often each row has each token; -1 fills rows up.

    Args:
      history: token ids by name: `read`, those of the prompt, and `written`, those after it.
      size: of the vocabulary.
    """

    def one(tokens_BL):
        row_B1 = jnp.arange(len(tokens_BL))[:, None]
        place_BL = jnp.where(tokens_BL < 0, size, tokens_BL)
        counts_BV = jnp.zeros((len(tokens_BL), size + 1), jnp.int32).at[row_B1, place_BL].add(1)
        return counts_BV[:, :size]

    return {name: one(tokens_BL) for name, tokens_BL in history.items()}


def counted(seen: Mapping[str, Array], token_B: Array, live_B: Array) -> dict[str, Array]:
    """The tally after one more token of the rows that live."""
    if not seen:
        return {}
    row_B = jnp.arange(len(token_B))
    return {**seen, "written": seen["written"].at[row_B, token_B].add(live_B.astype(jnp.int32))}


def adjust(logits_BV: Array, settings: Mapping[str, Array], seen: Mapping[str, Array]) -> Array:
    """Logits after biases and penalties, before temperature and filters; float32 [B, V].

    First `bias` is added at `bias_token`. Then logits of tokens that were read or written are
    divided by `repetition` where positive and multiplied by it where negative; then `frequency`
    times how often a token was written is taken off, and `presence` once for each that was.

    Args:
      logits_BV: float [B, V].
      settings: bias_token int32 [B, K] and bias [B, K], -1 and 0 filling up; repetition,
        frequency and presence [B]; any of the two groups may be missing.
      seen: from `tally`; needed by the second group.

    Reference: repetition, Keskar et al. 2019, arXiv 1909.05858, section 4.1; the others as in
    OpenAI's API reference.
    """
    if "bias" in settings:
        row_B1 = jnp.arange(len(logits_BV))[:, None]
        token_BK = jnp.maximum(settings["bias_token"], 0)
        logits_BV = logits_BV.at[row_B1, token_BK].add(settings["bias"])
    if "repetition" in settings:
        by = lambda name: settings[name][:, None]
        met_BV = (seen["read"] > 0) | (seen["written"] > 0)
        less_BV = jnp.where(
            logits_BV > 0, logits_BV / by("repetition"), logits_BV * by("repetition")
        )
        logits_BV = jnp.where(met_BV, less_BV, logits_BV)
        logits_BV -= by("frequency") * seen["written"] + by("presence") * (seen["written"] > 0)
    return logits_BV


def filter_logits(
    logits_BV: Array,
    temperature: Array | float,
    top_k: Array | int | None = None,
    top_p: Array | float | None = None,
    min_p: Array | float | None = None,
) -> Array:
    """Logits / temperature with every token outside top-k, top-p and min-p at -inf.

    top-k keeps the k largest (all that equal the k-th, too); top-p then keeps the smallest set of
    most probable tokens whose probability reaches p, measured after temperature and top-k; min-p
    keeps tokens at least min_p times as probable as the most probable one, which always stays.

    Each filter is a threshold found bit by bit, 32 passes over the row: exact, and far less work
    than sorting the vocabulary.

    Args:
      logits_BV: float [B, V].
      temperature: scalar or [B], above 0.
      top_k: scalar or [B] counts, or None for all.
      top_p: scalar or [B] in (0, 1], or None for all.
      min_p: scalar or [B] in [0, 1], or None for all.

    Returns:
      Float32 [B, V].

    Reference: top-k, Fan et al. 2018, arXiv 1805.04833; top-p, Holtzman et al. 2019,
    arXiv 1904.09751; min-p, Nguyen et al. 2024, arXiv 2407.01082.
    """
    batch, size = logits_BV.shape
    column = lambda value, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), (batch,))[:, None]
    logits_BV = logits_BV.astype(jnp.float32) / column(temperature, jnp.float32)
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    order_BV = _order(logits_BV)
    kept_BV = jnp.ones(logits_BV.shape, bool)
    if top_k is not None:
        k_B1 = jnp.clip(column(top_k, jnp.int32), 1, size)
        enough = lambda t_B1: _count(order_BV >= t_B1) >= k_B1
        kept_BV &= order_BV >= _largest_that_holds(enough, batch)
    if top_p is not None:
        p_B1 = column(top_p, jnp.float32)
        weight_BV = jnp.where(kept_BV, jnp.exp(logits_BV - largest_B1), 0.0)
        mass_B1 = p_B1 * jnp.sum(weight_BV, axis=-1, keepdims=True)
        reached = lambda t_B1: (
            jnp.sum(jnp.where(order_BV >= t_B1, weight_BV, 0.0), axis=-1, keepdims=True) >= mass_B1
        )
        inside_BV = order_BV >= _largest_that_holds(reached, batch)
        # At p = 1 rounding of the sums must not drop the last token.
        kept_BV &= inside_BV | (p_B1 >= 1) | (logits_BV == largest_B1)
    if min_p is not None:
        kept_BV &= logits_BV >= largest_B1 + jnp.log(column(min_p, jnp.float32))
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _order(values: Array) -> Array:
    """uint32 numbers in the same order as the float32 values."""
    bits = jax.lax.bitcast_convert_type(values + 0.0, jnp.uint32)  # + 0.0: one zero, not two
    top = jnp.uint32(1 << 31)
    return jnp.where(bits >= top, ~bits, bits | top)


def _count(chosen_BV: Array) -> Array:
    return jnp.sum(chosen_BV, axis=-1, keepdims=True, dtype=jnp.int32)


def _largest_that_holds(holds: Callable[[Array], Array], batch: int) -> Array:
    """The largest threshold uint32 [B, 1] at which `holds` is true; true below, false above."""

    def narrow(number, threshold_B1):
        higher_B1 = threshold_B1 | (jnp.uint32(1) << (31 - number).astype(jnp.uint32))
        return jnp.where(holds(higher_B1), higher_B1, threshold_B1)

    return jax.lax.fori_loop(0, 32, narrow, jnp.zeros((batch, 1), jnp.uint32))


def draw(logits_BV: Array, uniform_B: Array) -> Array:
    """int32 [B]: the first token whose cumulated probability exceeds a uniform number in [0, 1).

    One number per row decides, so that a draw costs one pass over the vocabulary. Sums go block by
    block; a token of probability 0 is never drawn, whatever rounding does.
    """
    batch, size = logits_BV.shape
    blocks = -(-size // _BLOCK)
    weight_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    weight_BV = jnp.pad(weight_BV, ((0, 0), (0, blocks * _BLOCK - size)))
    weight_BXY = weight_BV.reshape(batch, blocks, _BLOCK)
    block_BX = jnp.sum(weight_BXY, axis=-1)
    until_BX = jnp.cumsum(block_BX, axis=-1)
    target_B1 = uniform_B[:, None] * until_BX[:, -1:]
    block_B1 = _first_above(until_BX, target_B1, block_BX)
    at = lambda array_BX: jnp.take_along_axis(array_BX, block_B1, axis=1)
    inside_BY = jnp.take_along_axis(weight_BXY, block_B1[:, :, None], axis=1)[:, 0]
    until_BY = (at(until_BX) - at(block_BX)) + jnp.cumsum(inside_BY, axis=-1)
    token_B1 = block_B1 * _BLOCK + _first_above(until_BY, target_B1, inside_BY)
    return token_B1[:, 0].astype(jnp.int32)


def _first_above(until_BX: Array, target_B1: Array, weight_BX: Array) -> Array:
    """[B, 1]: the first place whose running sum exceeds the target, or the last of weight > 0."""
    place_B1 = _count(until_BX <= target_B1)
    numbers_1X = jnp.arange(weight_BX.shape[1])[None, :]
    last_B1 = jnp.max(jnp.where(weight_BX > 0, numbers_1X, 0), axis=-1, keepdims=True)
    return jnp.minimum(place_B1, last_B1)


def largest(logits_BV: Array) -> Array:
    """int32 [B]: the first place of the largest value.

    As `jnp.argmax`, whose reduction of pairs XLA runs number by number on a CPU: of 32 rows of
    49,152 it takes as long as a sixth of SmolLM2-135M. A maximum, and then the smallest place that
    has it, are two reductions of single numbers. With NaN in a row the last place is returned.
    """
    numbers_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    last = logits_BV.shape[1] - 1
    is_best_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_best_BV, numbers_BV, last), axis=-1)


def pick(logits_BV: Array, keys_B: Array, settings: Mapping[str, Array]) -> tuple[Array, Array]:
    """The largest logit where there is no temperature, else one draw per row and key.

    Args:
      logits_BV: float [B, V].
      keys_B: random keys [B].
      settings: temperature, and where wanted top_k, top_p and min_p, each a scalar or [B]; rows
        with temperature 0 take their largest logit.

    Returns:
      int32 [B], the tokens, and float32 [B], log mu of each: its log-probability under the
      distribution it was drawn from, after temperature and filters, normalised over the tokens
      that are kept; 0 where nothing was drawn.
    """
    best_B = largest(logits_BV)
    if "temperature" not in settings:
        return best_B, jnp.zeros(best_B.shape, jnp.float32)
    temperature_B = jnp.broadcast_to(settings["temperature"], best_B.shape)
    greedy_B = temperature_B <= 0
    filtered_BV = filter_logits(
        logits_BV,
        jnp.where(greedy_B, 1.0, temperature_B),
        settings.get("top_k"),
        settings.get("top_p"),
        settings.get("min_p"),
    )
    uniform_B = jax.vmap(jax.random.uniform)(keys_B)
    drawn_B = draw(filtered_BV, uniform_B)
    at_B = jnp.take_along_axis(filtered_BV, drawn_B[:, None], axis=1)[:, 0]
    log_mu_B = at_B - jax.nn.logsumexp(filtered_BV, axis=-1)
    return jnp.where(greedy_B, best_B, drawn_B), jnp.where(greedy_B, 0.0, log_mu_B)
