"""The parts of a layer: projections, norms, attention, MLP; what families differ in is a flag."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdistill.models import rope
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.experts import RoutedMLP
from jaxdistill.models.kernel import times
from jaxdistill.sharding import MeshAxes, between, constrain, current_mesh, within

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def last(vector: Array, like: Array) -> Array:
    """A vector shaped to meet the last dim of `like` without implicit rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def multiplied(x: Array, factor: float) -> Array:
    """x * factor in the dtype of x; x itself for 1."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def _rows(x_BLD: Array) -> Array:
    """[B * L, D], which spares XLA a transposed copy per weight gradient on CPU.

    Where the length is spread over the mesh, merging it with the batch would gather it; where it is
    so between blocks, what is added up would come whole to every device: [B, L, D].
    """
    mesh = current_mesh()
    if mesh is not None and mesh.shape["context"] * mesh.shape["tensor"] > 1:
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
        y = times(x, self.kernel.get_value())
        return y if self.bias is None else y + last(self.bias[...], y)


class Norm(nnx.Module):
    """A norm over the last dim, computed in float32.

    rms:         x / sqrt(mean(x ** 2) + eps) * scale
    rms_offset:  the same * (1 + scale)
    layer:       rms of x - mean(x), + bias
    """

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        self.scale = nnx.Param(params["scale"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None
        self.kind, self.eps = config.norm, config.norm_eps

    def __call__(self, x: Array) -> Array:
        def norm(x, scale, bias):
            wide = x.astype(jnp.float32)
            if self.kind == "layer":
                wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
            mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
            scale = last(scale.astype(jnp.float32), wide)
            scale = 1 + scale if self.kind == "rms_offset" else scale
            wide = wide * jax.lax.rsqrt(mean_square + self.eps) * scale
            if bias is not None:
                wide = wide + last(bias.astype(jnp.float32), wide)
            return wide.astype(x.dtype)

        return _light(norm)(x, self.scale[...], None if self.bias is None else self.bias[...])


class Attention(nnx.Module):
    """Grouped-query attention; how keys and values are stored and masked is `attend`'s business."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        self.query = Linear(params["query"])
        self.key = Linear(params["key"])
        self.value = Linear(params["value"])
        self.out = Linear(params["out"])
        self.query_norm = Norm(config, params["query_norm"]) if config.qk_norm else None
        self.key_norm = Norm(config, params["key_norm"]) if config.qk_norm else None
        self.config = config

    def project(self, x_BLD):
        """Query [B, L, H, E], key and value [B, L, G, E], before they are turned by position."""
        split = (*x_BLD.shape[:2], -1, self.config.head_dim)
        x_ND = _rows(x_BLD)
        query, key = self.query(x_ND), self.key(x_ND)
        if self.config.qk_norm_whole:
            return self._normed(query, key, split) + (self.value(x_ND).reshape(split),)
        query_BLHE, key_BLGE = self._normed(query.reshape(split), key.reshape(split), split)
        return query_BLHE, key_BLGE, self.value(x_ND).reshape(split)

    def _normed(self, query, key, split):
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query.reshape(split), key.reshape(split)

    def __call__(self, x_BLD, turn, attend, state, index, rules):
        batch, length, _ = x_BLD.shape
        heads = functools.partial(
            constrain, logical=("batch", "length", "act_heads", None), rules=rules
        )
        query_BLHE, key_BLGE, value_BLGE = self.project(x_BLD)
        if turn is not None:
            assert self.config.rope is not None, "what turns them"
            pairs = self.config.rope.interleaved
            query_BLHE = rope.rotate(query_BLHE, *turn, interleaved=pairs)
            key_BLGE = rope.rotate(key_BLGE, *turn, interleaved=pairs)
        state, mixed_BLHE = attend(
            state, index, heads(query_BLHE), heads(key_BLGE), heads(value_BLGE)
        )
        mixed_ND = _rows(heads(mixed_BLHE).reshape(batch, length, -1))
        return state, self.out(mixed_ND).reshape(x_BLD.shape)


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        self.gate = Linear(params["gate"]) if config.gated else None
        self.up = Linear(params["up"])
        self.down = Linear(params["down"])
        self.activation = config.activation

    def __call__(self, x_BLD: Array, rules: Mapping[str, MeshAxes]) -> Array:
        def close(*parts_NF):
            hidden_BLF = self._hidden(x_BLD, parts_NF, rules)
            return self.down(_rows(hidden_BLF)).reshape(x_BLD.shape)

        return _light(close)(*self._parts(x_BLD))

    def neurons(self, x_BLD: Array, rules: Mapping[str, MeshAxes]) -> Array:
        """What enters `down`, [B, L, F]: for those who measure it."""
        return self._hidden(x_BLD, self._parts(x_BLD), rules)

    def _parts(self, x_BLD: Array) -> tuple[Array, ...]:
        x_ND = _rows(x_BLD)
        return tuple(part(x_ND) for part in (self.gate, self.up) if part is not None)

    def _hidden(
        self, x_BLD: Array, parts_NF: tuple[Array, ...], rules: Mapping[str, MeshAxes]
    ) -> Array:
        first_NF, *up_NF = parts_NF
        hidden_NF = ACTIVATIONS[self.activation](first_NF)
        for up in up_NF:
            hidden_NF = hidden_NF * up
        shape = (*x_BLD.shape[:2], -1)
        return constrain(hidden_NF.reshape(shape), ("batch", "length", "act_mlp"), rules)


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); norms may stand behind, MLPs beside."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        norm = lambda name: Norm(config, params[name]) if name in params else None
        self.attention_norm, self.attention_post_norm = (
            norm("attention_norm"),
            norm("attention_post_norm"),
        )
        self.mlp_norm, self.mlp_post_norm = norm("mlp_norm"), norm("mlp_post_norm")
        self.attention = Attention(config, params["attention"])
        if config.experts is None:
            self.mlp = MLP(config, params["mlp"])
        else:
            activate = ACTIVATIONS[config.activation]
            self.mlp = RoutedMLP(config.experts, activate, params["mlp"])
        self.parallel, self.multiplier = config.parallel, config.residual_multiplier

    def project(self, x_BLD):
        """Queries, keys and values of what enters the layer."""
        return self.attention.project(_normed(self.attention_norm, x_BLD))

    def __call__(self, x_BLD, turn, attend, state, index, rules):
        between_BLD, entering_BLD, state = self._attend(x_BLD, turn, attend, state, index, rules)
        return self._close(between_BLD, entering_BLD, rules), state

    def routed(self, x_BLD, turn, attend, state, index, rules):
        """As a call, and float32 [B, L, X], the scores of the router for its experts."""
        between_BLD, entering_BLD, state = self._attend(x_BLD, turn, attend, state, index, rules)
        assert isinstance(self.mlp, RoutedMLP), "asked of models with experts alone"
        scores_BLX = self.mlp.scores(entering_BLD)
        return self._close(between_BLD, entering_BLD, rules), state, scores_BLX

    def _attend(self, x_BLD, turn, attend, state, index, rules):
        """(x + attention(norm(x)), what enters the MLP, the state)."""
        entering_BLD = within(_normed(self.attention_norm, x_BLD), rules)
        state, mixed_BLD = self.attention(entering_BLD, turn, attend, state, index, rules)
        mixed_BLD = _normed(self.attention_post_norm, self._left(mixed_BLD, rules))
        between_BLD = x_BLD + multiplied(mixed_BLD, self.multiplier)
        entering_BLD = x_BLD if self.parallel else between_BLD
        return between_BLD, within(_normed(self.mlp_norm, entering_BLD), rules), state

    def _close(self, between_BLD, entering_BLD, rules):
        made_BLD = _normed(self.mlp_post_norm, self._left(self.mlp(entering_BLD, rules), rules))
        return between(between_BLD + multiplied(made_BLD, self.multiplier), rules)

    def _left(self, made_BLD, rules):
        """What a block made, in the parts that its devices keep of it."""
        mesh = current_mesh()
        return made_BLD if mesh is None or mesh.shape["tensor"] == 1 else between(made_BLD, rules)


def _normed(norm: Callable[[Array], Array] | None, x: Array) -> Array:
    return x if norm is None else norm(x)
