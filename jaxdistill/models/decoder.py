"""One decoder-only Transformer for every family: embedding, one scanned layer, norm, head."""

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
from jaxdistill.models import rope
from jaxdistill.models.architecture import DecoderConfig, map_weights, weights
from jaxdistill.models.attention import Attend, causal
from jaxdistill.models.blocks import Layer, Norm, last
from jaxdistill.models.quantized import is_kernel
from jaxdistill.sharding import RULES, MeshAxes, constrain, mesh_axes
from jaxdistill.types import Outputs

REMAT = ("none", "dots", "full")
WEIGHTS = "weights"  # part of the names of operations that make the weights a layer computes with


class Decoder(nnx.Module):
    """The whole model; `layers` is one Layer whose parameters have a first dim over all layers."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        self.config = config
        self.embedding = nnx.Param(params["embedding"])
        self.positions = nnx.Param(params["positions"]) if config.rope is None else None
        self.layers = Layer(config, params["layers"])
        self.final_norm = Norm(config, params["final_norm"])
        self.head = None if config.tied_head else nnx.Param(params["head"])

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        attend: Attend,
        state: Any = None,
        *,
        compute_dtype: DTypeLike = jnp.bfloat16,
        remat: str = "none",
        rules: Mapping[str, MeshAxes] = RULES,
        taps: tuple[int, ...] = (),
        relations: tuple[int, ...] = (),
        routing: bool = False,
    ) -> tuple[Outputs, Any]:
        """Outputs and the final state of `attend` for tokens [B, L] at positions [B, L]."""
        config = self.config
        turn = rope.per_layer(config, positions)
        graphdef, stacked = nnx.split(self.layers)
        axes = logical_axes(config)["layers"]

        def run(carry, one):
            x_BLD, state = carry
            params, index = one
            layer = nnx.merge(graphdef, computing(params, axes, compute_dtype, rules))
            if not routing:
                return layer(x_BLD, turn(index), attend, state, index, rules), None
            *through, scores_BLX = layer.routed(x_BLD, turn(index), attend, state, index, rules)
            return tuple(through), scores_BLX

        run = _remat(run, remat)

        def body(carry, one):
            *xs, slot = one
            through, tapped = carry
            through, scores_BLX = run(through, xs)
            # Outside of what is made again: a tap is kept once, not with every layer.
            if kept:
                tapped = tapped.at[slot].set(through[0], mode="drop")
            return (through, tapped), scores_BLX

        places = None
        if self.positions is not None:
            with jax.named_scope(WEIGHTS):
                places = constrain(self.positions[...], ("positions", None), rules)
        table_VD = self.embedding[...]
        x_BLD = embed(config, table_VD, places, tokens, positions, compute_dtype, rules)
        inputs = tuple(layer - 1 for layer in relations if layer and layer - 1 not in taps)
        kept, first_BLD = (*taps, *inputs), x_BLD
        slots = np.full(config.layers, len(kept), np.int32)  # of no tap: behind the last one
        slots[list(kept)] = np.arange(len(kept))
        tapped = jnp.zeros((len(kept), *x_BLD.shape), compute_dtype) if kept else None
        xs = (nnx.to_pure_dict(stacked), jnp.arange(config.layers), jnp.asarray(slots))
        ((x_BLD, state), tapped), routed = jax.lax.scan(body, ((x_BLD, state), tapped), xs)
        head = self.embedding if self.head is None else self.head
        outputs = Outputs(
            self.final_norm(x_BLD),
            head[...],
            taps=tapped[: len(taps)] if taps else None,
            routing=routed,
            softcap=config.logits_softcap,
        )
        if relations:
            layer = lambda n: nnx.merge(
                graphdef, computing(_slice(xs[0], n), axes, compute_dtype, rules)
            )
            entering = lambda n: tapped[slots[n - 1]] if n else first_BLD
            related = tuple(_relations(layer(n), entering(n)) for n in relations)
            outputs = dataclasses.replace(outputs, relations=related)
        return outputs, state


def embed(
    config: DecoderConfig,
    table_VD: Array,
    places_PD: Array | None,
    tokens_BL: Array,
    positions_BL: Array,
    dtype: DTypeLike,
    rules: Mapping[str, MeshAxes] | None = None,
) -> Array:
    """[B, L, D], what enters the first layer.

    Args:
      config: of the model.
      table_VD: the embedding.
      places_PD: learned positions, or None.
      tokens_BL: int32 [B, L].
      positions_BL: int32 [B, L].
      dtype: of the result.
      rules: how the result lies on the mesh; None leaves that to the compiler.
    """
    x_BLD = _lookup(table_VD, tokens_BL, dtype, rules)
    if config.embedding_scaled:
        # The published models were trained with this factor rounded to what they compute in.
        x_BLD = x_BLD * jnp.asarray(config.embed**0.5, dtype)
    if places_PD is not None:
        x_BLD = x_BLD + jnp.take(places_PD, positions_BL, axis=0).astype(dtype)
    return x_BLD


def _lookup(
    table_VD: Array, tokens_BL: Array, dtype: DTypeLike, rules: Mapping[str, MeshAxes] | None
) -> Array:
    """table[tokens], [B, L, D], of a table that stays where it lies.

    Devices that hold different columns of the table read theirs for the tokens of all of them, and
    then exchange: an all-to-all of what is looked up, and back of its gradient, in place of the
    whole table and a whole gradient. The columns add their gradients up in the table's own dtype.
    """
    if rules is None:
        return jnp.take(table_VD, tokens_BL, axis=0).astype(dtype)
    columns = mesh_axes(rules["embed"])
    rows = tuple(axis for axis in mesh_axes(rules["batch"]) if axis not in columns)
    apart = {**rules, "batch": rows, "act_embed": rules["embed"]}
    table_VD = constrain(table_VD, ("vocab", "embed"), rules)
    tokens_BL = constrain(tokens_BL, ("batch", "length"), apart)
    x_BLD = jnp.take(table_VD, tokens_BL, axis=0).astype(dtype)
    x_BLD = constrain(x_BLD, ("batch", "length", "act_embed"), apart)
    return constrain(x_BLD, ("batch", "length", "act_embed"), rules)


def _relations(layer: Layer, x_BLD: Array) -> tuple[Array, ...]:
    """Queries, keys and values of a layer, heads side by side.

    Made a second time, from what enters the layer: within the scan every layer's would be kept.
    """
    return tuple(x.reshape(*x_BLD.shape[:2], -1) for x in layer.project(x_BLD))


def _slice(stacked: Any, number: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[number], stacked)


def _remat(body: Callable, remat: str) -> Callable:
    """The scan body under the chosen policy of what the backward pass keeps."""
    if remat not in REMAT:
        raise ModelError(f"remat: {remat!r} is not one of {', '.join(REMAT)}")
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def computing(params: dict, axes: dict, dtype: DTypeLike, rules: Mapping[str, MeshAxes]) -> dict:
    """One layer's weights as it computes with them: cast while still sharded.

    Casting before the all-gather that the products need halves what travels; the masters stay as
    they are because only this layer's copy is cast.
    """

    def cast(path, weight, logical):
        if kept_wide(path):
            return weight
        if is_kernel(weight):
            return weight.astype(dtype)
        return constrain(weight.astype(dtype), logical[1:], rules)

    with jax.named_scope(WEIGHTS):
        return jax.tree_util.tree_map_with_path(cast, params, axes, is_leaf=is_kernel)


def kept_wide(path: tuple) -> bool:
    """Whether a weight of a layer is read in its own dtype: those of norms and routers."""
    name = path[-2].key if len(path) > 1 else ""
    return name == "router" or name.endswith("norm")


@functools.lru_cache(maxsize=256)
def graphdef(config: DecoderConfig) -> nnx.GraphDef:
    """The structure of the module, made once per configuration: `nnx.merge(graphdef, params)`."""
    return nnx.split(Decoder(config, shapes(config, jnp.float32)))[0]


def shapes(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return map_weights(lambda row: jax.ShapeDtypeStruct(row.shape, dtype), weights(config))


@functools.lru_cache(maxsize=256)
def logical_axes(config: DecoderConfig) -> dict:
    """The parameter tree as tuples of logical axis names, for `sharding.shardings`."""
    return map_weights(lambda row: row.axes, weights(config))


def is_apart(params: Mapping[str, Any]) -> bool:
    """Whether the layers lie side by side, as generation reads them, and not stacked."""
    return isinstance(params["layers"], tuple)


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
    attend = causal(config, length, segment_ids, attention)
    if is_apart(params):
        params = params | {"layers": jax.tree.map(lambda *one: jnp.stack(one), *params["layers"])}
    model = nnx.merge(graphdef(config), params)
    outputs, _ = model(
        tokens, positions, attend, compute_dtype=compute_dtype, remat=remat, rules=rules, taps=taps,
        relations=relations, routing=routing,
    )  # fmt: skip
    return outputs


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
    if outputs.softcap is None:
        return logits_BLV
    return outputs.softcap * jnp.tanh(logits_BLV / outputs.softcap)
