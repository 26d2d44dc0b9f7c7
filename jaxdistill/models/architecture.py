"""What a decoder is made of: its configuration, its table of weights, its size and its FLOPs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdistill.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class Experts:
    """Several MLPs of which every token passes a few, chosen by a router.

    Attributes:
      count: experts in a layer.
      chosen: of them a token passes.
      normalised: the shares of the chosen ones add up to 1; else they are the router's own.
    """

    count: int
    chosen: int
    normalised: bool = True


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder-only Transformer; hashable, so that it can key a compiled function.

    What families differ in are fields here, and never classes: one decoder reads them. The defaults
    are Llama's.

    Attributes:
      family: row of `families.FAMILIES` the model is read from and written to.
      vocab_size: rows of the embedding and of the head, padding rows included.
      embed, mlp, layers, heads, kv_heads, head_dim: D, F, number of layers, H, G, E.
      norm: "rms"; "rms_offset", which multiplies by 1 + scale; "layer", with mean and bias.
      norm_eps: epsilon of every norm.
      pre_norm, post_norm: norms before, and behind, attention and MLP.
      parallel: the MLP reads what attention reads, not what it has added.
      activation: "silu", "gelu", "gelu_tanh" or "relu2", relu(x) ** 2.
      gated: down(activation(gate(x)) * up(x)); else down(activation(up(x))).
      experts: routed experts in place of the one MLP of a layer; `mlp` is the width of one.
      rope: position embedding; None: a learned table of `max_positions` rows.
      local_rope: of layers with a window, where theirs is another.
      turned: per layer whether positions turn its heads; None: all layers'.
      attention_bias, attention_out_bias, mlp_bias: which projections add a bias.
      qk_norm: RMSNorm over each query and key head.
      qk_norm_whole: over all heads of a token together instead.
      query_scalar: scores are divided by its root; None: head_dim.
      attention_multiplier: scores are multiplied by it instead.
      attention_softcap, logits_softcap: c, of c tanh(x / c); None for none.
      embedding_scaled: embeddings are multiplied by sqrt(D).
      embedding_multiplier: or by this.
      residual_multiplier: what attention and MLP add is multiplied by it.
      logits_divisor: logits are divided by it, before any cap.
      tied_head: the head is the embedding.
      windows: per layer how many tokens it sees (itself included), None = all; or None for no
        window anywhere.
      max_positions: longest context the model was made for.
      initializer_range: standard deviation of random weights.
      bos_id, eos_ids, pad_id: token ids for generation; empty where unknown.
    """

    family: str
    vocab_size: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope: Rope | None = Rope()
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    windows: tuple[int | None, ...] | None = None
    max_positions: int = 2048
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    norm: str = "rms"
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    activation: str = "silu"
    gated: bool = True
    experts: Experts | None = None
    local_rope: Rope | None = None
    qk_norm_whole: bool = False
    query_scalar: int | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scaled: bool = False
    turned: tuple[bool, ...] | None = None
    attention_multiplier: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0


class Weight(NamedTuple):
    """One row of the table: a weight's shape, the logical axis of each dim, and its first value."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    initial: str  # "normal", "ones" or "zeros"


def weights(config: DecoderConfig) -> dict:
    """The nested dict of `Weight` that defines the parameter tree.

    Kernels are [in, out]; those of the layers are stacked on a first dim "layers", those of routed
    experts on a second one, "experts".
    """
    layer = {}
    # Random weights are numbered in this order: what a seed gives depends on it.
    for name, inside in (("attention", _attention(config)), ("mlp", _mlp(config))):
        if config.pre_norm:
            layer[f"{name}_norm"] = _norm(config, config.embed, "embed")
        layer[name] = inside
        if config.post_norm:
            layer[f"{name}_post_norm"] = _norm(config, config.embed, "embed")
    table = {
        "embedding": Weight((config.vocab_size, config.embed), ("vocab", "embed"), "normal"),
        "layers": map_weights(
            lambda row: Weight((config.layers, *row.shape), ("layers", *row.axes), row.initial),
            layer,
        ),
        "final_norm": _norm(config, config.embed, "embed"),
    }
    if config.rope is None:
        shape = (config.max_positions, config.embed)
        table["positions"] = Weight(shape, ("positions", "embed"), "normal")
    if not config.tied_head:
        table["head"] = Weight((config.vocab_size, config.embed), ("vocab", "embed"), "normal")
    return table


def _linear(inside: int, outside: int, axes: tuple[str, str], bias: bool) -> dict:
    row = {"kernel": Weight((inside, outside), axes, "normal")}
    if bias:
        row["bias"] = Weight((outside,), axes[1:], "zeros")
    return row


def _norm(config: DecoderConfig, size: int, axis: str | None) -> dict:
    first = "zeros" if config.norm == "rms_offset" else "ones"
    row = {"scale": Weight((size,), (axis,), first)}
    if config.norm == "layer":
        row["bias"] = Weight((size,), (axis,), "zeros")
    return row


def _attention(config: DecoderConfig) -> dict:
    query_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = {
        "query": _linear(config.embed, query_dim, ("embed", "heads"), config.attention_bias),
        "key": _linear(config.embed, kv_dim, ("embed", "kv_heads"), config.attention_bias),
        "value": _linear(config.embed, kv_dim, ("embed", "kv_heads"), config.attention_bias),
        "out": _linear(query_dim, config.embed, ("heads", "embed"), config.attention_out_bias),
    }
    if config.qk_norm:
        whole = config.qk_norm_whole
        size, axis = (query_dim, "heads") if whole else (config.head_dim, None)
        attention["query_norm"] = _norm(config, size, axis)
        size, axis = (kv_dim, "kv_heads") if whole else (config.head_dim, None)
        attention["key_norm"] = _norm(config, size, axis)
    return attention


def _mlp(config: DecoderConfig) -> dict:
    parts = ("gate", "up") if config.gated else ("up",)
    if config.experts is None:
        rows = {name: _linear(config.embed, config.mlp, ("embed", "mlp"), config.mlp_bias)
                for name in parts}  # fmt: skip
        return rows | {"down": _linear(config.mlp, config.embed, ("mlp", "embed"), config.mlp_bias)}
    count = config.experts.count
    inner = (count, config.embed, config.mlp), ("experts", "embed", "expert_mlp")
    outer = (count, config.mlp, config.embed), ("experts", "expert_mlp", "embed")
    return {
        "router": {"kernel": Weight((config.embed, count), ("embed", "routes"), "normal")},
        **{name: {"kernel": Weight(*inner, "normal")} for name in parts},
        "down": {"kernel": Weight(*outer, "normal")},
    }


def map_weights(function, table: dict) -> dict:
    """The table with `function` of every row (`jax.tree.map` would enter rows: they are tuples)."""
    return {
        name: function(row) if isinstance(row, Weight) else map_weights(function, row)
        for name, row in table.items()
    }


def flat_weights(table: dict, prefix: str = "") -> dict[str, Weight]:
    """The table with dotted names: `{"layers.mlp.up.kernel": Weight(...)}`."""
    flat = {}
    for name, row in table.items():
        if isinstance(row, Weight):
            flat[prefix + name] = row
        else:
            flat |= flat_weights(row, f"{prefix}{name}.")
    return flat


def nest(flat: Mapping[str, Any]) -> dict:
    """{"a.b": x} as {"a": {"b": x}}."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def picked(config: DecoderConfig, layers: Sequence[int]) -> DecoderConfig:
    """The configuration of these layers in this order: what a layer has of its own goes with it."""
    windows = config.windows and tuple(config.windows[layer] for layer in layers)
    turned = config.turned and tuple(config.turned[layer] for layer in layers)
    return dataclasses.replace(
        config,
        layers=len(layers),
        windows=windows if windows and any(windows) else None,
        turned=turned if turned and not all(turned) else None,
    )


def count_parameters(config: DecoderConfig) -> int:
    """How many numbers the model has; a tied head counts once."""
    return sum(math.prod(row.shape) for row in flat_weights(weights(config)).values())


def count_non_embedding_parameters(config: DecoderConfig) -> int:
    """How many numbers are neither in the embedding nor in an untied head."""
    tables = 1 if config.tied_head else 2
    return count_parameters(config) - tables * config.vocab_size * config.embed


def forward_flops_per_token(config: DecoderConfig, length: int) -> float:
    """Multiply-adds, counted as two, that one token of a full row of `length` tokens costs.

        2 (matmul weights of the layers) + 2 V D + sum over layers of 4 H E c,
        c = mean number of visible tokens: (length + 1) / 2, less where a window cuts it

    Matrix products only, of the experts those that a token passes; a backward pass costs twice as
    much again.
    """
    kernels = sum(
        math.prod(row.shape) * _share_at_work(config, row)
        for name, row in flat_weights(weights(config)).items()
        if name.endswith(".kernel")
    )
    head = config.vocab_size * config.embed
    return 2.0 * (kernels + head) + attention_flops_per_token(config, length)


def attention_flops_per_token(config: DecoderConfig, length: int) -> float:
    """Of them those of scores and mixed values: the sum over layers of 4 H E c."""
    windows = config.windows or (None,) * config.layers
    visible = sum(_mean_visible(length, window) for window in windows)
    return 4.0 * config.heads * config.head_dim * visible


def _share_at_work(config: DecoderConfig, row: Weight) -> float:
    """The part of a weight that one token meets."""
    if config.experts is None or "experts" not in row.axes:
        return 1.0
    return config.experts.chosen / config.experts.count


def _mean_visible(length: int, window: int | None) -> float:
    """Mean over positions of min(position + 1, window)."""
    window = length if window is None else min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
