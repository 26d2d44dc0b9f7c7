"""A run's student as a folder that transformers opens."""

import os
import pathlib
from typing import Any

from jaxdistill import commands, models
from jaxdistill import config as configs
from jaxdistill.compress import quantize as quantizing
from jaxdistill.formats import gguf_write, peft
from jaxdistill.models.quantized import Quantization
from jaxdistill.references import adapters_any, as_run, load_any, spec_any


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
      options: the scheme and its exceptions, and the type of everything that is not quantised,
        scales included; None: what a run's student was trained for, else int8, as trained.

    Raises:
      ModelError, ConfigError: if there is no such model, or it cannot be quantised here.
      StorageError: if the folder cannot be written.
    """
    options = options or commands.Quantize()
    wanted = quantization_of(source, options)
    config, _ = spec_any(source, allow_network=True)
    quantizing.check("quantisation", wanted, config)
    quantizing.check_backend(wanted)
    student = quantizing.quantized(load(source), wanted, options.dtype)
    return models.save(student, pathlib.Path(out))


def quantization_of(source: str, options: commands.Quantize) -> Quantization:
    """What `quantize` makes of a model's kernels."""
    if options.scheme is not None:
        return quantizing.named(options.scheme, options.exceptions)
    return trained_for(source) or quantizing.named("int8")


def trained_for(source: str) -> Quantization | None:
    """The last quantisation that a run's student was trained to have; None of all else."""
    run = as_run(source)
    if run is None:
        return None
    config = configs.load(run.folder / "config.resolved.yaml")
    return quantizing.of(config.student.quantize)


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
