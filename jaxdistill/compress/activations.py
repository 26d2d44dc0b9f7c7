"""The decoder run layer by layer, with a look at what flows through it: the sums of importance."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.errors import ModelError
from jaxdistill.models import DecoderConfig, attention, blocks, decoder, rope
from jaxdistill.objectives import sft
from jaxdistill.sharding import RULES
from jaxdistill.types import Batch, Mean, Outputs, TeacherSignal

Sums = dict[str, Array]

# The form of layer whose units are measured and cut.
_FORM = {
    "norm": "rms", "pre_norm": True, "post_norm": False, "parallel": False, "gated": True,
    "experts": None, "qk_norm_whole": False, "embedding_scaled": False, "logits_softcap": None,
}  # fmt: skip


def check_form(config: DecoderConfig) -> None:
    """The model is made of layers whose units can be measured and cut.

    Raises:
      ModelError: naming what is otherwise.
    """
    other = [name for name, value in _FORM.items() if getattr(config, name) != value]
    if other or config.rope is None:
        raise ModelError(
            f"importance: {config.family} models differ in {', '.join(other or ['rope'])} from the "
            "form that is measured and pruned (Llama's): keep layers by hand (student.layers)"
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def sums(config: DecoderConfig, dtype: DTypeLike, params: Any, batch: Batch) -> Sums:
    """One forward pass of one batch, added up over its real tokens; float32.

    A row of the batch is a sample: magnitudes are means over its real tokens, squared, and then
    added over the rows.

        m(a)_b = mean over real tokens t of |a_bt|,    square(a) = sum_b m(a)_b ** 2

    Returns:
      neurons: [layers, F] square of what enters the down projection.
      heads: [layers, H, E] square of what enters the attention's out projection.
      channels: [layers, 2, D] square of what leaves the two norms.
      shares: [2 layers + 1, D] sum over tokens of x ** 2 / mean(x ** 2) before every norm, the
        final one last.
      cosines: [layers + 1, layers + 1] sum over tokens of cos(x_i, x_j) of the hidden states
        between the layers; the embeddings are x_0.
      tokens: [] real tokens. rows: [] rows that have any.
    """
    real_BL = batch.segment_ids > 0
    counts_B = jnp.sum(real_BL, axis=1)
    weights_BL = real_BL / jnp.maximum(counts_B, 1)[:, None].astype(jnp.float32)

    def square(x_BLK: Array) -> Array:
        mean_BK = jnp.einsum("BL,BLK->BK", weights_BL, jnp.abs(x_BLK.astype(jnp.float32)))
        return jnp.sum(jnp.square(mean_BK), axis=0)

    def share(x_BLD: Array) -> Array:
        squares_BLD = jnp.square(x_BLD.astype(jnp.float32))
        mean_BL1 = jnp.mean(squares_BLD, axis=-1, keepdims=True)
        relative_BLD = squares_BLD / jnp.where(mean_BL1 == 0, 1, mean_BL1)
        return jnp.einsum("BL,BLD->D", real_BL.astype(jnp.float32), relative_BLD)

    def look(x_BLD: Array, seen: dict[str, Array]) -> dict[str, Array]:
        heads = square(seen["mixed"].reshape(*real_BL.shape, -1))
        return {
            "neurons": square(seen["neurons"]),
            "heads": heads.reshape(config.heads, config.head_dim),
            "channels": jnp.stack([square(seen["attention_norm"]), square(seen["mlp_norm"])]),
            "shares": jnp.stack([share(x_BLD), share(seen["between"])]),
            "hidden": x_BLD,
        }

    _, last_BLD, seen = _forward(config, dtype, params, batch, look)
    hidden_SBLD = jnp.concatenate([seen.pop("hidden"), last_BLD[None]])
    shares = seen["shares"].reshape(-1, config.embed)
    return seen | {
        "shares": jnp.concatenate([shares, share(last_BLD)[None]]),
        "cosines": _cosines(hidden_SBLD, real_BL),
        "tokens": jnp.sum(counts_B),
        "rows": jnp.sum(counts_B > 0),
    }


def _cosines(hidden_SBLD: Array, real_BL: Array) -> Array:
    """Sum over real tokens of the cosine between every two states of a token."""
    products_BLSS = jnp.einsum(
        "SBLD,ZBLD->BLSZ",
        hidden_SBLD,
        hidden_SBLD,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    squares_BLS = jnp.diagonal(products_BLSS, axis1=-2, axis2=-1)
    scale = jnp.sqrt(squares_BLS[..., :, None] * squares_BLS[..., None, :])
    cosines_BLSS = products_BLSS / jnp.where(scale == 0, 1, scale)
    return jnp.einsum("BL,BLSZ->SZ", real_BL.astype(jnp.float32), cosines_BLSS)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def loss_without(
    config: DecoderConfig, vocab: int, dtype: DTypeLike, params: Any, batch: Batch, keep: Array
) -> Mean:
    """Cross-entropy of a batch by the model without the layers whose `keep` [layers] is False."""
    outputs, _, _ = _forward(config, dtype, params, batch, lambda x, seen: {}, keep)
    return sft(vocab=vocab).apply({}, outputs, TeacherSignal(), batch, {})["loss"]


def _forward(
    config: DecoderConfig,
    dtype: DTypeLike,
    params: Any,
    batch: Batch,
    look: Callable[[Array, dict[str, Array]], dict[str, Array]],
    keep: Array | None = None,
) -> tuple[Outputs, Array, dict[str, Array]]:
    """(outputs, hidden states before the final norm, what `look` made of each layer, stacked).

    The same layer as `blocks.Layer`, written out so that its inner values can be looked at; a
    test holds the two together.
    """
    check_form(config)
    model = nnx.merge(decoder.graphdef(config), params)
    graphdef, stacked = nnx.split(model.layers)
    attend = attention.causal(config, batch.tokens.shape[1], batch.segment_ids, None)
    turn = rope.per_layer(config, batch.positions)
    activate = blocks.ACTIVATIONS[config.activation]

    def cast(path, leaf):
        return leaf if decoder.kept_wide(path) else leaf.astype(dtype)

    def mixed_too(state, index, query, key, value):
        _, mixed_BLHE = attend(None, index, query, key, value)
        return mixed_BLHE, mixed_BLHE

    def run(layer, x_BLD, index):
        first = layer.attention_norm(x_BLD)
        mixed_BLHE, added_BLD = layer.attention(first, turn(index), mixed_too, None, index, RULES)
        between = x_BLD + added_BLD
        second = layer.mlp_norm(between)
        neurons = activate(layer.mlp.gate(second)) * layer.mlp.up(second)
        seen = {"attention_norm": first, "mixed": mixed_BLHE, "between": between}
        seen |= {"mlp_norm": second, "neurons": neurons}
        return between + layer.mlp.down(neurons), look(x_BLD, seen)

    def body(x_BLD, one):
        weights, index = one
        layer = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(cast, weights))
        if keep is None:
            return run(layer, x_BLD, index)
        # A condition, not a mask: a layer that is left out costs nothing.
        return jax.lax.cond(keep[index], lambda x: run(layer, x, index)[0], lambda x: x, x_BLD), {}

    x_BLD = jnp.take(params["embedding"], batch.tokens, axis=0).astype(dtype)
    xs = (nnx.to_pure_dict(stacked), jnp.arange(config.layers))
    x_BLD, seen = jax.lax.scan(body, x_BLD, xs)
    head = params["embedding"] if config.tied_head else params["head"]
    return Outputs(hidden=model.final_norm(x_BLD), head=head), x_BLD, seen
