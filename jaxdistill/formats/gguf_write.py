"""Writes a model as one GGUF file, which llama.cpp opens: weights, tokenizer, chat template."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdistill import errors, rules
from jaxdistill.errors import ModelError, StorageError
from jaxdistill.formats.gguf import ROPE_FACTORS, gguf_name, interleaved
from jaxdistill.formats.gguf_tokenizer import described
from jaxdistill.formats.huggingface import file_tensors
from jaxdistill.formats.tensor_table import expected_tensors
from jaxdistill.models import rope
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.model import Model
from jaxdistill.models.quantized import QuantizedKernel
from jaxdistill.safe import beside, manifest

# Our family -> the architecture of the file.
WRITTEN = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Types that the package gguf can make of floats; it makes no K-quants.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def save(model: Model, path: str | os.PathLike, kind: str = "F16") -> pathlib.Path:
    """Writes a GGUF file; it appears whole under its name, or not at all.

    Matrices are of the type `kind`, vectors F32, as llama.cpp's converter has them. Rows of the
    embedding behind the tokenizer's tokens are marked as unused.

    Args:
      model: with its tokenizer, unquantised.
      path: ends in .gguf, and does not exist yet.
      kind: one of `TYPES`.

    Raises:
      ModelError: for a model or a tokenizer that the format, or llama.cpp, has no words for.
      StorageError: where the file exists, or cannot be written.
    """
    errors.check(rules.local("the new file", str(path)))
    file = pathlib.Path(path).expanduser().absolute()
    if file.suffix != ".gguf":
        raise StorageError(f"{file}: a GGUF file is to be named NAME.gguf")
    if file.exists():
        raise StorageError(f"{file}: exists already: name a new file")
    if kind not in TYPES:
        raise ModelError(f"gguf_type: {kind} is not one of {', '.join(TYPES)}")
    gguf = _library()
    config = model.config
    _check(model)
    _check_rows(gguf, config, kind)
    with _whole(file) as partial:
        writer = gguf.GGUFWriter(partial, WRITTEN[config.family])
        with contextlib.closing(writer):
            _add_shape(gguf, writer, config)
            _add_tokenizer(gguf, writer, model)
            _write_tensors(gguf, writer, model, kind)
    return file


@contextlib.contextmanager
def _whole(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file to write in a folder beside `file`, whose place it takes once it is on the disk.

    What a killed export of the same file has left is removed, and told.

    Raises:
      StorageError: where it cannot be written.
    """
    try:
        with beside.folder(file) as inside:
            partial = inside / file.name
            yield partial
            manifest.sync(partial)
            os.replace(partial, file)
            manifest.sync(file.parent)
    except OSError as error:
        raise StorageError(
            f"{file}: cannot be written ({error}); nothing was left there"
        ) from error


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ModelError("gguf: is not installed: pip install 'jaxdistill[quickstart]'") from error
    return gguf


def _check(model: Model) -> None:
    """What of a model the file has no words for, or llama.cpp computes in another way."""
    config = model.config
    if config.family not in WRITTEN:
        raise ModelError(
            f"{config.family} models are not written as GGUF here, only {', '.join(WRITTEN)}: "
            "export a folder, and convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    if any(
        isinstance(one, QuantizedKernel) for one in model.params["layers"]["mlp"]["up"].values()
    ):
        raise ModelError("the model is quantised: export the one that it was made from, as GGUF")
    if config.windows is not None:
        raise ModelError(
            f"the model has windows ({max(w for w in config.windows if w)} tokens), which "
            f"llama.cpp leaves out for {WRITTEN[config.family]}: long texts would be others"
        )
    if model.tokenizer is None:
        raise ModelError("the model has no tokenizer, which a GGUF file has to hold")
    scaled = config.rope
    assert scaled is not None, "these families turn their heads"
    plain = rope.Rope(scaled.theta, "llama3", scaled.factor, 8192, 1.0, 4.0)
    bent = scaled.attention_factor, scaled.mscale, scaled.mscale_all_dim
    usual = (scaled.beta_fast, scaled.beta_slow, scaled.truncate) == (32.0, 1.0, True)
    if scaled.kind == "llama3" and scaled != plain:
        raise ModelError("rope: the band of llama3 is not 1 to 4 of 8192 tokens: export a folder")
    if scaled.kind == "yarn" and (any(bent) or not usual):
        raise ModelError("rope: settings of yarn beside factor and length: export a folder")


def _check_rows(gguf: Any, config: DecoderConfig, kind: str) -> None:
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for name, shape in expected_tensors(config).items():
        if len(shape) > 1 and shape[-1] % block:
            raise ModelError(
                f"gguf_type: {kind} packs {block} numbers, and the rows of {name} have "
                f"{shape[-1]}: take F16, BF16 or F32"
            )


def _add_shape(gguf: Any, writer: Any, config: DecoderConfig) -> None:
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.embed)
    writer.add_feed_forward_length(config.mlp)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config.head_dim)
    assert config.rope is not None, "checked"
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope.kind))
        writer.add_rope_scaling_factor(config.rope.factor)
    if config.rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_positions)


def _add_tokenizer(gguf: Any, writer: Any, model: Model) -> None:
    words = described(model.tokenizer, model.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    writer.add_token_merges(words.merges)
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(words.ends)
    tokenizer = model.tokenizer
    own = {"bos": tokenizer.bos_token_id, "unk": tokenizer.unk_token_id}
    for name, token in {**own, "pad": tokenizer.pad_token_id}.items():
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    stops = list(dict.fromkeys(model.config.eos_ids)) or [tokenizer.eos_token_id]
    names = ("eos", "eot", "eom")
    if len(stops) > len(names):
        raise ModelError(f"the model has {len(stops)} tokens that end a text: GGUF has 3 at most")
    for name, token in zip(names, stops, strict=False):
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _write_tensors(gguf: Any, writer: Any, model: Model, kind: str) -> None:
    """First what tensors there are, then each of them, one at a time."""
    config = model.config
    types = gguf.GGMLQuantizationType
    factors = {}
    if config.rope is not None and config.rope.kind == "llama3":
        plain, _ = rope.frequencies(rope.Rope(theta=config.rope.theta), config.head_dim)
        scaled, _ = rope.frequencies(config.rope, config.head_dim)
        factors[ROPE_FACTORS] = plain / scaled
        shape = factors[ROPE_FACTORS].shape
        writer.add_tensor_info(ROPE_FACTORS, shape, np.dtype(np.float32), 4 * shape[0])
    for name, shape in expected_tensors(config).items():
        if len(shape) == 1 or kind in ("F32", "F16"):
            dtype = np.dtype(np.float16 if kind == "F16" and len(shape) > 1 else np.float32)
            size = int(np.prod(shape)) * dtype.itemsize
            writer.add_tensor_info(gguf_name(name), shape, dtype, size)
        else:
            packed = gguf.quants.quant_shape_to_byte_shape(shape, types[kind])
            size = int(np.prod(packed))
            writer.add_tensor_info(gguf_name(name), packed, np.dtype(np.uint8), size, types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in factors.values():
        writer.write_tensor_data(values)
    for values in _laid_out(model):
        if values.ndim > 1 and kind == "F16":
            values = values.astype(np.float16)
        elif values.ndim > 1 and kind != "F32":
            values = gguf.quants.quantize(values, types[kind])
        writer.write_tensor_data(values)


def _laid_out(model: Model) -> Iterator[np.ndarray]:
    """Every tensor in float32, queries and keys of the architecture llama pair by pair."""
    config = model.config
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}
    named = zip(expected_tensors(config), file_tensors(model, np.dtype(np.float32)), strict=True)
    for name, values in named:
        stem = name.split(".")[-2]
        if WRITTEN[config.family] == "llama" and stem in heads:
            turned = np.empty_like(values)
            rows = np.arange(len(values))
            turned[interleaved(rows, len(values) // heads[stem])] = values
            values = turned
        yield np.ascontiguousarray(values)
