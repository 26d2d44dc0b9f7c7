"""A run's student as a folder that transformers opens."""

import os
import pathlib
from typing import Any

from jaxdistill import commands, models
from jaxdistill.compress import quantize as quantizing
from jaxdistill.formats import gguf_write, peft
from jaxdistill.references import adapters_any, load_any


def load(source: str, *, dtype: Any = None, allow_network: bool = True) -> models.Model:
    """A model by any name: a folder, a .gguf file, a Hub id, or RUN_DIR[@best|@latest|@STEP].

    Raises:
      ModelError, ConfigError: if there is nothing there, or it cannot be used.
    """
    return load_any(source, dtype=dtype, allow_network=allow_network)


def quantize(
    source: str, out: str | os.PathLike, options: commands.Quantize | None = None
) -> pathlib.Path:
    """Writes a quantised model folder in the compressed-tensors format.

    vLLM reads it, and transformers where the package compressed-tensors is installed; so do we.
    No public format holds what quantisation-aware training knows besides: its float weights stay
    in the run.

    Args:
      source: as in `export`.
      out: a folder that does not exist yet, or is empty.
      options: the scheme (int8 or int4 round weights, int8_dynamic inputs too as they come), and
        the type of everything that is not quantised, scales included; None: int8, as trained.

    Raises:
      ModelError, ConfigError: if there is no such model, or it cannot be quantised here.
      StorageError: if the folder cannot be written.
    """
    options = options or commands.Quantize()
    quantizing.check_backend(options.scheme)
    student = quantizing.quantized(load(source), options.scheme, options.dtype)
    return models.save(student, pathlib.Path(out))


def export(
    source: str, out: str | os.PathLike, options: commands.Export | None = None
) -> pathlib.Path:
    """Writes a model folder, config.json, safetensors and tokenizer, or one GGUF file.

    Args:
      source: RUN_DIR, RUN_DIR@best, RUN_DIR@latest, RUN_DIR@STEP, or any model.
      out: a folder that does not exist yet, or is empty; NAME.gguf.
      options: the format and the type of the written weights; None keeps them as trained.

    Raises:
      ModelError, ConfigError: if there is no such model, or the format cannot hold it.
      StorageError: if it cannot be written.
    """
    options = options or commands.Export()
    if options.format == "gguf":
        return gguf_write.save(load(source), out, options.gguf_type)
    return models.save(load(source), pathlib.Path(out), dtype=options.dtype)


def export_adapters(source: str, out: str | os.PathLike) -> pathlib.Path:
    """Writes the adapters of a run's student in the format of the package peft.

    Args:
      source: RUN_DIR, RUN_DIR@best, RUN_DIR@latest or RUN_DIR@STEP.
      out: a folder that does not exist yet, or is empty.

    Raises:
      ModelError, ConfigError: if there is no such run, or the format cannot hold its adapters.
      StorageError: if the folder cannot be written.
    """
    model, adapters = adapters_any(source)
    return peft.save(model.config, model.params, adapters, pathlib.Path(out), model.source)
