"""Names of a family's tensors in its files <-> ours, fused and split ones among them."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxdistill.models.architecture import DecoderConfig, Weight


class Part(NamedTuple):
    """Which outputs of a fused tensor are one of our weights.

    Ours counts in blocks: output o of ours is output `start + (o // block) * stride + o % block` of
    the file, whose tensor has `total` outputs.
    """

    start: int
    block: int
    stride: int
    total: int

    def runs(self, span: slice) -> Iterator[tuple[slice, slice]]:
        """(place in the span, place in the file) of every unbroken run of a span of ours."""
        here = span.start
        while here < span.stop:
            inside = here % self.block
            size = min(self.block - inside, span.stop - here)
            there = self.start + here // self.block * self.stride + inside
            yield slice(here - span.start, here - span.start + size), slice(there, there + size)
            here += size

    def places(self, size: int) -> np.ndarray:
        """Where all our outputs are in the file."""
        ours = np.arange(size)
        return self.start + ours // self.block * self.stride + ours % self.block


class TensorName(NamedTuple):
    """The file's name of a weight.

    Attributes:
      pattern: with a `{}` for the layer, and one for the expert, where there are several.
      transposed: the file has [out, in].
      fused: "", or how the file's tensor holds several weights: a key of `_PARTS`.
    """

    pattern: str
    transposed: bool = False
    fused: str = ""

    @property
    def stacked(self) -> int:
        """How many of our first dims the file has as tensors of their own."""
        return self.pattern.count("{}")

    def part(self, ours: str, config: DecoderConfig) -> Part | None:
        """What of the file's tensor our weight is; None: all."""
        return _PARTS[self.fused](ours.split(".")[2], config) if self.fused else None


def _side_by_side(name: str, config: DecoderConfig) -> Part:
    """Weights one behind the other."""
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    together = {"query": query, "key": kv, "value": kv}
    if name not in together:
        together = {"gate": config.mlp, "up": config.mlp}
    names = list(together)
    start = sum(together[other] for other in names[: names.index(name)])
    return Part(start, together[name], together[name], sum(together.values()))


def _head_by_head(name: str, config: DecoderConfig) -> Part:
    """Query, key and value of one head, then of the next."""
    size = config.head_dim
    number = ("query", "key", "value").index(name)
    return Part(number * size, size, 3 * size, 3 * size * config.heads)


_PARTS = {"side by side": _side_by_side, "head by head": _head_by_head}

Names = Mapping[str, TensorName]


def file_shape(name: TensorName, row: Weight, part: Part | None) -> tuple[int, ...]:
    """The shape of one tensor in the file."""
    shape = row.shape[name.stacked :]
    if part is not None:
        shape = (*shape[:-1], part.total)
    return shape[::-1] if name.transposed else shape


def file_dims(name: TensorName, row: Weight) -> tuple[int | None, int]:
    """Which of our dims counts the rows of one tensor in the file, and which inside of a row.

    Vectors have no rows.
    """
    first, last = name.stacked, len(row.shape) - 1
    if first == last:
        return None, last
    return (last, first) if name.transposed else (first, last)


def _projections(layer: str, names: Mapping[str, str], transposed: bool = True) -> dict:
    """Kernel and bias of projections; a name behind `|` says how it is fused."""
    table = {}
    for ours, theirs in names.items():
        stem, _, fused = theirs.partition("|")
        for part, ending in {"kernel": "weight", "bias": "bias"}.items():
            turned = transposed and part == "kernel"
            table[f"layers.{ours}.{part}"] = TensorName(f"{layer}{stem}.{ending}", turned, fused)
    return table


def _norms(names: Mapping[str, str]) -> dict:
    return {
        f"{ours}.{part}": TensorName(f"{theirs}.{ending}")
        for ours, theirs in names.items()
        for part, ending in {"scale": "weight", "bias": "bias"}.items()
    }


_LAYER = "model.layers.{}."
_QKV = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
}
_ENDS = {
    "embedding": TensorName("model.embed_tokens.weight"),
    "head": TensorName("lm_head.weight"),
    "final_norm.scale": TensorName("model.norm.weight"),
}
_QK_NORMS = {
    "layers.attention.query_norm.scale": TensorName(_LAYER + "self_attn.q_norm.weight"),
    "layers.attention.key_norm.scale": TensorName(_LAYER + "self_attn.k_norm.weight"),
}
_ATTENTION = _projections(_LAYER, _QKV | {"attention.out": "self_attn.o_proj"}) | _QK_NORMS
_MLP = _projections(
    _LAYER, {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
)


def _scales(names: Mapping[str, str]) -> dict:
    return {
        f"layers.{ours}.scale": TensorName(f"{_LAYER}{theirs}.weight")
        for ours, theirs in names.items()
    }


_BEFORE = _scales({"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"})

LLAMA: Names = {**_ENDS, **_BEFORE, **_ATTENTION, **_MLP}
GEMMA: Names = {
    **_ENDS,
    **_scales(
        {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    ),
    **_ATTENTION,
    **_MLP,
}
OLMO2: Names = {
    **_ENDS,
    **_scales(
        {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    ),
    **_ATTENTION,
    **_MLP,
}
PHI3: Names = {
    **_ENDS,
    **_BEFORE,
    **_projections(
        _LAYER,
        {
            **dict.fromkeys(_QKV, "self_attn.qkv_proj|side by side"),
            "attention.out": "self_attn.o_proj",
            "mlp.gate": "mlp.gate_up_proj|side by side",
            "mlp.up": "mlp.gate_up_proj|side by side",
            "mlp.down": "mlp.down_proj",
        },
    ),
}
GLM4: Names = {
    **_ENDS,
    **_scales(
        {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        }
    ),
    **_ATTENTION,
    **_projections(
        _LAYER,
        {
            "mlp.gate": "mlp.gate_up_proj|side by side",
            "mlp.up": "mlp.gate_up_proj|side by side",
            "mlp.down": "mlp.down_proj",
        },
    ),
}
GPT2: Names = {
    "embedding": TensorName("transformer.wte.weight"),
    "positions": TensorName("transformer.wpe.weight"),
    "head": TensorName("lm_head.weight"),
    **_norms(
        {
            "final_norm": "transformer.ln_f",
            "layers.attention_norm": "transformer.h.{}.ln_1",
            "layers.mlp_norm": "transformer.h.{}.ln_2",
        }
    ),
    **_projections(
        "transformer.h.{}.",
        {
            **dict.fromkeys(_QKV, "attn.c_attn|side by side"),
            "attention.out": "attn.c_proj",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
        transposed=False,  # its Conv1D is [in, out]
    ),
}
GPT_NEOX: Names = {
    "embedding": TensorName("gpt_neox.embed_in.weight"),
    "head": TensorName("embed_out.weight"),
    **_norms(
        {
            "final_norm": "gpt_neox.final_layer_norm",
            "layers.attention_norm": "gpt_neox.layers.{}.input_layernorm",
            "layers.mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
        }
    ),
    **_projections(
        "gpt_neox.layers.{}.",
        {
            **dict.fromkeys(_QKV, "attention.query_key_value|head by head"),
            "attention.out": "attention.dense",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
    ),
}


def _experts(block: str, names: Mapping[str, str]) -> dict:
    """One tensor per expert, and the router, which they call gate."""
    kernels = {
        f"layers.mlp.{ours}.kernel": TensorName(
            f"{_LAYER}{block}experts.{{}}.{theirs}.weight", True
        )
        for ours, theirs in names.items()
    }
    return kernels | {"layers.mlp.router.kernel": TensorName(f"{_LAYER}{block}gate.weight", True)}


MIXTRAL: Names = {
    **_ENDS,
    **_BEFORE,
    **_ATTENTION,
    **_experts("block_sparse_moe.", {"gate": "w1", "up": "w3", "down": "w2"}),
}
QWEN3_MOE: Names = {
    **_ENDS,
    **_BEFORE,
    **_ATTENTION,
    **_experts("mlp.", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}
