"""Continues prompts: one jitted prefill and decode loop with a key/value cache, on any mesh."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.errors import ModelError
from jaxdistill.models import decoder, sampling
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.model import Model, on_mesh

SHORTEST = 16


def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    compute_dtype: DTypeLike | None = None,
) -> list[str] | list[list[int]]:
    """Continues each prompt until an end token of the model, or for `max_new_tokens` tokens.

    A row's continuation does not depend on the other rows, except that rows draw from different
    random streams.

    Args:
      model: the model; texts need its tokenizer.
      prompts: texts, or lists of token ids.
      max_new_tokens: at least 1.
      temperature: 0 takes the most probable token; above 0 draws.
      top_k: draw among the k most probable tokens.
      top_p: draw among the fewest tokens whose probability reaches p.
      seed: of the random streams.
      compute_dtype: None computes in the parameters' own.

    Returns:
      What follows each prompt, without the end token: texts for texts, token ids for token ids.

    Raises:
      ModelError: for a setting out of range, or texts without a tokenizer.
    """
    settings = _settings(max_new_tokens, temperature, top_k, top_p)
    if not len(prompts):
        return []
    texts = isinstance(prompts[0], str)
    if texts and model.tokenizer is None:
        raise ModelError(
            f"generate: {model.source or 'the model'} has no tokenizer: give prompts as token ids"
        )
    rows: Any = model.tokenizer(list(prompts))["input_ids"] if texts else prompts
    new = generate_tokens(
        model.config,
        model.params,
        rows,
        max_new_tokens=max_new_tokens,
        settings=settings,
        seed=seed,
        compute_dtype=compute_dtype,
    )
    return model.tokenizer.batch_decode(new, skip_special_tokens=True) if texts else new


def _settings(max_new_tokens, temperature, top_k, top_p) -> dict[str, float | int]:
    """The sampling settings that are on; empty means greedy."""
    wrong = {
        "max_new_tokens": (max_new_tokens, max_new_tokens < 1, "at least 1"),
        "temperature": (temperature, not 0 <= temperature < np.inf, "0 or more"),
        "top_k": (top_k, top_k is not None and top_k < 1, "at least 1"),
        "top_p": (top_p, top_p is not None and not 0 < top_p <= 1, "above 0 and at most 1"),
    }
    for name, (value, bad, rule) in wrong.items():
        if bad:
            raise ModelError(f"generate: {name}: {value} must be {rule}")
    if temperature == 0:
        if top_k is not None or top_p is not None:
            raise ModelError(
                "generate: top_k and top_p have no effect at temperature 0: set it above "
                "0 to draw, or leave them out"
            )
        return {}
    given = {"temperature": float(temperature), "top_k": top_k, "top_p": top_p}
    return {name: value for name, value in given.items() if value is not None}


def generate_tokens(
    config: DecoderConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    settings: dict[str, float | int] | None = None,
    seed: int = 0,
    compute_dtype: DTypeLike | None = None,
) -> list[list[int]]:
    """Token ids that follow each prompt of token ids; `generate` without texts.

    Prompts are padded on the left to a power of two, and so is the room for new tokens, so that few
    programs are compiled.

    Raises:
      ModelError: for an empty prompt or a token outside the vocabulary.
    """
    longest = max(len(row) for row in prompts)
    width = bucket(longest)
    tokens = np.zeros((len(prompts), width), np.int32)
    for number, row in enumerate(prompts):
        ids = np.asarray(row, np.int64)
        if not len(row) or ids.min() < 0 or ids.max() >= config.vocab_size:
            raise ModelError(
                f"generate: prompt {number} must have tokens, each from 0 to "
                f"{config.vocab_size - 1}; for an empty text give the beginning-of-text token"
            )
        tokens[number, width - len(row) :] = ids
    starts = np.asarray([width - len(row) for row in prompts], np.int32)
    dtype = params["embedding"].dtype if compute_dtype is None else compute_dtype
    values = {
        name: np.asarray(value, np.int32 if name == "top_k" else np.float32)
        for name, value in (settings or {}).items()
    }
    with on_mesh(params):
        new, counts = _run(
            config,
            np.dtype(dtype),
            bucket(max_new_tokens),
            params,
            tokens,
            starts,
            np.asarray(max_new_tokens, np.int32),
            np.asarray(seed, np.uint32),
            values,
        )
    new, counts = np.asarray(new), np.asarray(counts)
    return [row[:count].tolist() for row, count in zip(new, counts, strict=True)]


def bucket(length: int) -> int:
    """The next power of two, at least `SHORTEST`."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(config, dtype, room, params, tokens_BL, starts_B, limit, seed, settings):
    """New tokens [B, room] and how many of them count, before the first end token."""
    batch, width = tokens_BL.shape
    model = nnx.merge(decoder.graphdef(config), params)
    call = functools.partial(model, compute_dtype=dtype)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))
    ends = jnp.asarray(config.eos_ids or (-1,), jnp.int32)
    cache = _empty_cache(config, batch, width + room, dtype)

    def choose(outputs, step):
        last = outputs.hidden[:, -1:]
        logits_BV = decoder.logits(_with_hidden(outputs, last))[:, 0]
        return sampling.pick(
            logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, step), settings
        )

    positions_BL = jnp.maximum(jnp.arange(width)[None, :] - starts_B[:, None], 0)
    outputs, cache = call(tokens_BL, positions_BL, _cached(config, starts_B, 0), cache)
    first_B = choose(outputs, 0)

    def running(carry):
        step, done_B = carry[0], carry[2]
        return (step < limit) & ~jnp.all(done_B)

    def advance(carry):
        step, token_B, done_B, counts_B, new_BM, cache = carry
        done_B = done_B | jnp.any(token_B[:, None] == ends[None, :], axis=-1)
        counts_B = jnp.where(done_B, counts_B, step + 1)
        new_BM = jax.lax.dynamic_update_slice(new_BM, token_B[:, None], (0, step))
        place = width + step
        positions_B1 = (place - starts_B)[:, None]
        attend = _cached(config, starts_B, place)
        outputs, cache = call(token_B[:, None], positions_B1, attend, cache)
        return step + 1, choose(outputs, step + 1), done_B, counts_B, new_BM, cache

    zeros_B = jnp.zeros(batch, jnp.int32)
    new_BM = jnp.zeros((batch, room), jnp.int32)
    carry = (jnp.asarray(0), first_B, zeros_B > 0, zeros_B, new_BM, cache)
    carry = jax.lax.while_loop(running, advance, carry)
    return carry[4], carry[3]


def _with_hidden(outputs, hidden):
    return type(outputs)(hidden=hidden, head=outputs.head, head_bias=outputs.head_bias)


def _empty_cache(config, batch, length, dtype) -> tuple[Array, Array]:
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def _cached(config: DecoderConfig, starts_B: Array, place) -> decoder.Attend:
    """Attention of new tokens, the first at cache place `place`, to everything kept so far.

    Places before a row's start hold padding, which nothing but padding sees.
    """
    windows = np.asarray([window or np.iinfo(np.int32).max for window in config.windows or ()])

    def attend(cache, layer, query_BLHE, key_BLGE, value_BLGE):
        keys, values = (
            jax.lax.dynamic_update_slice(
                kept, new[None].astype(kept.dtype), (layer, 0, place, 0, 0)
            )
            for kept, new in zip(cache, (key_BLGE, value_BLGE), strict=True)
        )
        own_L = place + jnp.arange(query_BLHE.shape[1])
        kept_C = jnp.arange(keys.shape[2])
        age_LC = own_L[:, None] - kept_C[None, :]
        seen_LC = age_LC >= 0
        if len(windows):
            seen_LC = seen_LC & (age_LC < jnp.asarray(windows)[layer])
        real_BC = kept_C[None, :] >= starts_B[:, None]
        mask_BLC = seen_LC[None] & real_BC[:, None, :]
        itself_LC = age_LC == 0  # padding sees itself: no row of the softmax is empty
        mask_BLC = mask_BLC | itself_LC[None]
        mixed = jax.nn.dot_product_attention(
            query_BLHE,
            jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(values, layer, keepdims=False),
            mask=mask_BLC[:, None],
        )
        return (keys, values), mixed

    return attend
