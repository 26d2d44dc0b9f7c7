"""Writes a model as one GGUF file, which llama.cpp opens: weights, tokenizer, chat template."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxdistill import errors, rules
from jaxdistill.errors import ModelError, StorageError
from jaxdistill.formats.config_json import write_config
from jaxdistill.formats.families import FAMILIES
from jaxdistill.formats.gguf_config import ROPE_FACTORS, Description
from jaxdistill.formats.gguf_layout import (
    LAYOUTS,
    file_shapes,
    interleaved,
    name_of,
    part_by_part,
    settings_of,
    stacked,
    turned_over,
)
from jaxdistill.formats.gguf_tokenizer_write import Described, described
from jaxdistill.formats.huggingface import file_tensors
from jaxdistill.formats.tensor_table import expected_tensors
from jaxdistill.models import rope
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.kernel import is_kernel
from jaxdistill.models.model import Model
from jaxdistill.safe import beside, manifest

ARCHITECTURE = "general.architecture"
# Of these llama.cpp computes every layer over the whole context, whatever a file says.
_WITHOUT_WINDOWS = ("llama", "qwen2", "qwen3", "qwen3moe")
_ADD: Mapping[type, Callable[[Any, str, Any], None]] = {
    int: lambda writer, key, value: writer.add_uint32(key, value),
    float: lambda writer, key, value: writer.add_float32(key, value),
    bool: lambda writer, key, value: writer.add_bool(key, value),
    str: lambda writer, key, value: writer.add_string(key, value),
}
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
      ModelError: for a model or a tokenizer that the format, or llama.cpp, has no words for, before
        anything is written.
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
    _check(model)
    _check_rows(gguf, model.config, kind)
    factors = _rope_factors(model.config)
    metadata = {**_shape(model.config), **_ends(model)}
    _check_words(model.config, metadata, factors)
    words = described(model.tokenizer, model.config.vocab_size)
    with _whole(file) as partial:
        writer = gguf.GGUFWriter(partial, LAYOUTS[model.config.family].architecture)
        with contextlib.closing(writer):
            for key, value in metadata.items():
                if key != ARCHITECTURE:
                    _ADD[type(value)](writer, key, value)
            _add_tokenizer(writer, words, model.tokenizer.chat_template)
            _write_tensors(gguf, writer, model, kind, factors)
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
    if config.family not in LAYOUTS:
        raise ModelError(
            f"{config.family} models are not written as GGUF here, only {', '.join(LAYOUTS)}: "
            "export a folder, and convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    leaves = jax.tree.leaves(model.params, is_leaf=is_kernel)
    if any(is_kernel(leaf) for leaf in leaves):
        raise ModelError("the model is quantised: export the one that it was made from, as GGUF")
    if LAYOUTS[config.family].architecture in _WITHOUT_WINDOWS and config.windows is not None:
        raise ModelError(
            f"the model has windows ({max(w for w in config.windows if w)} tokens), which "
            f"llama.cpp leaves out for {config.family}: long texts would be others"
        )
    if model.tokenizer is None:
        raise ModelError("the model has no tokenizer, which a GGUF file has to hold")
    scaled = config.rope
    if scaled is None:
        return
    plain = rope.Rope(scaled.theta, "llama3", scaled.factor, 8192, 1.0, 4.0)
    bent = scaled.attention_factor, scaled.mscale, scaled.mscale_all_dim
    usual = (scaled.beta_fast, scaled.beta_slow, scaled.truncate) == (32.0, 1.0, True)
    if scaled.kind == "llama3" and scaled != plain:
        raise ModelError("rope: the band of llama3 is not 1 to 4 of 8192 tokens: export a folder")
    if scaled.kind == "yarn" and (any(bent) or not usual):
        raise ModelError("rope: settings of yarn beside factor and length: export a folder")


def _check_words(
    config: DecoderConfig, metadata: Mapping[str, Any], factors: np.ndarray | None
) -> None:
    """The file would be read as the model that it was written from."""
    shapes = file_shapes(config)
    back = Description(metadata, shapes, factors, "the GGUF file").config()
    # The architecture llama has three families; ids are the tokenizer's, where the model has none.
    told = ("family", "initializer_range", "bos_id", "eos_ids", "pad_id")
    back = dataclasses.replace(back, **{name: getattr(config, name) for name in told})
    for field in dataclasses.fields(config):
        wanted, got = (_single(getattr(one, field.name)) for one in (config, back))
        if wanted != got:
            raise ModelError(
                f"{field.name}: {wanted!r} has no words in a GGUF file of {config.family}, where "
                f"llama.cpp computes with {got!r}: export a folder"
            )


def _single(value: Any) -> Any:
    """A value of a configuration as a file holds it: numbers in float32."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _single(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    return float(np.float32(value)) if isinstance(value, float) else value


def _check_rows(gguf: Any, config: DecoderConfig, kind: str) -> None:
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for name, shape in expected_tensors(config).items():
        if len(shape) > 1 and shape[-1] % block:
            raise ModelError(
                f"gguf_type: {kind} packs {block} numbers, and the rows of {name} have "
                f"{shape[-1]}: take F16, BF16 or F32"
            )


def _shape(config: DecoderConfig) -> dict[str, Any]:
    """The metadata of a configuration, by key."""
    settings = settings_of(config.family, write_config(config, "float32"))
    settings["vocab_size"] = config.vocab_size
    if "head_dim" not in FAMILIES[config.family].absent:
        settings |= dict.fromkeys(
            ("attention.key_length", "attention.value_length"), config.head_dim
        )
    if config.rope is not None:
        settings |= _turns(config.rope, config.head_dim)
    architecture = LAYOUTS[config.family].architecture
    return {ARCHITECTURE: architecture, **{f"{architecture}.{k}": v for k, v in settings.items()}}


def _turns(settings: rope.Rope, head_dim: int) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope.dimension_count": settings.dims(head_dim)}
    keys["rope.freq_base"] = settings.theta
    if settings.kind in ("linear", "yarn"):
        keys["rope.scaling.type"] = settings.kind
        keys["rope.scaling.factor"] = settings.factor
    if settings.kind == "yarn":
        keys["rope.scaling.original_context_length"] = settings.original_max_positions
    return keys


def _ends(model: Model) -> dict[str, Any]:
    """The metadata of the ids that begin, end and fill a text."""
    tokenizer, config = model.tokenizer, model.config
    stops = list(dict.fromkeys(config.eos_ids)) or [tokenizer.eos_token_id]
    names = ("eos", "eot", "eom")
    if len(stops) > len(names):
        raise ModelError(f"the model has {len(stops)} tokens that end a text: GGUF has 3 at most")
    ids = {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id}
    ids |= {"padding": tokenizer.pad_token_id, **dict(zip(names, stops, strict=False))}
    return {
        f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items() if token is not None
    }


def _add_tokenizer(writer: Any, words: Described, template: Any) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    writer.add_tokenizer_pre(words.pre)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.space)
    else:
        writer.add_token_merges(words.merges)
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(words.ends)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _rope_factors(config: DecoderConfig) -> np.ndarray | None:
    """What Llama 3.1 divides its frequencies by."""
    if config.rope is None or config.rope.kind != "llama3":
        return None
    plain, _ = rope.frequencies(rope.Rope(theta=config.rope.theta), config.head_dim)
    scaled, _ = rope.frequencies(config.rope, config.head_dim)
    return plain / scaled


def _write_tensors(
    gguf: Any, writer: Any, model: Model, kind: str, factors: np.ndarray | None
) -> None:
    """First what tensors there are, then each of them, one at a time."""
    types = gguf.GGMLQuantizationType
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for name, shape in file_shapes(model.config).items():
        held = _kind_of(name, shape, kind)
        if held in ("F32", "F16"):
            dtype = np.dtype(np.float16 if held == "F16" else np.float32)
            size = int(np.prod(shape)) * dtype.itemsize
            writer.add_tensor_info(name, shape, dtype, size)
        else:
            packed = gguf.quants.quant_shape_to_byte_shape(shape, types[held])
            size = int(np.prod(packed))
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), size, types[held])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, values in _laid_out(model):
        held = _kind_of(name, values.shape, kind)
        if held == "F16":
            values = values.astype(np.float16)
        elif held != "F32":
            values = gguf.quants.quantize(values, types[held])
        writer.write_tensor_data(values)


def _kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of a tensor: vectors and routers stay F32, as llama.cpp's converter has them."""
    return "F32" if len(shape) == 1 or "ffn_gate_inp" in name else kind


def _laid_out(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file in float32 under its name there, in the order of `file_shapes`."""
    config, layout = model.config, LAYOUTS[model.config.family]
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}
    named = zip(
        map(stacked, expected_tensors(config)),
        file_tensors(model, np.dtype(np.float32)),
        strict=True,
    )
    for name, parts in itertools.groupby(named, lambda one: one[0][0]):
        stem = name.split(".")[-2]
        each = list(parts)
        values = each[0][1]
        if each[0][0][1] is not None:  # experts of one layer
            values = np.stack([one for _, one in each])
        rows = np.arange(len(values))
        if layout.pairs and stem in heads:
            values = _moved(values, interleaved(rows, len(values) // heads[stem]))
        if layout.by_part and stem == "query_key_value":
            values = _moved(values, part_by_part(rows, config.heads, config.head_dim))
        if turned_over(layout, name, values.shape):
            values = values.T
        if layout.offset_norms and stem.endswith("norm"):
            values = values + np.float32(1.0)
        yield name_of(layout, config.layers, name), np.ascontiguousarray(values)


def _moved(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Row i at places[i]."""
    moved = np.empty_like(values)
    moved[places] = values
    return moved
