"""Adapters as folders of the package peft: adapter_config.json and adapter_model.safetensors."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxdistill.errors import ModelError
from jaxdistill.formats import new_folder
from jaxdistill.formats.tensor_names import TensorName
from jaxdistill.formats.tensor_table import tensor_rows
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.lora import Lora, rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_config(config: DecoderConfig, lora: Lora, base: str) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
      config: of the model that the adapters belong to.
      lora: the adapters.
      base: where that model is from.
    """
    modules = {_module(name) for name in _kernels(config, lora).values()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt2",
        "inference_mode": True,
    }


def save(
    config: DecoderConfig, adapters: Mapping, lora: Lora, folder: pathlib.Path, base: str = ""
) -> pathlib.Path:
    """Writes adapters as a folder that peft opens on the base model; whole, or not at all.

    Args:
      config: of the model they belong to.
      adapters: their tree.
      lora: what they are.
      folder: does not exist yet, or is empty.
      base: where that model is from.

    Raises:
      ModelError: where the family's files hold several projections in one tensor.
      StorageError: where the folder exists with content, or cannot be written.
    """
    named = _tensors(config, adapters, lora)
    folder = new_folder.place(folder)
    with new_folder.filled(folder) as inside:
        described = json.dumps(write_config(config, lora, base), indent=2)
        (inside / CONFIG).write_text(described + "\n")
        save_file(named, inside / WEIGHTS, metadata={"format": "pt"})
    return folder


def _tensors(config: DecoderConfig, adapters: Mapping, lora: Lora) -> dict[str, np.ndarray]:
    """lora_A [rank, in] and lora_B [out, rank] of every adapted module."""
    named = {}
    for ours, name in _kernels(config, lora).items():
        if name.fused or name.stacked != 1:
            raise ModelError(
                f"{config.family}: {ours} is part of a tensor, or several, in the family's files, "
                "which the peft format has no adapters for: export the merged model instead"
            )
        node: Any = adapters
        for part in ours.split("."):
            node = node[part]
        pair = jax.device_get(node)
        for layer in range(config.layers):
            stem = "base_model.model." + name.pattern.format(layer).removesuffix(".weight")
            for side, part in (("lora_A", "down"), ("lora_B", "up")):
                values = np.asarray(pair[part][layer]).T
                named[f"{stem}.{side}.weight"] = np.ascontiguousarray(values)
    return named


def _kernels(config: DecoderConfig, lora: Lora) -> dict[str, TensorName]:
    """Adapted kernels by our dotted name."""
    names = tensor_rows(config)
    kernels = dict.fromkeys(name.rpartition(".")[0] for name in rows(config, lora))
    return {ours: names[ours][0] for ours in kernels}


def _module(name: TensorName) -> str:
    """Enough of a module's path to tell it from others: GPT-2 has two that end in c_proj."""
    return ".".join(name.pattern.split(".")[-3:-1])
