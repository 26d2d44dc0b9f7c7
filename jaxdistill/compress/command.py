"""Measures what a model's units are worth and cuts a student out of it: `jaxdistill prune`."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from jaxdistill import commands, models
from jaxdistill.commands import Sizes
from jaxdistill.compress import importance as scores
from jaxdistill.compress import prune as cutting
from jaxdistill.compress import sparsify, targets
from jaxdistill.compress.importance import ImportanceScores
from jaxdistill.errors import ConfigError, DamagedError, ModelError
from jaxdistill.evaluate import speed
from jaxdistill.evaluate.held_out import HeldOut, open_rows
from jaxdistill.models import DecoderConfig, Model, count_parameters
from jaxdistill.models.vocabulary import vocabulary_size
from jaxdistill.references import load_any
from jaxdistill.safe import json_file
from jaxdistill.sharding import make_mesh, on_mesh

NOTE = "pruning.json"  # in the student's folder: what was kept of which model


def importance(
    model: str | Model, options: commands.Importance, *, dtype: str = "float32"
) -> ImportanceScores:
    """Importance of every unit of a model, from one forward pass over calibration text.

    Args:
      model: a loaded model, or any name `references.load_any` understands.
      options: the text, how much of it, and which layers are also left out to measure the loss.
      dtype: held and computed in.

    Raises:
      ModelError, DataError, ConfigError: whatever cannot be used.
    """
    mesh = make_mesh(fsdp=-1)
    loaded = load_any(model, dtype=dtype, mesh=mesh)
    rows = _rows(loaded, options, mesh)
    facts = {"model": loaded.source, "data": rows.name}
    with on_mesh(loaded.params):
        measured = scores.measure(
            loaded.config, loaded.params, rows.batches(), compute_dtype=dtype, facts=facts
        )
        if options.without:
            measured = scores.with_losses(
                measured,
                loaded.config,
                loaded.params,
                rows.batches,
                vocab=vocabulary_size(loaded.tokenizer),
                counts=options.without,
                compute_dtype=dtype,
            )
    return measured


def _rows(model: Model, options: commands.Importance, mesh: Any) -> HeldOut:
    """The first rows of the calibration text, tokenised for a model.

    Raises:
      DataError: if the data has fewer rows.
      ModelError: if the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ModelError(f"{model.source}: has no tokenizer to read the calibration text with")
    rows = open_rows(
        options,
        model.tokenizer,
        mesh,
        seq_len=options.seq_len,
        max_rows=options.rows,
        name="calibration",
    )
    scores.check_enough(rows.available, options.rows, ", ".join(options.data))
    return rows


def shape_of(config: DecoderConfig, sizes: Sizes) -> DecoderConfig:
    """The pruned student's configuration, without which layers it keeps.

    Raises:
      ConfigError: if it cannot be cut out of the model, or the budget cannot be met.
    """
    assert "latency" not in sizes.budgets(), "measured before: see `within_latency`"
    if sizes.budgets():
        return targets.fit(
            config, parameters=sizes.parameters, memory=sizes.memory, axes=sizes.axes
        )
    return targets.resize(config, sizes.sizes())


def within_latency(model: Model, options: commands.Prune) -> tuple[Sizes, dict[str, float]]:
    """The sizes that meet a budget of latency on these devices, and the microseconds measured.

    Measured are models of the right shapes with random weights, in the model's dtype and places:
    one row, 128 tokens read, the time of a further one by `speed.fastest_token`.

    Raises:
      ConfigError: if it cannot be met or timed.
    """
    leaf = model.params["embedding"]

    def measured(config: DecoderConfig) -> float:
        mesh = leaf.sharding.mesh
        one = model if config == model.config else models.random(config, 0, leaf.dtype, mesh)
        seconds = speed.fastest_token(one)
        if seconds is None:
            raise ConfigError(
                "prune.latency: a token cannot be timed here: it takes less than two runs differ "
                "by; leave the machine to it, or give sizes or another budget"
            )
        return 1e6 * seconds

    small, microseconds = targets.fit_latency(
        model.config, str(options.latency), measured, axes=options.axes
    )
    sizes = targets.sizes_of(small) | {"by": options.by}
    return Sizes.model_validate(sizes), microseconds


def cut(
    model: Model, sizes: Sizes, measured: ImportanceScores, dtype: Any = None
) -> tuple[Model, cutting.Kept]:
    """The student as a model in memory, on the same devices, and which units it kept."""
    small = shape_of(model.config, sizes)
    units = cutting.choose(model.config, small, measured, by=sizes.by)
    config, params = cutting.cut(
        model.config, model.params, units, shares=measured.shares, dtype=dtype
    )
    source = f"pruned {model.source}"
    return dataclasses.replace(model, config=config, params=params, source=source), units


def prune(
    model: str | Model,
    out: str | os.PathLike,
    options: commands.Prune,
    calibration: commands.Importance | None = None,
) -> pathlib.Path:
    """Writes a pruned student as a folder that transformers opens.

    Args:
      model: a loaded model, or any name `references.load_any` understands.
      out: a folder that does not exist yet, or is empty.
      options: what the student is to be: smaller, or with `options.sparsity` partly zero, by
        weights alone where there is nothing to measure. Without `options.importance` scores are
        measured on `calibration` and written to OUT.importance.safetensors, for any other size.
      calibration: the text to measure on.

    Raises:
      ModelError, DataError, ConfigError, StorageError: before any work where possible.
    """
    folder = pathlib.Path(out)
    mesh = make_mesh(fsdp=-1)
    loaded = load_any(model, mesh=mesh)
    if options.sparsity is not None:
        measured = _wanda(loaded, folder, options, calibration)
        return sparsify.write(
            loaded, folder, options.sparsity,
            scope=options.scope, measured=measured, dtype=options.dtype, note=NOTE,
        )  # fmt: skip
    sizes: Sizes = options
    microseconds: dict[str, float] | None = None
    if options.latency is not None:
        sizes, microseconds = within_latency(loaded, options)
    small = shape_of(loaded.config, sizes)  # refused before anything else is measured
    if options.importance is not None:
        measured = scores.load(options.importance)
    else:
        if calibration is None:
            raise ConfigError("prune: give an importance file, or text to measure importance on")
        measured = importance(loaded, _with_losses(calibration, options.by, loaded, small))
        scores.save(measured, folder.with_name(folder.name + ".importance.safetensors"))
    student, units = cut(loaded, sizes, measured)
    note = {
        "from": loaded.source,
        "parameters": [count_parameters(loaded.config), count_parameters(student.config)],
        "by": options.by,
        "layers": units.layers.tolist(),
        "channels": units.channels.tolist(),
        "experts": None if units.experts is None else units.experts.tolist(),
        "measured_on": dict(measured.facts),
    } | ({} if microseconds is None else {"decode_us": microseconds})
    notes = {NOTE: json.dumps(note, indent=1) + "\n"}
    return models.save(student, folder, dtype=options.dtype, notes=notes)


def _wanda(
    model: Model,
    folder: pathlib.Path,
    options: commands.Prune,
    calibration: commands.Importance | None,
) -> ImportanceScores | None:
    """The scores that sparsity reads beside weights, where there are some or text to measure on."""
    if options.importance is not None:
        return scores.load(options.importance)
    if calibration is None:
        return None
    measured = importance(model, calibration)
    scores.save(measured, folder.with_name(folder.name + ".importance.safetensors"))
    return measured


def _with_losses(
    calibration: commands.Importance, by: str, model: Model, small: DecoderConfig
) -> commands.Importance:
    """The calibration with the losses that choosing layers `by` them needs."""
    if calibration.without:
        return calibration
    removed = model.config.layers - small.layers
    counts = {"loss": (1,), "range_loss": (removed,) if removed else ()}.get(by, ())
    return calibration.model_copy(update={"without": counts})


def pruning_note(folder: str | os.PathLike) -> dict[str, Any]:
    """What `prune` noted in a student's folder.

    Raises:
      ConfigError: if it is no such folder.
    """
    file = pathlib.Path(folder) / NOTE
    try:
        return json_file.read(file, {"parameters": list, "layers": list})
    except DamagedError as error:
        raise ConfigError(f"{error}: prune the model again") from error
