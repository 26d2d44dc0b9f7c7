"""The options that only the command line has: models, folders, files and runs, by their place."""

from typing import Annotated, Literal

from pydantic import Field

from jaxdistill.section import Count, Flag, Section

_POSITIONAL = Flag(positional=True)


class ModelArgument(Section):
    """The model that a command works on."""

    model: Annotated[str, Flag(positional=True, metavar="MODEL")] = Field(
        description="A model folder, a .gguf file, RUN_DIR, RUN_DIR@best, RUN_DIR@latest or "
        "RUN_DIR@STEP."
    )


class OutputFolder(Section):
    """Where a command writes."""

    output: Annotated[str, Flag("-o", "DIR")] = Field(description="A folder, new or empty.")


class OptionalFolder(Section):
    """Where a command writes besides what it prints."""

    output: Annotated[str, Flag("-o", "DIR")] | None = Field(
        None, description="Also write every number and a page to this folder."
    )


class OutputFile(Section):
    """The file that a command writes."""

    output: Annotated[str, Flag("-o", "FILE")] = Field(description="The file to write.")


class RunFile(Section):
    """A configuration."""

    config: Annotated[str, Flag(positional=True, metavar="CONFIG")] = Field(
        description="YAML file; `jaxdistill init` writes one."
    )
    overrides: Annotated[tuple[str, ...], Flag(positional=True, metavar="KEY=VALUE")] = Field(
        (), description="Values in place of the file's, such as train.steps=20."
    )


class SweepFile(Section):
    """A configuration, and which of its values are tried."""

    config: Annotated[str, Flag(positional=True, metavar="CONFIG")] = Field(
        description="YAML file; `jaxdistill init` writes one."
    )
    overrides: Annotated[tuple[str, ...], Flag(positional=True, metavar="KEY=VALUE,VALUE")] = Field(
        description="Values to try, such as method.alpha=0.1,0.5 seed=1,2,3: every combination is "
        "a run; with one value it holds for all."
    )
    output: Annotated[str, Flag("-o", "DIR")] | None = Field(
        None,
        description="Folder of the sweep, a run in each folder below; default: runs/sweep-NAME.",
    )


class RunFolder(Section):
    """A run."""

    run_dir: Annotated[str, Flag(positional=True, metavar="RUN_DIR")] = Field(
        description="Folder of the run."
    )


class Clean(RunFolder):
    """A run, and whether what it does not need goes."""

    yes: bool = Field(False, description="Remove it; without, only say what would go.")


class Resume(RunFolder):
    """A run, and what changes from here on."""

    overrides: Annotated[tuple[str, ...], Flag(positional=True, metavar="KEY=VALUE")] = Field(
        (), description="Settings that change from here on, such as train.steps=200."
    )
    from_start: bool = Field(
        False, description="Begin anew at step 0; what the run has is moved to RUN_DIR/earlier."
    )


class Launch(Section):
    """Processes of one run on this machine."""

    processes: Annotated[Count, Flag("-n", "N")] = Field(description="How many processes.")
    devices_per_process: Annotated[Count, Flag(metavar="K")] = Field(
        1, description="Process P has GPUs P * K to P * K + K - 1, or K CPU devices."
    )
    restart: Annotated[int, Field(ge=0, le=10**6), Flag(metavar="R")] = Field(
        0, description="Resume the run up to R times after a process was lost."
    )
    log_dir: Annotated[str, Flag(metavar="DIR")] | None = Field(
        None, description="Keep what each process prints there."
    )


class Rollback(RunFolder):
    """Where a run goes back to."""

    step: Annotated[Count, Flag(positional=True, metavar="STEP")] = Field(
        description="A step that has a checkpoint."
    )


class WorkflowFile(Section):
    """A workflow and how it is run."""

    file: Annotated[str, Flag(positional=True, metavar="FILE")] = Field(
        description="YAML file; see configs/compress_smollm2.yaml."
    )
    start: Annotated[str, Flag(metavar="STEP", name="--from")] | None = Field(
        None, description="Run this step and all after it."
    )
    dry_run: bool = Field(False, description="Only say what would be done.")


class TaskSource(Section):
    """Which tasks, and where their answers go."""

    tasks: Annotated[tuple[str, ...], Flag(metavar="TASK")] | None = Field(
        None, description="Such as svamp gsm8k aqua bbh_navigate."
    )
    task_data: Annotated[str, Flag(metavar="DIR")] | None = Field(
        None, description="Folder of published files; none: $JAXDISTILL_DATA, or `data`."
    )
    output: Annotated[str, Flag("-o", "DIR")] | None = Field(
        None, description="Write every answer there."
    )


class NamedModels(Section):
    """Models with the names of their rows."""

    models: Annotated[tuple[str, ...], Flag(positional=True, metavar="NAME=MODEL")] = Field(
        description="Row and model; one name twice: seeds of one thing."
    )


class HarnessTasks(Section):
    """Which tasks of lm-eval."""

    tasks: Annotated[tuple[str, ...], Flag(metavar="TASK")] = Field(
        description="Names that `lm-eval ls tasks` lists."
    )


class PromptTexts(Section):
    """What a model completes."""

    prompt: Annotated[tuple[str, ...], Flag("-p", "TEXT", repeat=True)] = Field(
        (), description="A prompt; without any, standard input is one."
    )
    chat: bool = Field(False, description="The prompt is the user's turn of a chat.")


class Samples(Section):
    """How often a teacher is asked."""

    samples: Annotated[Count, Flag("-n", "N")] | None = Field(
        None, description="Answers per question; none: as the file says."
    )


class ClientKey(Section):
    """Who may ask a server."""

    key_env: Annotated[str, Flag(metavar="NAME")] | None = Field(
        None, description="Variable that holds the key clients must send; none: anybody may ask."
    )


class AdaptersOnly(Section):
    """What of a run is written."""

    adapters: bool = Field(
        False,
        description="The LoRA adapters alone, in the format of the package peft, in place of the "
        "merged model.",
    )


class Push(Section):
    """Where a model goes besides."""

    push: Annotated[str, Flag(metavar="OWNER/NAME")] | None = Field(
        None,
        description="Also upload it to this repository of the Hugging Face Hub, a private one "
        "where it is new; none: it stays here.",
    )


class Pages(Section):
    """What a page is about, and where it goes."""

    run_dirs: Annotated[tuple[str, ...], Flag(positional=True, metavar="RUN_DIR")] = Field(
        description="Folders of runs, of a workflow, of a comparison, or of answers."
    )
    output: Annotated[str, Flag("-o", "FILE")] | None = Field(
        None, description="Default: report.html in the run folder, comparison.html for several."
    )


class StoredTeacher(Section):
    """What a teacher said before."""

    place: Annotated[str, Flag(positional=True, metavar="DIR")] = Field(
        description="A folder, or gs://... or s3://..., that `jaxdistill teacher cache` filled."
    )


class Recipe(Section):
    """A recipe and the copy of it."""

    recipe: Annotated[str, Flag(positional=True, metavar="RECIPE")] = Field(
        description="`jaxdistill ls recipes` lists them."
    )
    output: Annotated[str, Flag("-o", "FILE")] | None = Field(
        None, description="Default: RECIPE.yaml; - is standard output."
    )
    force: bool = Field(False, description="Overwrite the file.")


class Listed(Section):
    """What is listed."""

    kind: Annotated[Literal["recipes", "methods", "models", "runs"], _POSITIONAL] | None = Field(
        None, description="One of the four; none: the first three."
    )
    folder: Annotated[str, Flag(metavar="DIR", name="--in")] = Field(
        "runs", description="Folder whose runs `ls runs` lists, with those in folders below."
    )
    diff: bool = Field(False, description="Also list the settings in which the runs differ.")


class Schema(Section):
    """Which kind of file a schema is of."""

    kind: Annotated[Literal["run", "workflow", "generate"], _POSITIONAL] = Field(
        "run", description="A run's configuration, a workflow, or a file of `teacher generate`."
    )


class Shell(Section):
    """Which shell completes words."""

    shell: Annotated[Literal["bash", "zsh", "fish"], _POSITIONAL] = Field(
        description="Its script: `source <(jaxdistill completion bash)`, fish: `jaxdistill "
        "completion fish | source`; or kept in a file."
    )
