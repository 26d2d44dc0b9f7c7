"""The workflow file: steps in order, each with its inputs; `${step}` stands for a step's output."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from jaxdistill.config import inherit, keys, loader, syntax
from jaxdistill.config.models import PruneAxes, PruneBy
from jaxdistill.config.schema import Config
from jaxdistill.config.section import (
    NAME_PATTERN,
    Budget,
    Count,
    Dtype,
    Path,
    Problem,
    Section,
    Size,
)
from jaxdistill.errors import ConfigError

REFERENCE = re.compile(r"\$\{([^}]*)\}")
Name = Annotated[str, Field(max_length=60, pattern=NAME_PATTERN)]
Paths = Annotated[tuple[Path, ...], Field(min_length=1, max_length=1000, strict=False)]


class Step(Section):
    """What every step has."""

    name: Name = Field(description="Its folder, and what `${name}` in later steps stands for.")


class TrainStep(Step):
    """A run of a configuration: correction of the teacher, distillation, the control."""

    kind: Literal["train"] = Field(description="The kind of step.")
    config: dict[str, Any] = Field(
        description="A configuration as in a file of its own; what `base` has is left out."
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1, max_length=20, strict=False)] | None = (
        Field(None, description="A run for each; `${name}` then stands for all of them.")
    )


class ImportanceStep(Step):
    """Measures what a model's units are worth."""

    kind: Literal["importance"] = Field(description="The kind of step.")
    model: Path = Field(description="The model.")
    data: Paths = Field(description="Calibration text.")
    rows: Count = Field(1024, description="Samples.")
    seq_len: int = Field(1024, ge=2, le=2**20, description="Tokens in a sample.")
    batch_size: Size = Field(8, description="Rows at a time, over all devices.")
    without: tuple[Size, ...] = Field(
        (), strict=False, description="Also measure the loss without n layers in a row, for each n."
    )


class PruneStep(Step):
    """Cuts a student out of a model."""

    kind: Literal["prune"] = Field(description="The kind of step.")
    model: Path = Field(description="The model.")
    importance: Path = Field(description="Its scores: the output of an importance step.")
    layers: Size | None = Field(None, description="Layers that stay.")
    embed: Size | None = Field(None, description="Channels that stay.")
    mlp: Size | None = Field(None, description="Neurons of every MLP, or expert, that stay.")
    heads: Size | None = Field(None, description="Query heads that stay.")
    kv_heads: Size | None = Field(None, description="Groups of heads that stay.")
    experts: Size | None = Field(None, description="Routed experts of every layer that stay.")
    parameters: Budget | None = Field(None, description="Budget instead: 60% or 80M.")
    memory: Budget | None = Field(None, description="Budget instead: 4GiB or 50% of the weights.")
    latency: Budget | None = Field(
        None, description="Budget instead: 12ms or 60% of the model's for a token, measured here."
    )
    axes: PruneAxes = Field(("embed", "mlp"), strict=False, description="Shrink for a budget.")
    by: PruneBy = Field("range", description="How layers are chosen.")


class QuantizeStep(Step):
    """Writes a model in whole numbers."""

    kind: Literal["quantize"] = Field(description="The kind of step.")
    model: Path = Field(description="The model.")
    scheme: Literal["int8", "int4", "int8_dynamic"] = Field("int8", description="The numbers.")
    dtype: Dtype | None = Field(None, description="Of everything else; null: as trained.")


class ExportStep(Step):
    """Writes a model as a folder that transformers opens."""

    kind: Literal["export"] = Field(description="The kind of step.")
    model: Path = Field(description="The model.")
    dtype: Dtype | None = Field(None, description="Of the weights; null: as trained.")


class CompareStep(Step):
    """Measures models side by side."""

    kind: Literal["compare"] = Field(description="The kind of step.")
    teacher: Path | None = Field(None, description="Agreement is measured against it.")
    models: dict[str, Path] = Field(min_length=1, description="Name in the table -> model.")
    data: Paths = Field(description="Held-out text.")
    seq_len: int = Field(1024, ge=2, le=2**20, description="Tokens in a row.")
    batch_size: Size = Field(8, description="Rows at a time, over all devices.")
    max_rows: Count | None = Field(None, description="Use only so many rows.")
    questions: Path | None = Field(
        None, description="Multiple choice: a JSONL file, or texts: made out of the data."
    )
    max_questions: Count = Field(200, description="At most so many questions.")
    prompts: tuple[str, ...] = Field((), strict=False, description="Texts to continue.")
    repeats: Count = Field(10, description="Timings of each kind.")
    prompt_tokens: Size = Field(128, description="Of a timed row.")
    new_tokens: Size = Field(32, description="Of a timed row.")
    contrast: Annotated[tuple[str, ...], Field(min_length=2, max_length=2, strict=False)] | None = (
        Field(None, description="Two names: the page says how much the first is better.")
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: only what is measured can be contrasted."""
        for name in self.contrast or ():
            if name not in self.models:
                yield ("contrast",), f"{name!r} is none of the models"


AnyStep = Annotated[
    TrainStep | ImportanceStep | PruneStep | QuantizeStep | ExportStep | CompareStep,
    Field(discriminator="kind"),
]
KINDS = ("train", "importance", "prune", "quantize", "export", "compare")


class Workflow(Section):
    """Steps from a model to what is left of it."""

    version: int = Field(1, ge=1, le=1, description="Version of this format.")
    name: Name = Field("workflow", description="Name shown on the page.")
    dir: Path = Field(
        default_factory=lambda data: f"runs/{data.get('name', 'workflow')}",
        description="Folder of all outputs. Default: runs/NAME.",
    )
    base: dict[str, Any] = Field(
        default_factory=dict, description="What the configurations of all train steps share."
    )
    steps: Annotated[tuple[AnyStep, ...], Field(min_length=1, max_length=200, strict=False)] = (
        Field(description="In order.")
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: names differ, and a step refers only to steps before it."""
        before: set[str] = set()
        for i, step in enumerate(self.steps):
            if step.name in before:
                yield ("steps", i, "name"), f"{step.name!r} is the name of an earlier step"
            for name in references(step.model_dump()):
                if name not in before:
                    have = ", ".join(sorted(before)) or "none"
                    rule = f"${{{name}}} is no earlier step (earlier: {have})"
                    yield ("steps", i), rule
            before.add(step.name)


def references(value: Any) -> list[str]:
    """The names of all `${name}` in the texts of a value, each once."""
    if isinstance(value, str):
        return list(dict.fromkeys(REFERENCE.findall(value)))
    parts = value.values() if isinstance(value, Mapping) else value
    if not isinstance(parts, list | tuple) and not isinstance(value, Mapping):
        return []
    return list(dict.fromkeys(name for part in parts for name in references(part)))


def replaced(value: Any, outputs: Mapping[str, str]) -> Any:
    """The value with every `${name}` as what it stands for."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda match: outputs.get(match[1], match[0]), value)
    if isinstance(value, Mapping):
        return {key: replaced(part, outputs) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [replaced(part, outputs) for part in value]
    return value


def train_config(
    workflow: Workflow, step: TrainStep, run_dir: str, outputs: Mapping[str, str], seed: int | None
) -> Config:
    """The configuration of one run of a train step.

    Raises:
      ConfigError: naming the step and everything that is wrong.
    """
    raw = replaced(inherit.merge(workflow.base, step.config), outputs)
    raw["run"] = {"name": os.path.basename(run_dir), "dir": run_dir}
    if seed is not None:
        raw["seed"] = seed
    try:
        return loader.loads(syntax.dump(raw), f"step {step.name}")
    except ConfigError as error:
        # Lines and columns are those of the merged text, which nobody has seen.
        lines = [re.sub(r"^(step [^:]+):\d+:\d+:", r"\1:", t) for t in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from None


def is_workflow(text: str) -> bool:
    """Whether a YAML text is a workflow rather than a configuration: it has steps."""
    return re.search(r"^steps:", text, re.MULTILINE) is not None


def load(path: str | os.PathLike) -> Workflow:
    """The workflow in a YAML file, checked; configurations of train steps too.

    Raises:
      ConfigError: with one line for each thing wrong.
    """
    name = os.fspath(path)
    document = syntax.parse(inherit.read(path))
    faults = [f"{name}:{f.line}:{f.column}: {f.message}" for f in document.faults]
    if faults or not isinstance(document.value, dict):
        raise ConfigError("\n".join(faults) or f"{name}: must hold name and steps")
    try:
        workflow = Workflow.model_validate(document.value)
    except ValidationError as error:
        lines = [_line(name, document, dict(item)) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(t for line in lines for t in line))) from None
    problems = []
    outputs = {step.name: os.path.join(workflow.dir, step.name) for step in workflow.steps}
    for step in workflow.steps:
        if isinstance(step, TrainStep):
            try:
                train_config(workflow, step, outputs[step.name], outputs, None)
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return workflow


def _line(name: str, document: syntax.Document, item: dict[str, Any]) -> list[str]:
    """One of pydantic's errors in our words, with file, line and column."""
    location = [p for p in item["loc"] if p not in KINDS]
    if item["type"] == "rules":
        found = [((*location, *below), text) for below, text in item["ctx"]["problems"]]
    elif item["type"] == "extra_forbidden":
        known = {field for section in _SECTIONS for field in section.model_fields}
        best = keys.nearest(str(location[-1]), known)
        found = [(tuple(location), "unknown key" + (f'; did you mean "{best}"?' if best else ""))]
    elif item["type"].startswith("union_tag"):
        found = [((*location, "kind"), f"must be one of {', '.join(KINDS)}")]
    else:
        found = [(tuple(location), item["msg"][:1].lower() + item["msg"][1:])]
    lines = []
    for path, text in found:
        end = next(e for e in range(len(path), -1, -1) if path[:e] in document.marks)
        line, column = document.marks[path[:end]]
        lines.append(f"{name}:{line}:{column}: {'.'.join(map(str, path))}: {text}")
    return lines


_SECTIONS = (
    Workflow,
    TrainStep,
    ImportanceStep,
    PruneStep,
    QuantizeStep,
    ExportStep,
    CompareStep,
)
