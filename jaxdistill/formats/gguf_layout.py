"""How llama.cpp's architectures hold the models of our families: one row each, read both ways."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.errors import ModelError
from jaxdistill.formats.families import FAMILIES
from jaxdistill.formats.tensor_table import expected_tensors
from jaxdistill.models.architecture import DecoderConfig


class GgufLayout(NamedTuple):
    """What of one family is otherwise in a GGUF file than in a folder.

    Attributes:
      architecture: of the file.
      pairs: rows of queries and keys stand pair by pair, as llama.cpp turns them.
      offset_norms: norms hold 1 + scale.
      partial: `rope.dimension_count` says how many dims of a head turn; else all do.
      transposed: kernels of layers are [in, out] in the folder, and [out, in] here as everywhere.
      by_part: a tensor of queries, keys and values, head by head in the folder, has all heads'
        queries first here.
      epsilon: key of the norms' epsilon.
      settings: words of config.json -> keys of the file behind the architecture's name, beyond
        `COMMON`.
      fixed: words of config.json -> values that llama.cpp computes with whatever a file says.
      special: layers of the one model whose scores are divided by sqrt(embed / heads).
    """

    architecture: str
    pairs: bool = False
    offset_norms: bool = False
    partial: bool = False
    transposed: bool = False
    by_part: bool = False
    epsilon: str = "attention.layer_norm_rms_epsilon"
    settings: Mapping[str, str] = {}
    fixed: Mapping[str, Any] = {}
    special: int | None = None


COMMON: Mapping[str, str] = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}
_WINDOW = {"sliding_window": "attention.sliding_window"}
_ROUTED = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# What llama.cpp has no key for is found by reading back what would be written.
LAYOUTS: Mapping[str, GgufLayout] = {
    "llama": GgufLayout("llama", pairs=True),
    "mistral": GgufLayout("llama", pairs=True, settings=_WINDOW),
    "mixtral": GgufLayout("llama", pairs=True, settings=_ROUTED),
    "qwen2": GgufLayout("qwen2"),
    "qwen3": GgufLayout("qwen3"),
    "qwen3_moe": GgufLayout(
        "qwen3moe",
        settings={**_ROUTED, "intermediate_size": "expert_feed_forward_length"},
        fixed={"norm_topk_prob": True},
    ),
    "gemma": GgufLayout("gemma", offset_norms=True),
    "gemma2": GgufLayout(
        "gemma2",
        offset_norms=True,
        settings={**_WINDOW, **_CAPS},
        fixed={"sliding_window_pattern": 2},
        special=46,
    ),
    "gemma3_text": GgufLayout(
        "gemma3",
        offset_norms=True,
        settings=_WINDOW,
        fixed={"sliding_window_pattern": 6, "rope_local_base_freq": 10_000.0},
        special=62,
    ),
    "olmo2": GgufLayout("olmo2"),
    "olmo3": GgufLayout("olmo2", settings=_WINDOW, fixed={"sliding_window_pattern": 4}),
    "smollm3": GgufLayout("smollm3", pairs=True, fixed={"no_rope_layer_interval": 4}),
    "granite": GgufLayout("granite", pairs=True, settings=_SCALES),
    "arcee": GgufLayout("arcee", pairs=True),
    "glm4": GgufLayout("glm4", partial=True),
    "phi3": GgufLayout("phi3", partial=True),
    "gpt2": GgufLayout("gpt2", transposed=True, epsilon="attention.layer_norm_epsilon"),
    "gpt_neox": GgufLayout(
        "gptneox",
        partial=True,
        by_part=True,
        epsilon="attention.layer_norm_epsilon",
        settings={"use_parallel_residual": "use_parallel_residual"},
    ),
}
# Settings that change what a model computes, wherever they stand -> the word that may fix them.
MATTERS: Mapping[str, str] = {
    "attention.scale": "attention_multiplier",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "embedding_scale": "embedding_multiplier",
    "expert_count": "num_experts",
    "expert_shared_count": "num_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logits_scaling",
    "residual_scale": "residual_multiplier",
    "rope.freq_base_swa": "rope_local_base_freq",
}
ARCHITECTURES = tuple(dict.fromkeys(layout.architecture for layout in LAYOUTS.values()))


def family_of(architecture: str, window: Any, experts: Any) -> str:
    """Our family of a file: three of them share the architecture llama, and two olmo2."""
    if architecture == "olmo2":
        return "olmo3" if window else "olmo2"
    if architecture == "llama":
        return "mixtral" if experts else "mistral" if window else "llama"
    return next(name for name, row in LAYOUTS.items() if row.architecture == architecture)


def words_of(family: str, setting: Any) -> dict[str, Any]:
    """Words of config.json, in the family's own spelling, that settings of a file stand for.

    Args:
      family: ours.
      setting: gives the value of a key behind the architecture's name, or None.
    """
    layout, row = LAYOUTS[family], FAMILIES[family]
    words = {row.field(word): setting(key) for word, key in _keys(family).items()}
    words |= {row.field(word): value for word, value in layout.fixed.items()}
    if layout.special is not None:
        words["query_pre_attn_scalar"] = _scalar(layout, setting)
    return words


def _keys(family: str) -> dict[str, str]:
    layout, absent = LAYOUTS[family], FAMILIES[family].absent
    keys = {**COMMON, "rms_norm_eps": layout.epsilon, **layout.settings}
    return {word: key for word, key in keys.items() if word not in absent}


def _scalar(layout: GgufLayout, setting: Any) -> Any:
    embed, heads = setting("embedding_length"), setting("attention.head_count")
    if setting("block_count") == layout.special and embed and heads:
        return embed // heads
    return setting("attention.key_length")


def settings_of(family: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a file behind the architecture's name -> values, of a written configuration."""
    row = FAMILIES[family]
    settings = {key: words.get(row.field(word)) for word, key in _keys(family).items()}
    # Nobody reads the width of an MLP that there is not, and llama.cpp wants it.
    settings.setdefault("feed_forward_length", settings.get("expert_feed_forward_length"))
    return {key: value for key, value in settings.items() if value is not None}


def name_of(layout: GgufLayout, layers: int, name: str) -> str:
    """llama.cpp's name of a folder's tensor, experts of a layer under one; by its own table.

    Raises:
      ModelError: for a tensor that the architecture has none for.
    """
    stem, _, suffix = name.rpartition(".")
    stem_there = _table(layout.architecture, layers).get_name(stem)
    if stem_there is None:
        raise ModelError(f"{name}: the architecture {layout.architecture} has no name for it")
    return f"{stem_there}.{suffix}"


@functools.lru_cache(maxsize=4)
def _table(architecture: str, layers: int) -> Any:
    import gguf

    kinds = {value: kind for kind, value in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], layers)


def file_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a file of this model with its shape; experts of a layer stand in one.

    Raises:
      ModelError: for a tensor that the architecture has no name for.
    """
    layout, shapes = LAYOUTS[config.family], {}
    for name, shape in expected_tensors(config).items():
        name, expert = stacked(name)
        if expert is not None:
            assert config.experts is not None, name
            shape = (config.experts.count, *shape)
        if turned_over(layout, name, shape):
            shape = shape[::-1]
        shapes[name_of(layout, config.layers, name)] = shape
    return shapes


def turned_over(layout: GgufLayout, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a folder's tensor is a kernel whose dims stand the other way round in the file."""
    return layout.transposed and len(shape) == 2 and any(part.isdigit() for part in name.split("."))


def stacked(name: str) -> tuple[str, int | None]:
    """(name without the expert's number, that number or None) of a folder's tensor."""
    head, found, tail = name.partition(".experts.")
    if not found:
        return name, None
    number, _, rest = tail.partition(".")
    return f"{head}.experts.{rest}", int(number)


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where llama.cpp keeps these rows: it stores the two halves of each head pair by pair."""
    head, place = rows // head_dim, rows % head_dim
    half, pair = place // (head_dim // 2), place % (head_dim // 2)
    return head * head_dim + pair * 2 + half


def part_by_part(rows: np.ndarray, heads: int, head_dim: int) -> np.ndarray:
    """Where the file keeps these rows of queries, keys and values: all heads' queries first."""
    head, inside = rows // (3 * head_dim), rows % (3 * head_dim)
    part, place = inside // head_dim, inside % head_dim
    return (part * heads + head) * head_dim + place
