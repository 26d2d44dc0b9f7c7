"""Finds a model by any name a user may give it: folder, file, Hub id, or a run's checkpoint."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from jaxdistill import errors, models, rules
from jaxdistill.compress import quantize
from jaxdistill.errors import ConfigError, DamagedError, ModelError
from jaxdistill.formats import loading, sums
from jaxdistill.formats.huggingface import folder_config, folder_generation, folder_rounded
from jaxdistill.formats.tokenizer_files import folder_tokenizer
from jaxdistill.models import DecoderConfig, Model, host, lora
from jaxdistill.models.lora import Lora
from jaxdistill.models.quantized import Quantization
from jaxdistill.sharding import make_mesh, shardings
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.state import abstract_params

log = logging.getLogger(__name__)

# The folder inside a run that holds config.json and the tokenizer; checkpoints hold the weights.
STUDENT = "student_without_weights"


@dataclasses.dataclass(frozen=True)
class RunReference:
    """RUN_DIR, RUN_DIR@best, RUN_DIR@latest or RUN_DIR@STEP."""

    folder: pathlib.Path
    which: str

    def step(self, checkpoints: Checkpoints) -> int:
        """The checkpoint that is meant.

        Raises:
          ConfigError: if the run has no such checkpoint.
        """
        have = checkpoints.steps()
        step = {"best": checkpoints.best, "latest": checkpoints.latest}.get(
            self.which, lambda: int(self.which)
        )()
        if step is None and self.which == "best":
            step = checkpoints.latest()
        if step not in have:
            raise ConfigError(
                f"{self.folder}@{self.which}: no such checkpoint; the run keeps "
                f"{', '.join(map(str, have)) or 'none yet'}"
            )
        return step


def as_run(source: str) -> RunReference | None:
    """The run that a name stands for, or None if it names no run.

    Raises:
      ConfigError: where nothing of that name is there, and the Hub can have none.
    """
    source = str(source)
    errors.check(rules.run_is_there(source))
    if not loading.may_exist(source):
        raise ConfigError(
            f"{source}: there is neither a run nor a model of that name: give a run folder, a "
            "model folder, a .gguf file, package:NAME/FILE, or a Hub id such as org/name"
        )
    folder, at, which = str(source).rpartition("@")
    if at and (pathlib.Path(folder) / "RUN.json").is_file():
        if which not in ("best", "latest") and not which.isdecimal():
            raise ConfigError(f"{source}: after @ stands best, latest or a step number")
        return RunReference(pathlib.Path(folder), which)
    if (pathlib.Path(source) / "RUN.json").is_file():
        return RunReference(pathlib.Path(source), "latest")
    return None


def load_any(
    source: str | Model,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    tokenizer: bool = True,
    allow_network: bool = True,
    rounded: Quantization | None = None,
    offload: bool = False,
) -> Model:
    """A model from any source, for a run the student of one of its checkpoints.

    One that is loaded already is returned as it is. What shall be `rounded` is so as it is read,
    of a run once it is read; with `offload` the layers wait in the host's memory.

    Raises:
      ModelError, ConfigError: if there is nothing there, or it cannot be used.
    """
    if isinstance(source, Model):
        return source
    run = as_run(source)
    log.info("loading %s", source)
    if run is None:
        return models.load(
            source,
            dtype=dtype,
            mesh=mesh,
            tokenizer=tokenizer,
            allow_network=allow_network,
            rounded=rounded,
            offload=offload,
        )
    config = _run_config(run)
    mesh = make_mesh(fsdp=-1) if mesh is None else mesh
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        step = run.step(checkpoints)
        params = _params(checkpoints, step, run.folder / STUDENT, config, mesh, dtype)
    own = folder_tokenizer(run.folder / STUDENT) if tokenizer else None
    drawn = folder_generation(run.folder / STUDENT)
    model = Model(config, params, own, f"{run.folder}@{step}", drawn)
    if rounded is not None:
        model = dataclasses.replace(quantize.quantized(model, rounded), source=model.source)
    return dataclasses.replace(model, params=host.waiting(model.params)) if offload else model


def _params(
    checkpoints: Checkpoints,
    step: int,
    folder: pathlib.Path,
    config: DecoderConfig,
    mesh: Mesh,
    dtype: Any,
) -> Any:
    """The student of a checkpoint, its adapters merged."""
    shapes = abstract_params(config, dtype or "float32", mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    described = folder / lora.FILE
    if not described.is_file():
        part = ("params", "student")
        return checkpoints.restore_part(step, part, shapes, places, dtype=dtype)
    adapters, _ = lora.read(described, config)
    beside = _adapters(checkpoints, step, config, adapters, mesh)
    if adapters.held is None:
        frozen = checkpoints.restore_part(step, ("frozen",), shapes, places, dtype=dtype)
        return lora.merge(frozen, beside, adapters)
    shapes = quantize.abstract(shapes, adapters.held)
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    frozen = checkpoints.restore_part(step, ("frozen",), shapes, places)
    merged = quantize.in_floats(lora.merge(frozen, beside, adapters))
    return merged if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), merged)


def adapters_any(source: str) -> tuple[Model, Lora]:
    """A model whose parameters are the adapters of a run's checkpoint, and their description.

    Raises:
      ModelError, ConfigError: if there is no such run, or its student has none.
    """
    run = as_run(source)
    if run is None or not (run.folder / STUDENT / lora.FILE).is_file():
        raise ConfigError(
            f"{source}: has no adapters: name a run whose configuration has student.lora"
        )
    config = _run_config(run)
    adapters, base = lora.read(run.folder / STUDENT / lora.FILE, config)
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        step = run.step(checkpoints)
        params = _adapters(checkpoints, step, config, adapters, make_mesh(fsdp=-1))
    return Model(config, params, None, base), adapters


def _adapters(
    checkpoints: Checkpoints, step: int, config: DecoderConfig, adapters: Lora, mesh: Mesh
) -> Any:
    shapes = lora.shapes(config, adapters)
    places = shardings(mesh, lora.logical_axes(config, adapters), shapes)
    return checkpoints.restore_part(step, ("params", "student"), shapes, places)


def spec_any(source: str, *, allow_network: bool, tokenizer_only: bool = False) -> Any:
    """(configuration, tokenizer) of a model without its weights; or its tokenizer alone.

    Raises:
      ModelError: if there is nothing there, or it cannot be used.
    """
    run = as_run(source)
    folder = run.folder / STUDENT if run else pathlib.Path(source)
    if run is not None:
        config = _run_config(run)
        own = folder_tokenizer(folder)
        return own if tokenizer_only else (config, own)
    if tokenizer_only and (folder / "tokenizer.json").is_file():
        return folder_tokenizer(folder)
    config, tokenizer = models.spec(source, allow_network=allow_network)
    return tokenizer if tokenizer_only else (config, tokenizer)


def rounded_any(source: str, *, allow_network: bool) -> Quantization | None:
    """How the kernels of a model's files are quantised; None where they are not.

    Raises:
      ModelError: if there is nothing there.
    """
    if as_run(source) is not None:
        return None
    place = models.resolve(source, weights=False, allow_network=allow_network)
    return folder_rounded(place) if place.is_dir() else None


def generation_any(source: str, *, allow_network: bool) -> dict[str, Any]:
    """How the publisher draws from a model, as its files say it; {} where they say nothing.

    Raises:
      ModelError: if there is nothing there, or what they say is no setting.
    """
    run = as_run(source)
    if run is not None:
        return folder_generation(run.folder / STUDENT)
    place = models.resolve(source, weights=False, allow_network=allow_network)
    return folder_generation(place) if place.is_dir() else {}


def _run_config(run: RunReference) -> DecoderConfig:
    folder = run.folder / STUDENT
    if not folder.is_dir():
        raise ModelError(f"{run.folder}: the run stopped before its student was made")
    if not (folder / sums.FILE).is_file():
        raise DamagedError(
            f"{folder / sums.FILE}: is missing: what the checkpoints mean cannot be checked; "
            f"`jaxdistill resume {run.folder}` writes the folder again"
        )
    return folder_config(folder)
