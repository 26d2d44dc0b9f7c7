"""One decoder-only Transformer for every family, and the one way through it.

    enter (embedding) -> step of layer 0, 1, ... -> leave (final norm, head)

Stacked layers are scanned, as training needs them; split ones (`per_layer`) are walked in turn,
each with its own state, as generation needs them. A `Visit` may look into a layer or skip it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.errors import ModelError
from jaxdistill.kernels.softcap import soft_cap
from jaxdistill.models import attention_ring, host, per_layer, rope
from jaxdistill.models.architecture import DecoderConfig, map_weights, weights
from jaxdistill.models.attention import Attend, causal
from jaxdistill.models.blocks import Layer, Norm, last, multiplied
from jaxdistill.models.kernel import is_kernel
from jaxdistill.models.lookup import lookup
from jaxdistill.sharding import RULES, MeshAxes, constrain, constrain_weight
from jaxdistill.types import Outputs

REMAT = ("none", "dots", "full")
WEIGHTS = "weights"  # part of the names of operations that make the weights a layer computes with

# turn(index of a layer) -> its (cos, sin), or None without rotation
Rotations = Callable[[Any], tuple[Array, Array] | None]
# visit(layer, x [B, L, D], (cos, sin), attend, state, index, rules) -> (x, state, what it saw)
Visit = Callable[..., tuple[Array, Any, Any]]
# step(x [B, L, D], state, parameters of one layer, index) -> (x, state, what was seen)
LayerStep = Callable[[Array, Any, Any, Any], tuple[Array, Any, Any]]


def forward(
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokens_BL: Array,
    positions_BL: Array,
    attend: Attend,
    states: tuple | None = None,
    *,
    compute_dtype: DTypeLike,
    remat: str = "none",
    rules: Mapping[str, MeshAxes] = RULES,
    taps: tuple[int, ...] = (),
    relations: tuple[int, ...] = (),
    visit: Visit | None = None,
) -> tuple[Outputs, tuple | None, Any]:
    """Hidden states and head of tokens [B, L]; every pass through the whole decoder is this one.

    Args:
      config: the model's configuration.
      params: its parameters, stacked or split.
      tokens_BL: int32 [B, L].
      positions_BL: int32 [B, L].
      attend: how queries meet keys; see `attention.Attend`.
      states: of split layers, what `attend` keeps of each, such as its cache; None: nothing.
      compute_dtype: as in `apply`.
      remat: as in `apply`; of stacked layers.
      rules: as in `apply`.
      taps: as in `apply`; of stacked layers.
      relations: as in `apply`; of stacked layers.
      visit: runs a layer; None calls it.

    Returns:
      The outputs; the new states of split layers; what the visits of stacked layers saw, stacked.
    """
    split = per_layer.is_split(params)
    # Behind a barrier, or XLA would compute the cosines again in every layer that is not scanned.
    turn = rotations(config, positions_BL, shared=split)
    first_BLD = enter(config, params, tokens_BL, positions_BL, compute_dtype, rules)
    step = _remat(layer_step(config, turn, attend, compute_dtype, rules, visit), remat)
    if split:
        assert not (taps or relations or visit) and remat == "none", "of stacked layers alone"
        x_BLD, states = walk(params["layers"], step, first_BLD, states)
        return leave(config, params, x_BLD), states, None
    inputs = tuple(layer - 1 for layer in relations if layer and layer - 1 not in taps)
    tapped_at = (*taps, *inputs)
    x_BLD, tapped, seen = _scan(config, params["layers"], step, first_BLD, tapped_at)
    outputs = leave(config, params, x_BLD)
    assert tapped is not None or not tapped_at, "of every layer that is asked for"
    if taps and tapped is not None:
        outputs = dataclasses.replace(outputs, taps=tapped[: len(taps)])
    if relations:
        axes = logical_axes(config)["layers"]
        one = lambda n: host.brought(jax.tree.map(lambda leaf: leaf[n], params["layers"]))
        layer = lambda n: _layer(config, one(n), axes, compute_dtype, rules)
        after = tapped if tapped is not None else ()
        entering = lambda n: after[tapped_at.index(n - 1)] if n else first_BLD
        related = tuple(_relations(layer(n), entering(n)) for n in relations)
        outputs = dataclasses.replace(outputs, relations=related)
    return outputs, None, seen


def layer_step(
    config: DecoderConfig,
    turn: Rotations,
    attend: Attend,
    dtype: DTypeLike,
    rules: Mapping[str, MeshAxes] = RULES,
    visit: Visit | None = None,
) -> LayerStep:
    """How one layer runs, whichever it is: with its weights cast, and by `visit` where given."""
    axes = logical_axes(config)["layers"]
    visit = visit or (lambda layer, *given: (*layer(*given), None))

    def step(x_BLD, state, params, index):
        layer = _layer(config, host.brought(params), axes, dtype, rules)
        return visit(layer, x_BLD, turn(index), attend, state, index, rules)

    return step


def walk(
    layers: tuple, step: LayerStep, x_BLD: Array, states: tuple | None = None
) -> tuple[Array, tuple]:
    """One layer after the other, each with its own parameters and state; the new states."""
    new = []
    for number, params in enumerate(layers):
        x_BLD, state, _ = step(x_BLD, states and states[number], params, number)
        new.append(state)
    return x_BLD, tuple(new)


def _scan(
    config: DecoderConfig, stacked: Any, step: LayerStep, x_BLD: Array, tapped_at: tuple[int, ...]
) -> tuple[Array, Array | None, Any]:
    """All layers as one scanned body: hidden states, tapped ones, and what the visits saw."""
    slots = np.full(config.layers, len(tapped_at), np.int32)  # of no tap: behind the last one
    slots[list(tapped_at)] = np.arange(len(tapped_at))

    def body(carry, one):
        x_BLD, tapped = carry
        params, index, slot = one
        x_BLD, _, seen = step(x_BLD, None, params, index)
        # Outside of what is recomputed: a tap is held once, not with every layer.
        if tapped_at:
            tapped = tapped.at[slot].set(x_BLD, mode="drop")
        return (x_BLD, tapped), seen

    tapped = jnp.zeros((len(tapped_at), *x_BLD.shape), x_BLD.dtype) if tapped_at else None
    xs = (stacked, jnp.arange(config.layers), jnp.asarray(slots))
    (x_BLD, tapped), seen = jax.lax.scan(body, (x_BLD, tapped), xs)
    return x_BLD, tapped, seen


def enter(
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokens_BL: Array,
    positions_BL: Array,
    dtype: DTypeLike,
    rules: Mapping[str, MeshAxes] = RULES,
) -> Array:
    """What enters the first layer, [B, L, D] in `dtype`: embeddings, and learned positions."""
    places_PD = params.get("positions")
    if places_PD is not None:
        with jax.named_scope(WEIGHTS):
            places_PD = constrain(places_PD, ("positions", None), rules)
    x_BLD = lookup(params["embedding"], tokens_BL, dtype, rules)
    if config.embedding_scaled:
        # The published models were trained with this factor rounded to what they compute in.
        x_BLD = x_BLD * jnp.asarray(config.embed**0.5, dtype)
    x_BLD = multiplied(x_BLD, config.embedding_multiplier)
    if places_PD is not None:
        x_BLD = x_BLD + jnp.take(places_PD, positions_BL, axis=0).astype(dtype)
    return x_BLD


def leave(config: DecoderConfig, params: Mapping[str, Any], x_BLD: Array) -> Outputs:
    """What a model returns, from what comes out of its last layer."""
    norm = Norm(config, params["final_norm"])
    head = params["embedding"] if config.tied_head else params["head"]
    bias = params.get("head_bias")  # of `reseat` alone: no family here has one of its own
    hidden_BLD = multiplied(norm(x_BLD), 1 / config.logits_divisor)
    return Outputs(hidden_BLD, head, bias, softcap=config.logits_softcap)


def rotations(config: DecoderConfig, positions: Array, shared: bool = False) -> Rotations:
    """The (cos, sin) of every layer, by its index, traced or not.

    Layers with a window may have frequencies of their own, and some layers none. All tables are
    computed once; a layer takes one of them by its kind, so that all layers stay one scanned body.
    `shared` keeps XLA from computing the tables again in every layer where there is no scan.
    """
    if config.rope is None:
        return lambda index: None
    keep = jax.lax.optimization_barrier if shared else lambda table: table
    everywhere = keep(rope.tables(config.rope, config.head_dim, positions))
    kinds, others = np.zeros(config.layers, np.int32), {}
    if config.local_rope is not None and config.windows is not None:
        kinds[[window is not None for window in config.windows]] = 1
        others[1] = keep(rope.tables(config.local_rope, config.head_dim, positions))
    if config.turned is not None:
        kinds[[not turned for turned in config.turned]] = 2
        others[2] = jnp.ones_like(everywhere[0]), jnp.zeros_like(everywhere[1])

    def turn(index):
        table = everywhere
        for kind, other in others.items():
            here = jnp.asarray(kinds)[index] == kind
            table = jax.tree.map(functools.partial(jnp.where, here), other, table)
        return table

    return turn


def _relations(layer: Layer, x_BLD: Array) -> tuple[Array, ...]:
    """Queries, keys and values of a layer, heads side by side.

    Computed a second time, from what enters the layer: the scan would hold those of every layer.
    """
    return tuple(x.reshape(*x_BLD.shape[:2], -1) for x in layer.project(x_BLD))


def _remat(body: Callable, remat: str) -> Callable:
    """The scan body under the chosen policy of what the backward pass keeps."""
    if remat not in REMAT:
        raise ModelError(f"remat: {remat!r} is not one of {', '.join(REMAT)}")
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _layer(
    config: DecoderConfig, params: Any, axes: dict, dtype: DTypeLike, rules: Mapping[str, MeshAxes]
) -> Layer:
    """One layer with its weights as it computes with them: cast while still sharded.

    Casting before the all-gather that the products need halves what travels; the masters stay as
    they are because only this layer's copy is cast.
    """

    def cast(path, weight, logical):
        if per_layer.keeps_dtype(path):
            return weight
        if is_kernel(weight):
            return weight.astype(dtype)
        return constrain_weight(weight.astype(dtype), logical[1:], rules)

    with jax.named_scope(WEIGHTS):
        params = jax.tree_util.tree_map_with_path(cast, params, axes, is_leaf=is_kernel)
    return nnx.merge(layer_structure(config), params)


@functools.lru_cache(maxsize=256)
def layer_structure(config: DecoderConfig) -> nnx.GraphDef:
    """The structure of one layer, made once per configuration: `nnx.merge(structure, params)`."""
    one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return nnx.split(Layer(config, jax.tree.map(one, shapes(config)["layers"])))[0]


def shapes(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return map_weights(lambda row: jax.ShapeDtypeStruct(row.shape, dtype), weights(config))


@functools.lru_cache(maxsize=256)
def logical_axes(config: DecoderConfig) -> dict:
    """The parameter tree as tuples of logical axis names, for `sharding.shardings`."""
    return map_weights(lambda row: row.axes, weights(config))


def init(config: DecoderConfig, key: Array, dtype: DTypeLike = jnp.float32) -> dict:
    """Random parameters: normal(0, initializer_range) weights, zero biases, norms of scale 1."""
    counter = iter(range(1 << 20))

    def draw(row):
        number = next(counter)
        if row.initial != "normal":
            return jnp.full(row.shape, 1 if row.initial == "ones" else 0, dtype)
        values = jax.random.normal(jax.random.fold_in(key, number), row.shape, jnp.float32)
        return (values * config.initializer_range).astype(dtype)

    return map_weights(draw, weights(config))


def apply(
    config: DecoderConfig,
    params: dict,
    tokens: Array,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    *,
    compute_dtype: DTypeLike = jnp.bfloat16,
    remat: str = "none",
    attention: str | None = None,
    rules: Mapping[str, MeshAxes] = RULES,
    taps: tuple[int, ...] = (),
    relations: tuple[int, ...] = (),
    routing: bool = False,
) -> Outputs:
    """Hidden states after the final norm, and the head, of tokens [B, L].

    Args:
      config: the model's configuration.
      params: its parameters, in any float dtype; each layer is cast to `compute_dtype` as it runs.
      tokens: int32 [B, L].
      positions: int32 [B, L], restarting in every document; None counts in every segment.
      segment_ids: int32 [B, L]; a token sees earlier tokens of its own segment only. None makes
        every row one document. Padding (segment 0) sees padding, so its values are finite.
      compute_dtype: dtype of activations; softmax, norms and rotations are float32 in any case.
      remat: what the backward pass keeps of each layer: "none" all but cheap element-wise values,
        "dots" the outputs of its projections, "full" its input.
      attention: one of `attention.IMPLEMENTATIONS`; None is "auto".
      rules: table from logical axes to mesh axes; used where a mesh is in context.
      taps: layers, from 0, whose outputs are wanted as well, in this order.
      relations: layers, from 0, whose queries, keys and values are wanted as well.
      routing: whether the scores of every layer's router are wanted as well.

    Returns:
      Outputs: hidden [B, L, D] in compute_dtype, head [V, D] uncast (the embedding where tied),
      taps [len(taps), B, L, D] before the final norm, relations, before rotation, and routing.

    Raises:
      ModelError: for an unknown `remat`, a tap that is no layer, or routing without a router.
      ConfigError: for an attention that cannot compute this.
    """
    for name, layers in (("taps", taps), ("relations", relations)):
        if len(set(layers)) != len(layers) or not all(0 <= n < config.layers for n in layers):
            raise ModelError(
                f"{name} = {layers}: must be different layers from 0 to {config.layers - 1}"
            )
    if routing and config.experts is None:
        raise ModelError(f"routing: a {config.family} model has no routed experts")
    length = tokens.shape[1]
    if positions is None:
        places = jnp.broadcast_to(jnp.arange(length)[None, :], tokens.shape)
        positions = places if segment_ids is None else segment_positions(segment_ids)
    balance, restore = attention_ring.order(length)
    attend = causal(config, length, balance(segment_ids), attention, balanced=True)
    # One scanned program, however the parameters lie.
    outputs, _, scores = forward(
        config,
        per_layer.stack(params) if per_layer.is_split(params) else params,
        balance(tokens),
        balance(positions),
        attend,
        compute_dtype=compute_dtype,
        remat=remat,
        rules=rules,
        taps=taps,
        relations=relations,
        visit=Layer.routed if routing else None,
    )
    return restore(dataclasses.replace(outputs, routing=scores))


def segment_positions(segment_ids: Array) -> Array:
    """Positions [B, L] that restart at 0 wherever the segment changes."""
    index = jnp.arange(segment_ids.shape[1])[None, :]
    new = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(jnp.where(new, index[:, 1:], 0), ((0, 0), (1, 0)))
    return index - jax.lax.cummax(starts, axis=1)


def logits(outputs: Outputs) -> Array:
    """hidden @ head.T + bias, capped, float32 [B, L, V]: for evaluation, never for training."""
    logits_BLV = jnp.einsum(
        "BLD,VD->BLV",
        outputs.hidden,
        outputs.head.astype(outputs.hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if outputs.head_bias is not None:
        logits_BLV = logits_BLV + last(outputs.head_bias.astype(jnp.float32), logits_BLV)
    return soft_cap(logits_BLV, outputs.softcap)
