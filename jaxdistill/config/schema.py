"""The configuration tree: every option a run has, its unit, its range and its default."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from jaxdistill import methods
from jaxdistill.config import between
from jaxdistill.config import rollout as rollouts
from jaxdistill.config.data import Data
from jaxdistill.config.models import Student, Teacher, Tokenizer
from jaxdistill.config.optimizer import Optimizer
from jaxdistill.config.reward import Reward
from jaxdistill.config.rollout import Rollout
from jaxdistill.config.routing import Routing, Teachers
from jaxdistill.config.trackers import Trackers
from jaxdistill.config.written import Written
from jaxdistill.data.records import teacher_key
from jaxdistill.section import NAME_PATTERN, Count, Path, Problem, Section, Size


class Run(Section):
    """Where the run is kept."""

    name: str = Field(
        "run", max_length=100, pattern=NAME_PATTERN, description="Name shown in reports and logs."
    )
    dir: Path = Field(
        default_factory=lambda data: f"runs/{data.get('name', 'run')}",
        description="Run folder; relative to the current directory. Default: runs/NAME.",
    )
    compilation_cache: Path = Field(
        "auto",
        description="Where compiled programs are kept for later runs: auto (the user's cache "
        "folder), off, or a folder. JAX's own variables win.",
    )


class Train(Section):
    """How long, and how much at a time."""

    steps: Count = Field(description="Optimizer steps.")
    batch_size: Size = Field(
        32,
        description="Rows in a step, over all devices; with rollout it is prompts_per_step * "
        "samples, the most that a step can have.",
    )
    micro_batches: Size = Field(
        1, description="Parts a batch is computed in, one after the other; must divide batch_size."
    )
    gather_once: Literal["none", "teacher", "both"] = Field(
        "none",
        description="Whose parameters cross the mesh once a step, not once a micro-batch: none; "
        "teacher: it reads the whole batch before the first micro-batch; both: also the student's "
        "layers, which then lie whole on every device. Less is sent, more memory used: see `plan`.",
    )
    eval_every: Count | None = Field(
        100, description="Steps between evaluations; null: only at the end."
    )
    log_every: Count = Field(10, description="Steps between lines of metrics.jsonl.")

    def problems(self) -> Iterator[Problem]:
        """Rules: the parts of a batch are equal."""
        if self.batch_size % self.micro_batches:
            yield ("micro_batches",), f"must divide train.batch_size ({self.batch_size})"


class Mesh(Section):
    """The devices as a grid; at most one size is -1: all devices that are left."""

    data: int | None = Field(
        None,
        ge=-1,
        le=10**6,
        description="Copies of the parameters (devices); null: where another size is -1, one for "
        "each host of GPUs or slice of a TPU, whose network is slow, else 1.",
    )
    fsdp: int = Field(-1, ge=-1, le=10**6, description="Parts of parameters and batch (devices).")
    tensor: int = Field(
        1, ge=-1, le=10**6, description="Parts of heads, MLP and vocabulary (devices)."
    )
    context: int = Field(1, ge=-1, le=10**6, description="Parts of every row's length (devices).")
    expert: int = Field(
        1,
        ge=-1,
        le=10**6,
        description="Parts of each layer's experts, which tokens go to by all-to-all, and of all "
        "that fsdp divides (devices); divides the experts, with tensor.",
    )
    processes: Size | None = Field(
        None,
        description="Processes the devices belong to; null: as many as Slurm, Open MPI, Cloud TPU, "
        "GKE or `jaxdistill launch` started.",
    )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Devices along data (1 where that is left to the start), fsdp, tensor, context, expert."""
        data = 1 if self.data is None else self.data
        return data, self.fsdp, self.tensor, self.context, self.expert

    @property
    def row_parts(self) -> int:
        """Parts of a batch's rows, as far as they are known before the start."""
        return math.prod(max(size, 1) for size in (self.sizes[0], self.fsdp, self.expert))

    def problems(self) -> Iterator[Problem]:
        """Rules: sizes that exist."""
        axes = ("data", "fsdp", "tensor", "context", "expert")
        for axis in axes:
            if getattr(self, axis) == 0:
                yield (axis,), "must be at least 1, or -1: all devices that are left"
        left = [axis for axis in axes if getattr(self, axis) == -1]
        for axis in left[1:]:
            yield (axis,), f"only one size may be -1, and {left[0]} is -1 too"


class Every(Section):
    """When a checkpoint is due: whichever comes first."""

    steps: Count | None = Field(500, description="Steps between checkpoints; null: no such limit.")
    minutes: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        15.0, description="Minutes between checkpoints; null: no such limit."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: one of the two."""
        if self.steps is None and self.minutes is None:
            yield ("steps",), "steps and minutes cannot both be null: nothing would be saved"


class Keep(Section):
    """Which checkpoints stay on disk."""

    latest: int = Field(
        1,
        ge=1,
        le=1000,
        description="How many of the newest: the last one stays until the next one is whole.",
    )
    best: int = Field(1, ge=1, le=1000, description="How many of the best by best_metric.")


BestMetric = Literal[
    "eval/loss",
    "eval/ce",
    "eval/perplexity",
    "eval/bits_per_byte",
    "eval/kl_t1",
    "eval/agree_top1",
    "eval/pass_at_1",
    "eval/reward_mean",
]


class Checkpoint(Section):
    """Saving, so that a killed run goes on where it was."""

    every: Every = Field(default_factory=Every, description="When to save.")
    keep: Keep = Field(default_factory=Keep, description="What to keep.")
    max_unsaved_minutes: Annotated[float, Field(ge=0, le=1e6)] = Field(
        60.0,
        description="Minutes that training goes on while no checkpoint can be written (a full "
        "disk), trying again every minute, before it stops with exit code 9.",
    )
    best_metric: BestMetric = Field("eval/loss", description="Evaluation metric that ranks them.")
    mode: Literal["min", "max"] = Field("min", description="Whether small or large is best.")

    def problems(self) -> Iterator[Problem]:
        """Rules: the better end of the metric."""
        large = ("eval/agree_top1", "eval/pass_at_1", "eval/reward_mean")
        mode = "max" if self.best_metric in large else "min"
        if self.mode != mode:
            yield ("mode",), f"{self.best_metric} is best at its {mode}: use {mode}"


class Nonfinite(Section):
    """A step whose loss or gradient is not finite changes nothing and is counted."""

    max_consecutive: int = Field(
        5,
        ge=1,
        le=10**6,
        description="After this many such steps in a row the first is run again: if it is finite "
        "now, the run goes on from there; else it rolls back.",
    )
    max_rollbacks: int = Field(
        2,
        ge=0,
        le=1000,
        description="How often a run goes back to its last checkpoint and leaves the batches at "
        "fault out; then it stops (exit code 7) with the batch saved in crash/.",
    )

    @property
    def recalled(self) -> int:
        """Updates that a run may go back to, and one that is under way."""
        return self.max_consecutive + 2


class Spike(Section):
    """A loss that jumps far above the median of the steps before it."""

    window: int = Field(200, ge=32, le=10**5, description="Steps whose spread is the usual one.")
    factor: float = Field(
        10.0, ge=1, le=1e6, description="Usual spreads (of MAD, at least 1 % of the loss) it takes."
    )
    then: Literal["ignore", "warn", "rollback"] = Field(
        "warn",
        description="What follows: nothing, an event, or a rollback that leaves the batch out and "
        "counts as one of guards.nonfinite.max_rollbacks.",
    )


class Guards(Section):
    """What protects a run from going wrong unseen."""

    nonfinite: Nonfinite = Field(default_factory=Nonfinite, description="NaN and infinity.")
    spike: Spike = Field(default_factory=Spike, description="A loss that jumps up.")


class Logging(Trackers):
    """What a run reports while it runs."""

    progress: Literal["auto", "rich", "plain", "none"] = Field(
        "auto", description="Console: live rows, one line per log_every, nothing; auto by terminal."
    )
    tensorboard: bool = Field(True, description="Write TensorBoard files too.")


class Eval(Section):
    """How the held-out data is used."""

    batch_size: Size = Field(8, description="Rows at a time, over all devices.")
    max_rows: Count | None = Field(None, description="Use only this many rows; null: all.")
    compare: bool = Field(
        False,
        description="Also train the control (the same student and data without the teacher) "
        "and put it into the result table. Takes about as long again.",
    )
    samples: int = Field(
        4, ge=0, le=1000, description="Held-out records whose beginning is completed at each eval."
    )
    prompts: tuple[Annotated[str, Field(min_length=1, max_length=20000)], ...] = Field(
        (), max_length=1000, strict=False, description="Prompts of your own to complete as well."
    )


class Security(Section):
    """What a run may do."""

    allow_network: bool = Field(
        False, description="Let model and data names of the Hub be downloaded."
    )


class Config(Section):
    """A run, in full."""

    version: int = Field(1, ge=1, le=1, description="Version of this format.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of everything random.")
    run: Run = Field(default_factory=Run, description="Where the run is kept.")
    teacher: Teacher | None = Field(None, description="The model that is learned from.")
    teachers: Teachers | None = Field(
        None,
        description="Several of them by name, {math: {source: ...}, code: {source: ...}}, in place "
        "of teacher (mopd, multi-teacher): the field `teacher` of a record says whom it is for.",
    )
    routing: Routing | None = Field(None, description="How the records of several teachers count.")
    student: Student = Field(description="The model that is trained.")
    tokenizer: Tokenizer = Field(
        default_factory=Tokenizer, description="What turns text into tokens."
    )
    data: Data = Field(description="What the student reads.")
    rollout: Rollout | None = Field(
        None, description="On-policy distillation: the student learns from what it writes itself."
    )
    reward: Reward | None = Field(
        None, description="What the student's answers earn, for method grpo."
    )
    method: methods.AnyMethod = Field(description="What is minimised.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="How it is minimised.")
    train: Train = Field(description="How long, and how much at a time.")
    mesh: Mesh = Field(default_factory=Mesh, description="The devices as a grid.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="Saving.")
    guards: Guards = Field(default_factory=Guards, description="What protects the run.")
    logging: Logging = Field(default_factory=Logging, description="What the run tells.")
    eval: Eval = Field(default_factory=Eval, description="How the held-out data is used.")
    security: Security = Field(default_factory=Security, description="What the run may do.")

    _written: Written = PrivateAttr(default_factory=Written)

    @property
    def teacher_sections(self) -> dict[str, Teacher]:
        """The sections of the teachers by their keys: "teacher" of one, "teachers.NAME" of more."""
        alone = {} if self.teacher is None else {teacher_key(None): self.teacher}
        return alone | {teacher_key(name): one for name, one in (self.teachers or {}).items()}

    @property
    def written(self) -> Written:
        """Where each part stands in the file that was read, if one was."""
        return self._written

    def placed(self, written: Written) -> "Config":
        """The same configuration, which knows where its parts stand."""
        self._written = written
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        return rollouts.with_batch_size(raw)

    def settings(self) -> dict[str, Any]:
        """Every setting as JSON holds it, by the keys of the YAML."""
        return self.model_dump(mode="json", by_alias=True)

    def problems(self) -> Iterator[Problem]:
        """Rules between sections."""
        yield from between.problems(self)
