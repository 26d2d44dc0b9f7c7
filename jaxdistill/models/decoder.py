"""One decoder-only Transformer: RMSNorm, RoPE, grouped-query attention, gated MLP; scanned."""

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
from jaxdistill.models.quantized import is_kernel
from jaxdistill.sharding import RULES, MeshAxes, constrain, current_mesh
from jaxdistill.types import Outputs

REMAT = ("none", "dots", "full")
WEIGHTS = "weights"  # part of the names of operations that make the weights a layer computes with

# attend(state, layer index, query [B, L, H, E], key [B, L, G, E], value [B, L, G, E])
#   -> (state, mixed values [B, L, H, E]); training has no state, generation keeps its cache there.
Attend = Callable[[Any, Array, Array, Array, Array], tuple[Any, Array]]


def _last(vector: Array, like: Array) -> Array:
    """A vector shaped to meet the last dim of `like` without implicit rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _rows(x_BLD: Array) -> Array:
    """[B * L, D], which spares XLA a transposed copy per weight gradient on CPU.

    Where the length is spread over the mesh, merging it with the batch would gather it: [B, L, D].
    """
    mesh = current_mesh()
    if mesh is not None and mesh.shape["context"] > 1:
        return x_BLD
    return x_BLD.reshape(-1, x_BLD.shape[-1])


def _light(function: Callable) -> Callable:
    """The function with its element-wise values made again in the backward pass, not kept.

    They cost less to compute than to store, on every device; the scan around them separates the
    passes, so nothing needs to stop XLA from merging the two computations.
    """
    return jax.checkpoint(function, prevent_cse=False)


class Linear(nnx.Module):
    """x @ kernel + bias, kernel [in, out]."""

    def __init__(self, params: Mapping[str, Any]):
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel.get_value()
        y = kernel.dot(x) if is_kernel(kernel) else x @ kernel
        return y if self.bias is None else y + _last(self.bias[...], y)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x ** 2) + eps) * scale over the last dim, computed in float32."""

    def __init__(self, params: Mapping[str, Any], eps: float):
        self.scale = nnx.Param(params["scale"])
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        def norm(x, scale):
            wide = x.astype(jnp.float32)
            mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
            scale = _last(scale.astype(jnp.float32), wide)
            return (wide * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)

        return _light(norm)(x, self.scale[...])


class Attention(nnx.Module):
    """Grouped-query attention; how keys and values are stored and masked is `attend`'s business."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        self.query = Linear(params["query"])
        self.key = Linear(params["key"])
        self.value = Linear(params["value"])
        self.out = Linear(params["out"])
        norm = functools.partial(RMSNorm, eps=config.norm_eps)
        self.query_norm = norm(params["query_norm"]) if config.qk_norm else None
        self.key_norm = norm(params["key_norm"]) if config.qk_norm else None
        self.config = config

    def project(self, x_BLD):
        """Query [B, L, H, E], key and value [B, L, G, E], before they are turned by position."""
        split = (*x_BLD.shape[:2], -1, self.config.head_dim)
        x_ND = _rows(x_BLD)
        query_BLHE = self.query(x_ND).reshape(split)
        key_BLGE = self.key(x_ND).reshape(split)
        if self.query_norm is not None and self.key_norm is not None:
            query_BLHE, key_BLGE = self.query_norm(query_BLHE), self.key_norm(key_BLGE)
        return query_BLHE, key_BLGE, self.value(x_ND).reshape(split)

    def __call__(self, x_BLD, turn, attend, state, index, rules):
        batch, length, _ = x_BLD.shape
        heads = functools.partial(
            constrain, logical=("batch", "length", "act_heads", None), rules=rules
        )
        query_BLHE, key_BLGE, value_BLGE = self.project(x_BLD)
        value_BLGE = heads(value_BLGE)
        query_BLHE = heads(rope.rotate(query_BLHE, *turn))
        key_BLGE = heads(rope.rotate(key_BLGE, *turn))
        state, mixed_BLHE = attend(state, index, query_BLHE, key_BLGE, value_BLGE)
        mixed_ND = _rows(heads(mixed_BLHE).reshape(batch, length, -1))
        return state, self.out(mixed_ND).reshape(x_BLD.shape)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, params: Mapping[str, Any]):
        self.gate = Linear(params["gate"])
        self.up = Linear(params["up"])
        self.down = Linear(params["down"])

    def __call__(self, x_BLD: Array, rules: Mapping[str, MeshAxes]) -> Array:
        x_ND = _rows(x_BLD)
        shape = (*x_BLD.shape[:2], -1)

        def close(gate_NF, up_NF):
            hidden_BLF = (jax.nn.silu(gate_NF) * up_NF).reshape(shape)
            hidden_BLF = constrain(hidden_BLF, ("batch", "length", "act_mlp"), rules)
            return self.down(_rows(hidden_BLF)).reshape(x_BLD.shape)

        return _light(close)(self.gate(x_ND), self.up(x_ND))


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        self.attention_norm = RMSNorm(params["attention_norm"], config.norm_eps)
        self.attention = Attention(config, params["attention"])
        self.mlp_norm = RMSNorm(params["mlp_norm"], config.norm_eps)
        self.mlp = GatedMLP(params["mlp"])

    def __call__(self, x_BLD, turn, attend, state, index, rules):
        state, mixed_BLD = self.attention(
            self.attention_norm(x_BLD), turn, attend, state, index, rules
        )
        x_BLD = x_BLD + mixed_BLD
        x_BLD = x_BLD + self.mlp(self.mlp_norm(x_BLD), rules)
        return constrain(x_BLD, ("batch", "length", "act_embed"), rules), state


class Decoder(nnx.Module):
    """The whole model; `layers` is one Layer whose parameters have a first dim over all layers."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        self.config = config
        self.embedding = nnx.Param(params["embedding"])
        self.layers = Layer(config, params["layers"])
        self.final_norm = RMSNorm(params["final_norm"], config.norm_eps)
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
    ) -> tuple[Outputs, Any]:
        """Outputs and the final state of `attend` for tokens [B, L] at positions [B, L]."""
        config = self.config
        turn = rope.tables(config.rope, config.head_dim, positions)
        graphdef, stacked = nnx.split(self.layers)
        axes = logical_axes(config)["layers"]

        def run(carry, one):
            x_BLD, state = carry
            params, index = one
            layer = nnx.merge(graphdef, _computing(params, axes, compute_dtype, rules))
            return layer(x_BLD, turn, attend, state, index, rules), None

        run = _remat(run, remat)

        def body(carry, one):
            *xs, slot = one
            through, tapped = carry
            through, _ = run(through, xs)
            # Outside of what is made again: a tap is kept once, not with every layer.
            if kept:
                tapped = tapped.at[slot].set(through[0], mode="drop")
            return (through, tapped), None

        # Gathered in the master's dtype and then cast: the gradient of the table adds up in it.
        with jax.named_scope(WEIGHTS):
            table_VD = constrain(self.embedding[...], ("vocab", None), rules)
        x_BLD = jnp.take(table_VD, tokens, axis=0).astype(compute_dtype)
        x_BLD = constrain(x_BLD, ("batch", "length", "act_embed"), rules)
        inputs = tuple(layer - 1 for layer in relations if layer and layer - 1 not in taps)
        kept, first_BLD = (*taps, *inputs), x_BLD
        slots = np.full(config.layers, len(kept), np.int32)  # of no tap: behind the last one
        slots[list(kept)] = np.arange(len(kept))
        tapped = jnp.zeros((len(kept), *x_BLD.shape), compute_dtype) if kept else None
        xs = (nnx.to_pure_dict(stacked), jnp.arange(config.layers), jnp.asarray(slots))
        ((x_BLD, state), tapped), _ = jax.lax.scan(body, ((x_BLD, state), tapped), xs)
        head = self.embedding if self.head is None else self.head
        outputs = Outputs(
            self.final_norm(x_BLD), head[...], taps=tapped[: len(taps)] if taps else None
        )
        if relations:
            layer = lambda n: nnx.merge(
                graphdef, _computing(_slice(xs[0], n), axes, compute_dtype, rules)
            )
            entering = lambda n: tapped[slots[n - 1]] if n else first_BLD
            related = tuple(_relations(layer(n), entering(n)) for n in relations)
            outputs = dataclasses.replace(outputs, relations=related)
        return outputs, state


def _relations(layer: Layer, x_BLD: Array) -> tuple[Array, ...]:
    """Queries, keys and values of a layer, heads side by side.

    Made a second time, from what enters the layer: within the scan every layer's would be kept.
    """
    found = layer.attention.project(layer.attention_norm(x_BLD))
    return tuple(x.reshape(*x_BLD.shape[:2], -1) for x in found)


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


def _computing(params: dict, axes: dict, dtype: DTypeLike, rules: Mapping[str, MeshAxes]) -> dict:
    """One layer's weights as it computes with them: cast while still sharded, norm scales as kept.

    Casting before the all-gather that the products need halves what travels; the masters stay as
    they are because only this layer's copy is cast.
    """

    def cast(path, weight, logical):
        if path[-1].key == "scale":
            return weight
        if is_kernel(weight):
            return weight.astype(dtype)
        return constrain(weight.astype(dtype), logical[1:], rules)

    with jax.named_scope(WEIGHTS):
        return jax.tree_util.tree_map_with_path(cast, params, axes, is_leaf=is_kernel)


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
    """Random parameters: normal(0, initializer_range) weights, zero biases, unit norm scales."""
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
) -> Outputs:
    """Hidden states after the final norm, and the head, of tokens [B, L].

    Args:
      config: the model's configuration.
      params: its parameters, in any float dtype; each layer is cast to `compute_dtype` as it runs.
      tokens: int32 [B, L].
      positions: int32 [B, L], restarting in every document; None counts from 0 in every row.
      segment_ids: int32 [B, L]; a token sees earlier tokens of its own segment only. None makes
        every row one document. Padding (segment 0) sees padding, so its values are finite.
      compute_dtype: dtype of activations; softmax, norms and rotations are float32 in any case.
      remat: what the backward pass keeps of each layer: "none" all but cheap element-wise values,
        "dots" the outputs of its projections, "full" its input.
      attention: `implementation` of `jax.nn.dot_product_attention` ("xla", "cudnn"); None chooses.
      rules: table from logical axes to mesh axes; used where a mesh is in context.
      taps: layers, from 0, whose outputs are wanted as well, in this order.
      relations: layers, from 0, whose queries, keys and values are wanted as well.

    Returns:
      Outputs: hidden [B, L, D] in compute_dtype, head [V, D] uncast (the embedding where tied),
      taps [len(taps), B, L, D] before the final norm, and relations, before rotation.

    Raises:
      ModelError: for an unknown `remat`, or a tap that is no layer.
    """
    for name, layers in (("taps", taps), ("relations", relations)):
        if len(set(layers)) != len(layers) or not all(0 <= n < config.layers for n in layers):
            raise ModelError(
                f"{name} = {layers}: must be different layers from 0 to {config.layers - 1}"
            )
    length = tokens.shape[1]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length)[None, :], tokens.shape)
    attend = causal(config, length, segment_ids, attention)
    if is_apart(params):
        params = params | {"layers": jax.tree.map(lambda *one: jnp.stack(one), *params["layers"])}
    model = nnx.merge(graphdef(config), params)
    outputs, _ = model(
        tokens, positions, attend, compute_dtype=compute_dtype, remat=remat, rules=rules, taps=taps,
        relations=relations,
    )  # fmt: skip
    return outputs


def causal(config, length, segment_ids, implementation) -> Attend:
    """Attention within a row: causal, within segments, within each layer's window."""
    mask_B1LL = None
    if segment_ids is not None:
        mask_B1LL = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    windows = tuple(min(window or length, length) for window in config.windows or (length,))
    age_LL = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]

    def attend(state, index, query, key, value):
        mask = mask_B1LL
        if min(windows) < length:
            inside = (age_LL < jnp.asarray(np.asarray(windows))[index])[None, None]
            mask = inside if mask is None else mask & inside
        mixed = jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=True, implementation=implementation
        )
        return state, mixed

    return attend


def logits(outputs: Outputs) -> Array:
    """hidden @ head.T + bias, float32 [B, L, V]: for evaluation and tests, never for training."""
    logits_BLV = jnp.einsum(
        "BLD,VD->BLV",
        outputs.hidden,
        outputs.head.astype(outputs.hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if outputs.head_bias is None:
        return logits_BLV
    return logits_BLV + _last(outputs.head_bias.astype(jnp.float32), logits_BLV)
