"""What a decoder is made of: its configuration, its table of weights, its size and its FLOPs."""

import dataclasses
import math
from typing import NamedTuple

from jaxdistill.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder-only Transformer; hashable, so that it can key a compiled function.

    Attributes:
      family: row of `families.FAMILIES` the model is read from and written to.
      vocab_size: rows of the embedding and of the head, padding rows included.
      embed, mlp, layers, heads, kv_heads, head_dim: D, F, number of layers, H, G, E.
      norm_eps: epsilon of every RMSNorm.
      rope: position embedding.
      attention_bias, attention_out_bias, mlp_bias: which projections add a bias.
      qk_norm: RMSNorm over each query and key head.
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
    rope: Rope = Rope()
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


class Weight(NamedTuple):
    """One row of the table: a weight's shape, the logical axis of each dim, and its first value."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initial: str  # "normal", "ones" or "zeros"


def weights(config: DecoderConfig) -> dict:
    """The nested dict of `Weight` that defines the parameter tree.

    Kernels are [in, out]; those of the layers are stacked on a first dim "layers".
    """
    query_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def linear(inside, outside, axes, bias):
        row = {"kernel": Weight((inside, outside), axes, "normal")}
        if bias:
            row["bias"] = Weight((outside,), axes[1:], "zeros")
        return row

    def norm(size, axis):
        return {"scale": Weight((size,), (axis,), "ones")}

    attention = {
        "query": linear(config.embed, query_dim, ("embed", "heads"), config.attention_bias),
        "key": linear(config.embed, kv_dim, ("embed", "kv_heads"), config.attention_bias),
        "value": linear(config.embed, kv_dim, ("embed", "kv_heads"), config.attention_bias),
        "out": linear(query_dim, config.embed, ("heads", "embed"), config.attention_out_bias),
    }
    if config.qk_norm:
        attention["query_norm"] = norm(config.head_dim, None)
        attention["key_norm"] = norm(config.head_dim, None)
    layer = {
        "attention_norm": norm(config.embed, "embed"),
        "attention": attention,
        "mlp_norm": norm(config.embed, "embed"),
        "mlp": {
            "gate": linear(config.embed, config.mlp, ("embed", "mlp"), config.mlp_bias),
            "up": linear(config.embed, config.mlp, ("embed", "mlp"), config.mlp_bias),
            "down": linear(config.mlp, config.embed, ("mlp", "embed"), config.mlp_bias),
        },
    }
    table = {
        "embedding": Weight((config.vocab_size, config.embed), ("vocab", "embed"), "normal"),
        "layers": map_weights(
            lambda row: Weight((config.layers, *row.shape), ("layers", *row.axes), row.initial),
            layer,
        ),
        "final_norm": norm(config.embed, "embed"),
    }
    if not config.tied_head:
        table["head"] = Weight((config.vocab_size, config.embed), ("vocab", "embed"), "normal")
    return table


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

    Matrix products only; a backward pass costs twice as much again.
    """
    kernels = sum(
        math.prod(row.shape)
        for name, row in flat_weights(weights(config)).items()
        if name.endswith(".kernel")
    )
    windows = config.windows or (None,) * config.layers
    visible = sum(_mean_visible(length, window) for window in windows)
    head = config.vocab_size * config.embed
    return 2.0 * (kernels + head) + 4.0 * config.heads * config.head_dim * visible


def _mean_visible(length: int, window: int | None) -> float:
    """Mean over positions of min(position + 1, window)."""
    window = length if window is None else min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
