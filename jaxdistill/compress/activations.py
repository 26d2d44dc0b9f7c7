"""The sums that importance is made of: what flows through the decoder, layer by layer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.methods import measuring
from jaxdistill.models import DecoderConfig, attention, decoder
from jaxdistill.models.blocks import MLP, Layer
from jaxdistill.sharding import RULES
from jaxdistill.types import Batch, Mean, Outputs, TeacherSignal

Sums = dict[str, Array]

# Parts of a layer that are watched, those a model has; the inner ones first.
_PARTS = (
    "attention.query_norm", "attention.key_norm", "attention.out",
    "attention_norm", "attention", "attention_post_norm", "mlp_norm", "mlp", "mlp_post_norm",
)  # fmt: skip


def norms(config: DecoderConfig) -> list[str]:
    """The norms of a layer over all channels, or all heads, whose units may be cut."""
    names = ["attention_norm", "mlp_norm"] if config.pre_norm else []
    names += ["attention_post_norm", "mlp_post_norm"] if config.post_norm else []
    whole = config.qk_norm and config.qk_norm_whole
    return names + (["attention.query_norm", "attention.key_norm"] if whole else [])


@functools.partial(jax.jit, static_argnums=(0, 1))
def sums(config: DecoderConfig, dtype: DTypeLike, params: Any, batch: Batch) -> Sums:
    """One forward pass of one batch, added up over its real tokens; float32.

    A row of the batch is a sample: magnitudes are means over its real tokens, squared, and then
    added over the rows.

        m(a)_b = mean over real tokens t of |a_bt|,    square(a) = sum_b m(a)_b ** 2

    Returns:
      neurons: [layers, F], or of every expert [layers, X, F], square of what enters the down
        projection; of a token that does not pass an expert that is 0.
      heads: [layers, H, E] square of what enters the attention's out projection.
      channels: [layers, 2, D] square of what attention and the MLP read.
      shares.NORM: [layers, units], and of the final norm [units], sum over tokens of
        x ** 2 / mean(x ** 2) before it.
      inputs.NAME: [layers, units] sum over tokens of x ** 2 of what projections read: attention,
        out, mlp, down; of every expert's, the last two are [layers, X, units], over its tokens.
      cosines: [layers + 1, layers + 1] sum over tokens of cos(x_i, x_j) of the hidden states
        between the layers; the embeddings are x_0.
      experts: [layers, X] sum over the tokens that pass an expert of its share times the L2 norm
        of what it gives. routed: [layers, X] how many they are. Both where there are experts.
      tokens: [] real tokens. rows: [] rows that have any.
    """
    real_BL = batch.segment_ids > 0
    counts_B = jnp.sum(real_BL, axis=1)
    weights_BL = real_BL / jnp.maximum(counts_B, 1)[:, None].astype(jnp.float32)

    def whole(x: Array) -> Array:
        return x.reshape(*real_BL.shape, -1)

    def square(x: Array) -> Array:
        mean_BK = jnp.einsum("BL,BLK->BK", weights_BL, jnp.abs(whole(x).astype(jnp.float32)))
        return jnp.sum(jnp.square(mean_BK), axis=0)

    def energy(x: Array) -> Array:
        real_BL1 = real_BL[..., None].astype(jnp.float32)
        return jnp.sum(real_BL1 * jnp.square(whole(x).astype(jnp.float32)), axis=(0, 1))

    def share(x: Array) -> Array:
        squares_BLK = jnp.square(whole(x).astype(jnp.float32))
        mean_BL1 = jnp.mean(squares_BLK, axis=-1, keepdims=True)
        relative_BLK = squares_BLK / jnp.where(mean_BL1 == 0, 1, mean_BL1)
        return jnp.einsum("BL,BLK->K", real_BL.astype(jnp.float32), relative_BLK)

    def measure(mlp: Any, seen: dict[str, Array]) -> dict[str, Array]:
        heads = square(seen["attention.out"]).reshape(config.heads, config.head_dim)
        channels = jnp.stack([square(seen["attention"]), square(seen["mlp"])])
        sums = {"heads": heads, "channels": channels, "hidden": seen["entering"]}
        sums |= {"inputs.attention": energy(seen["attention"])}
        sums |= {"inputs.out": energy(seen["attention.out"])}
        sums |= {f"shares.layers.{name}": share(seen[name]) for name in norms(config)}
        if isinstance(mlp, MLP):
            neurons = mlp.neurons(seen["mlp"], RULES)
            inputs = {"inputs.mlp": energy(seen["mlp"]), "inputs.down": energy(neurons)}
            return sums | inputs | {"neurons": square(neurons)}
        passed = mlp.passed(seen["mlp"], RULES)
        chosen_BLKX = jax.nn.one_hot(passed.experts, mlp.experts.count)
        chosen_BLKX = chosen_BLKX * real_BL[..., None, None]
        exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        size_BLKF = jnp.abs(passed.neurons.astype(jnp.float32))
        mean_BXF = exact("BL,BLKX,BLKF->BXF", weights_BL, chosen_BLKX, size_BLKF)
        squared = lambda x: jnp.square(x.astype(jnp.float32))
        return sums | {
            "inputs.mlp": exact("BLKX,BLD->XD", chosen_BLKX, squared(seen["mlp"])),
            "inputs.down": exact("BLKX,BLKF->XF", chosen_BLKX, squared(passed.neurons)),
            "neurons": jnp.sum(jnp.square(mean_BXF), axis=0),
            "experts": exact("BLK,BLKX->X", passed.shares * passed.norms, chosen_BLKX),
            "routed": jnp.sum(chosen_BLKX, axis=(0, 1, 2)),
        }

    visit = functools.partial(_look, measure)
    outputs, seen = _forward(config, dtype, params, batch, visit, taps=(config.layers - 1,))
    (last_BLD,) = outputs.taps
    hidden_SBLD = jnp.concatenate([seen.pop("hidden"), outputs.taps])
    return seen | {
        "shares.final_norm": share(last_BLD),
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

    def visit(layer: Layer, x_BLD: Array, *given: Any) -> tuple[Array, None, None]:
        *_, index, _ = given
        # A condition, not a mask: a layer that is left out costs nothing.
        run = lambda x_BLD: layer(x_BLD, *given)[0]
        return jax.lax.cond(keep[index], run, lambda x_BLD: x_BLD, x_BLD), None, None

    outputs, _ = _forward(config, dtype, params, batch, visit)
    entropy = measuring.cross_entropy(vocab=vocab)
    return entropy.apply({}, outputs, TeacherSignal(), batch, {})["loss"]


def _forward(
    config: DecoderConfig,
    dtype: DTypeLike,
    params: Any,
    batch: Batch,
    visit: decoder.Visit,
    taps: tuple[int, ...] = (),
) -> tuple[Outputs, Any]:
    """The outputs, and what the visits saw of every layer, stacked."""
    attend = attention.causal(config, batch.tokens.shape[1], batch.segment_ids, None)
    outputs, _, seen = decoder.forward(
        config, params, batch.tokens, batch.positions, attend, compute_dtype=dtype, taps=taps,
        visit=visit,
    )  # fmt: skip
    return outputs, seen


def _look(
    measure: Callable[[Any, dict[str, Array]], Any], layer: Layer, x_BLD: Array, *given: Any
) -> tuple[Array, Any, Any]:
    """A `decoder.Visit` that measures what each part of a layer is given."""
    seen, mlp = {"entering": x_BLD}, layer.mlp
    _watch(layer, seen)
    return *layer(x_BLD, *given), measure(mlp, seen)


def _watch(layer: Layer, seen: dict[str, Array]) -> None:
    """What each part of the layer is given is noted in `seen`, by its name, when the layer runs."""
    for name in _PARTS:
        *owners, part = name.split(".")
        owner = functools.reduce(getattr, owners, layer)
        if (module := getattr(owner, part)) is not None:
            setattr(owner, part, _Watched(name, module, seen))


class _Watched:
    """A part of a layer that notes what it is given."""

    def __init__(self, name: str, module: Callable, seen: dict[str, Array]):
        self.name, self.module, self.seen = name, module, seen

    def __call__(self, x: Array, *others: Any) -> Any:
        self.seen[self.name] = x
        return self.module(x, *others)
