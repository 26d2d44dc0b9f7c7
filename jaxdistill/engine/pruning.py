"""Measures what a model's units are worth and cuts a student out of it: `jaxdistill prune`."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxdistill import models
from jaxdistill.compress import importance as scores
from jaxdistill.compress import prune as cutting
from jaxdistill.compress import targets
from jaxdistill.compress.importance import Importance
from jaxdistill.config.models import Prune
from jaxdistill.data import pipeline
from jaxdistill.data.sources import open_source
from jaxdistill.engine.held_out import HeldOut
from jaxdistill.engine.references import load_any
from jaxdistill.errors import ConfigError, ModelError
from jaxdistill.measure import speed
from jaxdistill.models import DecoderConfig, Model, count_parameters
from jaxdistill.models.vocabulary import vocabulary_size
from jaxdistill.sharding import make_mesh, on_mesh

NOTE = "pruning.json"  # in the student's folder: what was kept of which model


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The text that importance is measured on.

    Attributes:
      data: files, or names such as python:docs?split=train.
      rows: samples; the data must have them.
      seq_len: tokens in a row.
      batch_size: rows at a time, a multiple of the number of devices.
      format: what a record holds, as data.format in a configuration.
      cache_dir: where tokenised rows are kept.
    """

    data: Sequence[str]
    rows: int = 1024
    seq_len: int = 1024
    batch_size: int = 8
    format: str = "auto"
    cache_dir: str = "runs/.cache"

    def open(self, model: Model, mesh: Any) -> HeldOut:
        """The first `rows` rows, tokenised for a model.

        Raises:
          ConfigError: if no data is named.
          DataError: if the data has fewer rows.
          ModelError: if the model has no tokenizer.
        """
        if not self.data:
            raise ConfigError("calibration: give text to measure importance on (--data)")
        if model.tokenizer is None:
            raise ModelError(f"{model.source}: has no tokenizer to read the calibration text with")
        dataset = pipeline.build(
            [open_source(path, format=self.format) for path in self.data],
            model.tokenizer,
            seq_len=self.seq_len,
            cache_dir=self.cache_dir,
            name="calibration",
        )
        name = ", ".join(self.data)
        scores.check_enough(len(dataset), self.rows, name)
        return HeldOut(dataset, self.batch_size, self.rows, mesh, name)


def importance(
    model: str | Model,
    calibration: Calibration,
    *,
    without: Sequence[int] = (),
    dtype: str = "float32",
) -> Importance:
    """Importance of every unit of a model, from one forward pass over calibration text.

    Args:
      model: a loaded model, or any name `engine.load` understands.
      calibration: the text.
      without: also measure the loss without n layers in a row, for every n named; each costs a
        pass over the text per place.
      dtype: held and computed in.

    Raises:
      ModelError, DataError, ConfigError: whatever cannot be used.
    """
    mesh = make_mesh(fsdp=-1)
    loaded = load_any(model, dtype=dtype, mesh=mesh)
    rows = calibration.open(loaded, mesh)
    noted = {"model": loaded.source, "data": rows.name}
    with on_mesh(loaded.params):
        found = scores.measure(
            loaded.config, loaded.params, rows.batches(), compute_dtype=dtype, facts=noted
        )
        if without:
            found = scores.with_losses(
                found,
                loaded.config,
                loaded.params,
                rows.batches,
                vocab=vocabulary_size(loaded.tokenizer),
                counts=without,
                compute_dtype=dtype,
            )
    return found


@dataclasses.dataclass(frozen=True)
class Target:
    """What a student is to be: sizes, or a budget; and how its layers are chosen.

    Attributes:
      sizes: explicit ones, of `targets.AXES`.
      parameters: "60%" or "80M" instead.
      memory: "4GiB" or "50%" of the weights instead.
      latency: "60%" of the model's time for a token of one row, or "12ms", measured here, instead.
      axes: what shrinks for a budget.
      by: how layers are chosen, see `Importance.kept_layers`.
      layers: these layers instead.
      dtype: of the weights, for `memory`.
    """

    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    parameters: str | None = None
    memory: str | None = None
    latency: str | None = None
    axes: Sequence[str] = ("embed", "mlp")
    by: str = "range"
    layers: Sequence[int] | None = None
    dtype: str = "bfloat16"

    def shape(self, config: DecoderConfig) -> DecoderConfig:
        """The student's configuration, without which layers it keeps.

        Raises:
          ConfigError: if it cannot be cut out of the model, or the budget cannot be met.
        """
        sizes = dict(self.sizes)
        if self.layers is not None:
            sizes["layers"] = len(cutting.check_layers(config.layers, self.layers))
        budgets = [
            name for name in ("parameters", "memory", "latency") if getattr(self, name) is not None
        ]
        if bool(sizes) + len(budgets) != 1:
            given = ", ".join([*sizes, *budgets]) or "nothing"
            raise ConfigError(
                f"prune: give sizes ({', '.join(targets.AXES)}), or one budget (parameters, "
                f"memory, latency); given: {given}"
            )
        assert self.latency is None, "measured before: see `within_latency`"
        if budgets:
            return targets.fit(
                config,
                parameters=self.parameters,
                memory=self.memory,
                axes=self.axes,
                dtype=jnp.dtype(self.dtype),
            )
        return targets.resize(config, sizes)


def within_latency(model: Model, target: Target) -> tuple[Target, dict[str, float]]:
    """A target with the sizes that meet its latency on these devices, and the microseconds found.

    Measured are models of the right shapes with random weights, in the model's dtype and places:
    one row, 128 tokens read, the time of a further one by `speed.fastest_token`.

    Raises:
      ConfigError: if it cannot be met or timed, or sizes or another budget are given too.
    """
    others = dataclasses.replace(target, latency=None)
    if target.sizes or target.layers is not None or others.parameters or others.memory:
        raise ConfigError(
            "prune.latency: is a budget of its own: give no sizes and no other budget"
        )
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

    small, found = targets.fit_latency(
        model.config, str(target.latency), measured, axes=target.axes
    )
    return dataclasses.replace(others, sizes=targets.sizes_of(small)), found


def target_of(options: Prune) -> Target:
    """The target that `student.prune` in a configuration describes."""
    return Target(
        sizes=options.sizes(),
        parameters=options.parameters,
        memory=options.memory,
        axes=options.axes,
        by=options.by,
    )


def cut(
    model: Model, target: Target, found: Importance, dtype: Any = None
) -> tuple[Model, cutting.Kept]:
    """The student as a model in memory, on the same devices, and which units it kept."""
    small = target.shape(model.config)
    kept = cutting.choose(model.config, small, found, by=target.by, layers=target.layers)
    config, params = cutting.cut(model.config, model.params, kept, shares=found.shares, dtype=dtype)
    return Model(config, params, model.tokenizer, f"pruned {model.source}"), kept


def prune(
    model: str | Model,
    out: str | os.PathLike,
    target: Target,
    *,
    importance_file: str | os.PathLike | None = None,
    calibration: Calibration | None = None,
    without: Sequence[int] = (),
    dtype: str | None = None,
) -> pathlib.Path:
    """Writes a pruned student as a folder that transformers opens.

    Args:
      model: a loaded model, or any name `engine.load` understands.
      out: a folder that does not exist yet, or is empty.
      target: what the student is to be.
      importance_file: scores that were measured before; without it they are measured on
        `calibration` and written to OUT.importance.safetensors, for any other size.
      calibration: the text to measure on.
      without: see `importance`.
      dtype: of the written weights; None keeps the model's.

    Raises:
      ModelError, DataError, ConfigError, StorageError: before any work where possible.
    """
    folder = pathlib.Path(out)
    mesh = make_mesh(fsdp=-1)
    loaded = load_any(model, mesh=mesh)
    took: dict[str, float] | None = None
    if target.latency is not None:
        target, took = within_latency(loaded, target)
    target.shape(loaded.config)  # said before anything else is measured
    if importance_file is not None:
        found = scores.load(importance_file)
    else:
        if calibration is None:
            raise ConfigError("prune: give an importance file, or text to measure importance on")
        if target.by == "range_loss" and not without and target.layers is None:
            without = (loaded.config.layers - target.shape(loaded.config).layers,)
        if target.by == "loss" and not without:
            without = (1,)
        found = importance(loaded, calibration, without=[n for n in without if n])
        scores.save(found, folder.with_name(folder.name + ".importance.safetensors"))
    student, kept = cut(loaded, target, found)
    written = models.save(student, folder, dtype=dtype)
    note = {
        "from": loaded.source,
        "parameters": [count_parameters(loaded.config), count_parameters(student.config)],
        "by": target.by,
        "layers": kept.layers.tolist(),
        "channels": kept.channels.tolist(),
        "experts": None if kept.experts is None else kept.experts.tolist(),
        "measured_on": dict(found.facts),
    } | ({} if took is None else {"decode_us": took})
    (written / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    return written


def pruning_note(folder: str | os.PathLike) -> dict[str, Any]:
    """What `prune` noted in a student's folder.

    Raises:
      ConfigError: if it is no such folder.
    """
    file = pathlib.Path(folder) / NOTE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}): prune the model again") from error
