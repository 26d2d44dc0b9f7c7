"""Writes GGUF files of tiny models, and decodes quantised blocks value by value."""

import numpy as np

from tests.models import oracle

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, *module, suffix = name.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(module)]}.{suffix}"


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of Llama's queries and keys."""
    shape = values.shape
    split = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return split.swapaxes(1, 2).reshape(shape)


def _words(size: int) -> dict:
    """Tokenizer metadata: three control tokens, then single letters of byte-level BPE."""
    merged = ['!"', "#$"]
    tokens = ["<unk>", "<s>", "</s>", *(chr(0x21 + i) for i in range(size - 5)), *merged]
    return {"tokens": tokens, "kinds": [3, 3, 3] + [1] * (size - 3)}


def write(path, raw: dict, kind: str = "F32", *, named=None, extra=None, rope_factors=None):
    """A GGUF file of the oracle's model; matrices in the quantisation `kind`."""
    import gguf

    named = oracle.tensors(raw) if named is None else named
    architecture = {"mistral": "llama"}.get(raw["model_type"], raw["model_type"])
    writer = gguf.GGUFWriter(path, architecture)
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(raw.get("rope_theta", 10000.0))
    writer.add_vocab_size(raw["vocab_size"])
    size = raw.get("head_dim") or raw["hidden_size"] // heads
    writer.add_rope_dimension_count(size)
    if raw.get("head_dim"):
        writer.add_key_length(size)
        writer.add_value_length(size)
    if raw["model_type"] == "mistral":
        writer.add_sliding_window(raw["sliding_window"])
    for add, values in (extra or {}).items():
        getattr(writer, add)(*values)
    words = _words(raw["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words["tokens"])
    writer.add_token_types(words["kinds"])
    writer.add_token_merges(['! "', "# $"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, np.float32))
    for name, values in named.items():
        if architecture == "llama" and ".q_proj." in name:
            values = interleave(values, heads)
        if architecture == "llama" and ".k_proj." in name:
            values = interleave(values, kv_heads)
        if kind == "F32" or values.ndim == 1:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
        else:
            type_ = gguf.GGMLQuantizationType[kind]
            packed = gguf.quants.quantize(np.ascontiguousarray(values), type_)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _half(block, start):
    return float(np.frombuffer(bytes(block[start : start + 2]), np.float16)[0])


def _k_scale(scales, j):
    """The j-th six-bit scale and minimum of a K block's twelve bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    high = scales[j + 4]
    return (high & 15) | ((scales[j - 4] >> 6) << 4), (high >> 4) | ((scales[j] >> 6) << 4)


def decode(kind: str, block: np.ndarray) -> list[float]:
    """The values of one block, from the layout that ggml documents."""
    block = [int(byte) for byte in block]
    signed = lambda byte: byte - 256 if byte > 127 else byte
    if kind == "Q8_0":
        return [_half(block, 0) * signed(byte) for byte in block[2:]]
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        five, offset = kind.startswith("Q5"), kind.endswith("1")
        scale, low = _half(block, 0), _half(block, 2) if offset else 0.0
        start = 4 if offset else 2
        high = int.from_bytes(bytes(block[start : start + 4]), "little") if five else 0
        nibbles = block[start + (4 if five else 0) :]
        levels = [byte & 15 for byte in nibbles] + [byte >> 4 for byte in nibbles]
        levels = [level + ((high >> i) & 1) * 16 for i, level in enumerate(levels)]
        middle = 0 if offset else 16 if five else 8
        return [scale * (level - middle) + low for level in levels]
    if kind in ("Q4_K", "Q5_K"):
        scale, low, values = _half(block, 0), _half(block, 2), []
        high = block[16:48] if kind == "Q5_K" else [0] * 32
        packed = block[48:] if kind == "Q5_K" else block[16:]
        for group in range(8):
            step, minimum = _k_scale(block[4:16], group)
            for i in range(32):
                byte = packed[group // 2 * 32 + i]
                level = (byte >> 4 if group % 2 else byte & 15) + ((high[i] >> group) & 1) * 16
                values.append(scale * step * level - low * minimum)
        return values
    assert kind == "Q6_K"
    low, high, scales = block[:128], block[128:192], block[192:208]
    scale, values = _half(block, 208), [0.0] * 256
    for half in range(2):
        for i in range(32):
            for quarter in range(4):
                byte = low[half * 64 + (quarter % 2) * 32 + i]
                level = byte >> 4 if quarter > 1 else byte & 15
                level |= ((high[half * 32 + i] >> (2 * quarter)) & 3) << 4
                step = signed(scales[half * 8 + quarter * 2 + i // 16])
                values[half * 128 + quarter * 32 + i] = scale * step * (level - 32)
    return values


# Bytes per block and where its float16 numbers lie.
BLOCKS = {
    "Q8_0": (34, (0,)),
    "Q4_0": (18, (0,)),
    "Q4_1": (20, (0, 2)),
    "Q5_0": (22, (0,)),
    "Q5_1": (24, (0, 2)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
}


def random_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Valid random blocks, uint8 [count, bytes]: any bytes, with float16 numbers near 1."""
    rng = np.random.default_rng(seed)
    size, halves = BLOCKS[kind]
    blocks = rng.integers(0, 256, (count, size)).astype(np.uint8)
    for start in halves:
        numbers = (rng.standard_normal(count) * 0.1).astype(np.float16)
        blocks[:, start : start + 2] = numbers.view(np.uint8).reshape(count, 2)
    return blocks
