"""Loads and saves Hugging Face folders: configuration, safetensors, tokenizer."""

import functools
import json
import pathlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxdistill.errors import ConfigError, ModelError
from jaxdistill.formats import (
    compressed,
    compressed_settings,
    exchange,
    new_folder,
    shards,
    sums,
)
from jaxdistill.formats.assemble import assemble
from jaxdistill.formats.config_json import read_config, unwrapped, write_config
from jaxdistill.formats.config_json_fields import shown
from jaxdistill.formats.families import TEXT_MODEL, WRAPPERS
from jaxdistill.formats.tensor_table import (
    HARMLESS_TENSORS,
    expected_tensors,
    file_rows,
    head_name,
    numbers,
    root_name,
    tensor_rows,
)
from jaxdistill.formats.tokenizer_files import folder_tokenizer
from jaxdistill.model_folder import check_folder, read_json
from jaxdistill.models import host
from jaxdistill.models.architecture import DecoderConfig, flat_weights, weights
from jaxdistill.models.model import Model
from jaxdistill.models.quantized import Quantization, QuantizedKernel
from jaxdistill.sharding import RULES

SHARD_BYTES = 4_000_000_000
_DTYPE_NAMES = ("float32", "bfloat16", "float16")
_GENERATION_FILE = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "max_new_tokens",
)  # fmt: skip


def load_folder(
    folder: pathlib.Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Mapping = RULES,
    tokenizer: bool = True,
    rounded: Quantization | None = None,
    offload: bool = False,
) -> Model:
    """The model of a local folder; every process reads only as much of the files as it needs.

    What shall be `rounded` is so as it is read, or was before; with `offload` the
    layers wait in the memory of the devices' host.

    Raises:
      ConfigError: if groups do not divide, or its files hold other numbers.
      ModelError: for a missing or damaged file, tensors that do not fit the configuration, pickled
        weights, or a feature that this decoder does not build.
      DamagedError: if a folder of our own is not as it was written.
    """
    config, own, opened = exchange.together(mesh, lambda: _opened(folder, mesh, rounded))
    options = {"dtype": dtype, "mesh": mesh, "rules": rules}
    with opened as files:
        if own is None:
            params = assemble(config, files, rounded=rounded, offload=offload, **options)
        else:
            params = compressed.load_params(config, files, own, **options)
            params = host.waiting(params) if offload else params
    jax.block_until_ready(params)
    loaded = folder_tokenizer(folder) if tokenizer else None
    return Model(config, params, loaded, str(folder), folder_generation(folder))


def _opened(
    folder: pathlib.Path, mesh: Mesh | None, rounded: Quantization | None
) -> tuple[DecoderConfig, Quantization | None, shards.Folder]:
    """The configuration of a folder, how it is quantised, and its tensors, all of them checked."""
    check_folder(folder)
    sums.check(folder, weights=True, shared=mesh is not None)
    config, own = folder_config(folder), folder_rounded(folder)
    if own is not None:
        if rounded is not None and rounded.table(config) != own.table(config):
            raise ConfigError(f"{folder}: is quantised already: use the model it was")
        files = compressed.open_folder(folder)
        compressed.check_tensors(config, files, own)
        return config, own, files
    kind = read_json(folder / "config.json").get("model_type")
    inside = TEXT_MODEL if kind in WRAPPERS else {}
    files = shards.Folder(folder, root=root_name(config), inside=inside)
    _check_tensors(config, files)
    return config, None, files


def folder_config(folder: pathlib.Path) -> DecoderConfig:
    """The configuration of a local folder; generation_config.json has the last word on eos."""
    check_folder(folder)
    sums.check(folder, weights=False)
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{path}: missing; a model folder needs it: download the whole model")
    raw = read_json(path)
    if compressed_settings.read_settings(raw.get("quantization_config"), str(path)):
        raw["quantization_config"] = None  # what the kernels are says `folder_rounded`
    return read_config({**unwrapped(raw, str(path)), **_generation_file(folder, _IDS)}, str(path))


def folder_generation(folder: pathlib.Path) -> dict[str, Any]:
    """How the publisher draws from a local folder's model, as generation_config.json says it.

    Raises:
      ModelError: for a setting that is neither a number nor true or false.
    """
    generation = _generation_file(folder, GENERATION)
    for name, value in generation.items():
        if not isinstance(value, int | float):
            raise ModelError(
                f"{folder / _GENERATION_FILE}: {name}: {shown(value)} must be a number, true or "
                "false: correct it, or remove the field"
            )
    return generation


def _generation_file(folder: pathlib.Path, fields: Sequence[str]) -> dict[str, Any]:
    """What generation_config.json says of some fields; {} without the file."""
    path = folder / _GENERATION_FILE
    extra = read_json(path) if path.is_file() else {}
    return {key: extra[key] for key in fields if extra.get(key) is not None}


def folder_rounded(folder: pathlib.Path) -> Quantization | None:
    """How the kernels of a local folder are quantised; None where they are not.

    Raises:
      ModelError: for a form that is not read here.
    """
    path = folder / "config.json"
    raw = read_json(path).get("quantization_config")
    settings = compressed_settings.read_settings(raw, str(path))
    return None if settings is None else settings.of(folder_config(folder))


def _check_tensors(config: DecoderConfig, files: shards.Folder) -> None:
    """Every tensor the configuration asks for is there with its shape, and no other."""
    expected, head = expected_tensors(config), head_name(config)
    missing = [name for name in expected if name not in files.entries]
    unknown = [
        name
        for name in files.entries
        if name not in expected
        and not HARMLESS_TENSORS.match(name)
        and not (config.tied_head and name == head)
    ]
    where = f"{files.folder}: the tensors do not fit config.json"
    if missing:
        shown_names = ", ".join(missing[:5])
        hint = _prefix_hint(missing, files)
        raise ModelError(f"{where}: {len(missing)} missing, such as {shown_names}{hint}")
    if unknown:
        raise ModelError(
            f"{where}: {len(unknown)} that a {config.family} model of {config.layers} layers does "
            f"not have, such as {', '.join(unknown[:5])}"
        )
    for name, shape in expected.items():
        if files.entries[name].shape != shape:
            raise ModelError(
                f"{where}: {name} has shape {list(files.entries[name].shape)}, expected "
                f"{list(shape)}"
            )
    if config.tied_head and head in files.entries:
        _check_tied(files, head, tensor_rows(config)["embedding"][0].pattern)


def _prefix_hint(missing: Sequence[str], files: shards.Folder) -> str:
    """Where all that is missing is there under a prefix: whose it is, and how it goes away."""
    there = {entry.name for entry in files.entries.values()}
    ends = [name for name in there if name.endswith(missing[0])]
    for prefix in (name.removesuffix(missing[0]) for name in ends):
        if all(prefix + name in there for name in missing):
            maker = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel"}
            by = f", which {maker[prefix]} puts there" if prefix in maker else ""
            return (
                f". All of them are there under names that begin with {prefix!r}{by}: save the "
                "state of the model inside, or rename the tensors without it"
            )
    return ""


def _check_tied(files: shards.Folder, head: str, table: str) -> None:
    """A head stored beside a tied embedding must be the embedding."""
    rows = files.entries[table].shape[0]
    same = files.entries[head].shape == files.entries[table].shape
    for start in range(0, rows if same else 0, 4096):
        index = (slice(start, min(start + 4096, rows)), slice(None))
        same = same and np.array_equal(files.read(head, index), files.read(table, index))
    if not same:
        raise ModelError(
            f"{files.folder}: config.json says tie_word_embeddings: true, but {head} differs from "
            f"{table}; set tie_word_embeddings to false to use the head"
        )


def save(
    model: Model,
    path: str | pathlib.Path,
    dtype: DTypeLike | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    notes: Mapping[str, str] = types.MappingProxyType({}),
) -> pathlib.Path:
    """Writes a folder that transformers opens; it appears whole under its name, or not at all.

    Args:
      model: what to write; its tokenizer is written where it has one.
      path: a folder that does not exist yet, or is empty.
      dtype: float32, bfloat16 or float16; None keeps the parameters' own.
      shard_bytes: largest size of one safetensors file.
      notes: name -> text of small files that belong to it.

    Returns:
      The folder.

    Raises:
      StorageError: where the folder exists with content, or cannot be written.
      ModelError: where the family cannot express the configuration, or the dtype is another.
    """
    out = np.dtype(model.params["embedding"].dtype if dtype is None else dtype)
    if out.name not in _DTYPE_NAMES:
        raise ModelError(f"dtype: {out.name} is not one of {', '.join(_DTYPE_NAMES)}")
    config = write_config(model.config, out.name)
    flat = _flat(model.params)
    quantized = any(isinstance(leaf, QuantizedKernel) for leaf in flat.values())
    folder = new_folder.place(path)
    if quantized:
        compressed_settings.check_names(model.config)
        config["quantization_config"] = compressed_settings.write_settings(model.config, flat)
        named = dict(compressed.file_tensors(model.config, flat, out))
        sizes = {name: value.nbytes for name, value in named.items()}
        tensors = iter(named.values())
    else:
        sizes = {
            name: int(np.prod(shape)) * out.itemsize
            for name, shape in expected_tensors(model.config).items()
        }
        tensors = file_tensors(model, out)
    if jax.process_index() != 0:  # the others only take part in gathering
        for _ in tensors:
            pass
        return folder
    with new_folder.filled(folder) as inside:
        _write_json(inside / "config.json", config)
        _write_json(inside / _GENERATION_FILE, described_generation(config, model.generation))
        shards.write(inside, sizes, tensors, shard_bytes)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(str(inside))
        for name, text in notes.items():
            (inside / name).write_text(text, encoding="utf-8")
    return folder


def file_tensors(model: Model, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Every tensor as its file wants it, in the order of `expected_tensors`, one at a time."""
    flat = _flat(model.params)
    table = flat_weights(weights(model.config))
    assert flat.keys() == table.keys(), "parameters fit the config"
    for ours, row in table.items():
        assert flat[ours].shape == row.shape, f"{ours}: {flat[ours].shape}, expected {row.shape}"
    for rows in file_rows(model.config).values():
        name, row = next(iter(rows.values()))
        for index in numbers(name, row):
            values = _fused(model.config, rows, flat, index)
            yield (values.T if name.transposed else values).astype(dtype)


def _fused(
    config: DecoderConfig, rows: Mapping, flat: Mapping, index: tuple[int, ...]
) -> np.ndarray:
    """One tensor of the file, outputs last: a weight, or several that share it."""
    values = {ours: _on_host(flat[ours], index) for ours in rows}
    parts = {ours: name.part(ours, config) for ours, (name, _) in rows.items()}
    if len(rows) == 1:
        return values.popitem()[1]
    ours, first = next(iter(values.items()))
    whole = np.empty((*first.shape[:-1], parts[ours].total), first.dtype)
    for ours, part in parts.items():
        whole[..., part.places(values[ours].shape[-1])] = values[ours]
    return whole


def _on_host(leaf: jax.Array | np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    """A weight, or one layer or expert of it, in this host's memory, wherever the weight lies."""
    if isinstance(leaf, np.ndarray):
        return leaf[index]
    place = leaf.sharding
    whole = (
        NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
    )
    if not index:
        return np.asarray(jax.device_put(leaf, whole))
    return np.asarray(jax.jit(_at, out_shardings=whole)(leaf, index))


def _at(leaf: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    return functools.reduce(
        lambda part, number: jax.lax.dynamic_index_in_dim(part, number, 0, False), index, leaf
    )


def _flat(params: Mapping, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in params.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def described_generation(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says: ids that start, pad and stop a text, and settings."""
    return {key: config[key] for key in _IDS if config[key] is not None} | dict(settings)


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
