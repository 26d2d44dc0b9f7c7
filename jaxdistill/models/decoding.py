"""The compiled parts of generation: read prompts, put them into slots, make tokens in a loop."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdistill.models import attention, decoder, ring, sampling
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.sharding import constrain
from jaxdistill.types import Outputs

empty = functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))(ring.empty)
insert = functools.partial(jax.jit, donate_argnums=0)(ring.insert)


def prefill(
    config: DecoderConfig, weights: dict, tokens_PW: Any, count_P: Any
) -> tuple[ring.Prefilled, Array, Array]:
    """Keys and values of prompts [P, W] per layer, logits [P, V] after them, last states [P, W, D].

    Prompts stand at the left; what is behind one's `count` tokens is padding, which no token of the
    prompt sees, because attention is causal. All layers run one program, layer after layer: there
    are many lengths, and a program of all layers would take long to compile for each.
    """
    rest = {name: leaf for name, leaf in weights.items() if name != "layers"}
    step = lambda x_PWD, _, layer, number: read(config, layer, x_PWD, np.int32(number), count_P)
    x_PWD, states = decoder.walk(weights["layers"], step, embed(config, rest, tokens_PW))
    return states, _after(config, rest, x_PWD, count_P), x_PWD


@functools.partial(jax.jit, static_argnums=0)
def embed(config: DecoderConfig, rest: dict, tokens_BL: Array) -> Array:
    """The first hidden states, of rows that begin at position 0."""
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None, :], tokens_BL.shape)
    return decoder.enter(config, rest, tokens_BL, positions_BL, rest["embedding"].dtype)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(
    config: DecoderConfig, layer: dict, x_PWD: Array, index: Array, count_P: Array
) -> tuple[Array, tuple[Array, Array], None]:
    """A layer over whole prompts, as `decoder.LayerStep`; state: keys, values [P, G, W, E]."""
    rows, width, _ = x_PWD.shape
    within = attention.causal(config, width, None, None)

    def attend(_, index, query_BLHE, key_BLGE, value_BLGE):
        _, mixed = within(None, index, query_BLHE, key_BLGE, value_BLGE)
        return (key_BLGE.swapaxes(1, 2), value_BLGE.swapaxes(1, 2)), mixed

    # Padding begins anew: it is no part of how long a prompt is.
    place_PW = jnp.broadcast_to(jnp.arange(width)[None, :], (rows, width))
    positions_PW = jnp.where(place_PW < count_P[:, None], place_PW, 0)
    turn = decoder.rotations(config, positions_PW)
    step = decoder.layer_step(config, turn, attend, x_PWD.dtype)
    return step(x_PWD, None, layer, index)


@functools.partial(jax.jit, static_argnums=0)
def _after(config: DecoderConfig, rest: dict, x_PWD: Array, count_P: Array) -> Array:
    last_P1D = jnp.take_along_axis(x_PWD, (count_P - 1)[:, None, None], axis=1)
    return logits_of(decoder.leave(config, rest, last_P1D))


def logits_of(outputs: Outputs) -> Array:
    """Float32 [B, V] of one position per row.

    XLA multiplies a single bfloat16 row on a CPU number by number, fifteen times as slowly as two.
    """
    hidden_B1D = outputs.hidden
    alone = len(hidden_B1D) == 1 and hidden_B1D.dtype == jnp.bfloat16
    if alone:
        hidden_B1D = jnp.concatenate([hidden_B1D, hidden_B1D])
    logits_BV = decoder.logits(dataclasses.replace(outputs, hidden=hidden_B1D))[:, 0]
    return logits_BV[:1] if alone else logits_BV


@jax.jit
def row_keys(names_B3: Array) -> Array:
    """uint32 [B, 2]: the random stream that seed, stream and sample name, and nothing else does."""

    def one(name):
        key = jax.random.fold_in(jax.random.key(name[0]), name[1])
        return jax.random.key_data(jax.random.fold_in(key, name[2]))

    return jax.vmap(one)(names_B3)


class Chosen(NamedTuple):
    """The next tokens [B], or [B, S] of several steps.

    Attributes:
      token: their ids.
      logprob: log softmax(logits) at them; 0 where none are told.
      drawn_logprob: log mu at them, as `sampling.pick`; 0 where none are told.
      likely: the K most probable tokens beside each, in falling order.
      likely_logprob: their log-probabilities.
    """

    token: Array
    logprob: Array
    drawn_logprob: Array
    likely: Array
    likely_logprob: Array


@functools.partial(jax.jit, static_argnums=4)
def first(
    logits_PV: Array,
    source_B: Array,
    keys_B2: Array,
    settings: dict,
    told: int | None,
    history: dict,
) -> Chosen:
    """The tokens that follow the prompts that were put into slots; arguments as in `advance`."""
    logits_BV = logits_PV[jnp.maximum(source_B, 0)]
    seen = sampling.tally(history, logits_BV.shape[1])
    return _everywhere(_choose(logits_BV, keys_B2, jnp.zeros_like(source_B), settings, told, seen))


def _everywhere(chosen: Chosen) -> Chosen:
    """The same on every device: each process of a run reads what was chosen for all rows."""
    return jax.tree.map(lambda leaf: constrain(leaf, (None,) * leaf.ndim), chosen)


def _choose(logits_BV, keys_B2, count_B, settings, told, seen) -> Chosen:
    keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys_B2), count_B)
    adjusted_BV = sampling.adjust(logits_BV, settings, seen)
    token_B, log_mu_B = sampling.pick(adjusted_BV, keys_B, settings)
    if told is None:
        none_B0 = jnp.zeros((len(token_B), 0))
        nothing_B = jnp.zeros(token_B.shape, jnp.float32)
        return Chosen(token_B, nothing_B, nothing_B, none_B0.astype(jnp.int32), none_B0)
    chosen_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)
    norm_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    best_BK, likely_BK = jax.lax.top_k(logits_BV, told)
    logprob_B = (chosen_B1 - norm_B1)[:, 0]
    return Chosen(token_B, logprob_B, log_mu_B, likely_BK, best_BK - norm_B1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def advance(
    config: DecoderConfig,
    steps: int,
    told: int | None,
    weights: dict,
    cache: ring.Ring,
    rows: dict[str, Array],
    ends_BK: Array,
    keys_B2: Array,
    enough: Array,
    settings: dict[str, Array],
    history: dict[str, Array],
) -> tuple[ring.Ring, Chosen]:
    """Up to `steps` tokens for every living row, in one loop on the device.

    Args:
      config: the model's configuration.
      steps: tokens per row at most.
      told: None computes no log-probabilities; a number, so many beside the token's own.
      weights: from `per_layer.split`.
      cache: the ring; donated.
      rows: int32 [B] each: token, the last one chosen; length, how many are in the cache; count,
        how many were chosen; limit, how many may be; and bool live.
      ends_BK: tokens that end a row; -1 fills up.
      keys_B2: from `row_keys`.
      enough: the loop ends early once so many rows do not live.
      settings: as `sampling.pick` and `sampling.adjust` take them.
      history: as `sampling.tally` takes it; {} where no setting needs it.

    Returns:
      The ring, and what was chosen [B, steps]; token -1 where a row did not live.
    """
    batch = ends_BK.shape[0]

    def running(carry):
        step, _, rows, _, _ = carry
        return (step < steps) & (jnp.sum(~rows["live"]) < enough)

    def body(carry):
        step, cache, rows, seen, collected = carry
        attend = ring.attention(config, cache, rows["length"])
        outputs, layers, _ = decoder.forward(
            config,
            weights,
            rows["token"][:, None],
            rows["length"][:, None],
            attend,
            cache.layers,
            compute_dtype=weights["embedding"].dtype,
        )
        assert layers is not None, "the cache's layers come back with the new token"
        new = _choose(logits_of(outputs), keys_B2, rows["count"], settings, told, seen)
        seen = sampling.counted(seen, new.token, rows["live"])
        shown = new._replace(token=jnp.where(rows["live"], new.token, -1))
        put = lambda all_BSX, one_BX: jax.lax.dynamic_update_slice_in_dim(
            all_BSX, one_BX[:, None], step, 1
        )
        collected = jax.tree.map(put, collected, shown)
        cache = ring.Ring(layers, (cache.place + 1) % cache.size)
        return step + 1, cache, _next(rows, new.token, ends_BK), seen, collected

    several = lambda *shape: jnp.zeros((batch, steps, *shape), jnp.float32)
    start = (
        jnp.zeros((), jnp.int32),
        cache,
        rows,
        sampling.tally(history, config.vocab_size),
        Chosen(
            jnp.full((batch, steps), -1, jnp.int32),
            several(),
            several(),
            several(told or 0).astype(jnp.int32),
            several(told or 0),
        ),
    )
    _, cache, _, _, found = jax.lax.while_loop(running, body, start)
    return cache, _everywhere(found)


def _next(rows: dict[str, Array], new_B: Array, ends_BK: Array) -> dict[str, Array]:
    """The rows after one more token; those that do not live stay as they are."""
    live_B = rows["live"]
    count_B = rows["count"] + live_B.astype(jnp.int32)
    ended_B = jnp.any(new_B[:, None] == ends_BK, axis=-1)
    new = rows | {
        "token": jnp.where(live_B, new_B, rows["token"]),
        "length": rows["length"] + live_B.astype(jnp.int32),
        "count": count_B,
        "live": live_B & ~ended_B & (count_B < rows["limit"]),
    }
    return {name: constrain(value, (None,)) for name, value in new.items()}
