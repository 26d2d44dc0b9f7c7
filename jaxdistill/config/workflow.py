"""The workflow file: steps in order, each with its inputs; `${step}` stands for a step's output."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from jaxdistill import commands
from jaxdistill.commands.prune import SPARSITY_PATTERN
from jaxdistill.config import inherit, keys, loader, syntax
from jaxdistill.config.generation import Generation
from jaxdistill.config.schema import Config
from jaxdistill.errors import ConfigError
from jaxdistill.section import (
    NAME_PATTERN,
    Path,
    Problem,
    Section,
)

STATE = "workflow.json"
ASIDE = "replaced"  # outputs that a changed step has made room for; nothing is deleted
RESERVED = frozenset({STATE, f"{STATE}.tmp", ASIDE, "LOCK", "report.html"})
REFERENCE = re.compile(r"\$\{([^}]*)\}")
Loaded = TypeVar("Loaded", Config, Generation)
StepName = Annotated[str, Field(max_length=60, pattern=NAME_PATTERN)]


class Step(Section):
    """What every step has."""

    name: StepName = Field(description="Its folder, and what `${name}` in later steps stands for.")


class TrainStep(Step):
    """A run of a configuration: correction of the teacher, distillation, the control."""

    kind: Literal["train"] = Field(description="The kind of step.")
    config: dict[str, Any] = Field(
        description="A configuration as in a file of its own; what `base` has is left out."
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1, max_length=20, strict=False)] | None = (
        Field(None, description="A run for each; `${name}` then stands for all of them.")
    )


class GenerateStep(Step):
    """Asks a model for answers, judges them and writes training files: `teacher generate`."""

    kind: Literal["generate"] = Field(description="The kind of step.")
    config: dict[str, Any] = Field(
        description="A file of `teacher generate`, without output; `${name}/train_FORM.jsonl` is "
        "what later steps train on."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: the workflow says where outputs are."""
        if "output" in self.config:
            yield ("config", "output"), "the output is the step's own folder: remove it"


class ModelStep(Step):
    """A step that works on one model."""

    model: Path = Field(description="The model.")


class ImportanceStep(ModelStep, commands.Importance):
    """Measures what a model's units are worth."""

    kind: Literal["importance"] = Field(description="The kind of step.")


class PruneStep(ModelStep, commands.Prune):
    """Cuts a student out of a model."""

    kind: Literal["prune"] = Field(description="The kind of step.")
    importance: Path = Field(description="Its scores: the output of an importance step.")

    def problems(self) -> Iterator[Problem]:
        """Rules: one step makes a model smaller, another one sparse."""
        yield from super().problems()
        if self.sparsity is not None:
            yield ("sparsity",), "is a step of its own: kind: sparsify"


class SparsifyStep(ModelStep, commands.Prune):
    """Makes weights of a model 0, at once, and leaves its sizes."""

    kind: Literal["sparsify"] = Field(description="The kind of step.")
    sparsity: Annotated[str, Field(pattern=SPARSITY_PATTERN)] = Field(
        description="2:4, two of every four weights along the input dimension, or a share such as "
        "50% of any; by |w|, or with importance by |w| |x| (Wanda)."
    )


class QuantizeStep(ModelStep, commands.Quantize):
    """Writes a model in whole numbers."""

    kind: Literal["quantize"] = Field(description="The kind of step.")


class ExportStep(ModelStep, commands.Export):
    """Writes a model as a folder that transformers opens."""

    kind: Literal["export"] = Field(description="The kind of step.")

    def problems(self) -> Iterator[Problem]:
        """Rules: a step gives a folder."""
        yield from super().problems()
        if self.format == "gguf":
            yield ("format",), "gguf is one file, and a step gives a folder: `jaxdistill export`"


class CompareStep(Step, commands.Compare):
    """Measures models side by side."""

    kind: Literal["compare"] = Field(description="The kind of step.")
    models: dict[str, Path] = Field(min_length=1, description="Name in the table -> model.")
    contrast: Annotated[tuple[str, ...], Field(min_length=2, max_length=2, strict=False)] | None = (
        Field(None, description="Two names: the page says how much the first is better.")
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: only what is measured can be contrasted."""
        for name in self.contrast or ():
            if name not in self.models:
                yield ("contrast",), f"{name!r} is none of the models"


AnyStep = Annotated[
    TrainStep
    | GenerateStep
    | ImportanceStep
    | PruneStep
    | SparsifyStep
    | QuantizeStep
    | ExportStep
    | CompareStep,
    Field(discriminator="kind"),
]
KINDS = ("train", "generate", "importance", "prune", "sparsify", "quantize", "export", "compare")


class Workflow(Section):
    """Steps from a model to what is left of it."""

    version: int = Field(1, ge=1, le=1, description="Version of this format.")
    name: StepName = Field("workflow", description="Name shown on the page.")
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
            if step.name in RESERVED:
                yield ("steps", i, "name"), f"{step.name!r} is the name of a file of the workflow's"
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
    return _loaded(Config, raw, step.name)


def generation(step: GenerateStep, folder: str, outputs: Mapping[str, str]) -> Generation:
    """The configuration of a generate step.

    Raises:
      ConfigError: naming the step and everything that is wrong.
    """
    return _loaded(Generation, replaced(step.config, outputs) | {"output": folder}, step.name)


def _loaded(schema: type[Loaded], raw: Mapping[str, Any], name: str) -> Loaded:
    try:
        return loader.loads_as(schema, syntax.dump(dict(raw)), f"step {name}")
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
        if isinstance(step, TrainStep | GenerateStep):
            try:
                if isinstance(step, GenerateStep):
                    generation(step, outputs[step.name], outputs)
                else:
                    train_config(workflow, step, outputs[step.name], outputs, None)
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return workflow


def _line(name: str, document: syntax.YamlDocument, item: dict[str, Any]) -> list[str]:
    """One of pydantic's errors in our words, with file, line and column."""
    location = [p for p in item["loc"] if p not in KINDS]
    if item["type"] == "rules":
        problems = [((*location, *below), text) for below, text in item["ctx"]["problems"]]
    elif item["type"] == "extra_forbidden":
        known = {field for section in _SECTIONS for field in section.model_fields}
        best = keys.nearest(str(location[-1]), known)
        problems = [
            (tuple(location), "unknown key" + (f'; did you mean "{best}"?' if best else ""))
        ]
    elif item["type"].startswith("union_tag"):
        problems = [((*location, "kind"), f"must be one of {', '.join(KINDS)}")]
    else:
        problems = [(tuple(location), item["msg"][:1].lower() + item["msg"][1:])]
    lines = []
    for path, text in problems:
        end = next(e for e in range(len(path), -1, -1) if path[:e] in document.marks)
        line, column = document.marks[path[:end]]
        lines.append(f"{name}:{line}:{column}: {'.'.join(map(str, path))}: {text}")
    return lines


_SECTIONS = (
    Workflow,
    TrainStep,
    GenerateStep,
    ImportanceStep,
    PruneStep,
    SparsifyStep,
    QuantizeStep,
    ExportStep,
    CompareStep,
)
