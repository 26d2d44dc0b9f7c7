"""The configuration tree: every option a run has, its unit, its range and its default."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from jaxdistill import methods, rules
from jaxdistill.config import oneself as selves
from jaxdistill.config import reward as rewards
from jaxdistill.config import rollout as rollouts
from jaxdistill.config import routing as routes
from jaxdistill.config import sparsity, stages
from jaxdistill.config.data import Data
from jaxdistill.config.models import Student, Teacher, Tokenizer
from jaxdistill.config.optimizer import Optimizer
from jaxdistill.config.reward import Reward
from jaxdistill.config.rollout import Rollout
from jaxdistill.config.routing import Routing, Teachers
from jaxdistill.config.trackers import Trackers
from jaxdistill.config.written import Written
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
    processes: Size | None = Field(
        None,
        description="Processes the devices belong to; null: as many as Slurm, Open MPI, Cloud TPU, "
        "GKE or `jaxdistill launch` started.",
    )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Devices along data (1 where that is left to the start), fsdp, tensor and context."""
        return 1 if self.data is None else self.data, self.fsdp, self.tensor, self.context

    def problems(self) -> Iterator[Problem]:
        """Rules: sizes that exist."""
        axes = ("data", "fsdp", "tensor", "context")
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
        False, description="Let model and data names that are no local path be downloaded."
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
        yield from routes.problems(self)
        yield from _teacher_problems(self)
        yield from selves.problems(self)
        yield from _second_view_problems(self)
        yield from _origin_problems(self)
        yield from _size_problems(self)
        yield from rollouts.problems(self)
        yield from rewards.problems(self)
        yield from sparsity.problems(self)
        yield from stages.problems(self)


def _teacher_problems(config: Config) -> Iterator[Problem]:
    """What needs a teacher has one, and its tokenizer exists."""
    student, teacher = config.student, config.teacher
    if teacher is None and config.teachers is None:
        if methods.of(config.method).needs_teacher(config.method):
            yield ("teacher",), f"method {config.method.name} needs a teacher"
        if student.from_ == "teacher":
            yield ("student", "from"), "there is no teacher: add one, or give student.source"
        if student.random and student.random.like == "teacher":
            yield ("student", "random", "like"), "there is no teacher: add one, or give a path"
        if config.checkpoint.best_metric in ("eval/kl_t1", "eval/agree_top1"):
            yield ("checkpoint", "best_metric"), "is measured against a teacher, and there is none"
    named = teacher is not None and bool(teacher.source or teacher.random)
    if (
        teacher
        and teacher.served
        and config.rollout is None
        and methods.of(config.method).needs_teacher(config.method)
    ):
        yield (
            ("teacher", "cache"),
            "a server takes no part in a step: `jaxdistill teacher cache` asks it once, into the "
            "folder that is named here; with rollout, sampled_kl asks it while the student writes",
        )
    itself = teacher is not None and teacher.self_ is not None
    if teacher and not named and not itself and student.from_ == "teacher":
        kind, remedy = "stored", "name them in teacher.source too"
        if teacher.served:
            kind, remedy = "served", "give student.source"
        rule = f"a {kind} teacher has no weights to cut it out of: {remedy}"
        yield ("student", "from"), rule
    if teacher and teacher.quantize and student.from_ == "teacher":
        rule = "the student would be cut out of rounded weights: give student.source"
        yield ("teacher", "quantize"), rule
    if methods.of(config.method).is_control and config.eval.compare:
        rule = f"has no effect with method {config.method.name}, which is the control itself"
        yield ("eval", "compare"), rule
    if methods.of(config.method).pairs and config.eval.compare:
        rule = "the SFT control would learn the rejected answers too: remove it"
        yield ("eval", "compare"), rule
    chain = config.tokenizer.from_
    like = student.random.like if student.random else None
    if student.tokenizer is not None and chain != "student":
        rule = "must be student: student.tokenizer gives it a tokenizer of its own"
        yield ("tokenizer", "from"), rule
        return
    if chain == "student" and student.tokenizer is None and "teacher" in (student.from_, like):
        chain = "teacher"
    if chain == "teacher" and config.teachers is not None:
        return  # which is said there
    if chain == "teacher" and itself:
        chain = "student"
    if chain in ("teacher", "student") and student.tokenizer is None:
        model = teacher if chain == "teacher" else student
        if model is None:
            yield ("tokenizer", "from"), "there is no teacher: use student, bytes or a path"
        elif model.random and model.random.like is None:
            yield ("tokenizer", "from"), f"a random {chain} has no tokenizer: use bytes or a path"


def _second_view_problems(config: Config) -> Iterator[Problem]:
    """What a teacher that reads its own tokens goes with, and what is measured there."""
    name, best = config.method.name, config.checkpoint.best_metric
    if not methods.of(config.method).second_view:
        if best == "eval/bits_per_byte":
            rule = "is measured where the teacher has a tokenizer of its own: use eval/loss"
            yield ("checkpoint", "best_metric"), rule
        return
    if best in ("eval/kl_t1", "eval/agree_top1"):
        rule = f"compares tokens, and method {name} has two tokenizers: use eval/bits_per_byte"
        yield ("checkpoint", "best_metric"), rule
    if config.teacher is not None and config.teacher.cache:
        rule = f"stores answers to the student's tokens, and method {name} asks about the teacher's"
        yield ("teacher", "cache"), f"{rule}: give teacher.source alone"
    if config.rollout is not None:
        rule = f"answers are in the student's tokens alone, and method {name} needs both: remove it"
        yield ("rollout",), rule
    if config.data.special_tokens == "parse":
        rule = "special tokens are written for one model, and there are two tokenizers: use text"
        yield ("data", "special_tokens"), rule


def _origin_problems(config: Config) -> Iterator[Problem]:
    """Who wrote the text is said where, and only where, the method asks for it."""
    origins = {source.origin for source in config.data.train} or {"data"}
    name, sides = config.method.name, methods.of(config.method).sides
    if sides:
        if not all(origins.intersection(side) for side in sides):
            first, *others = (f"the {side[0]}'s with origin: {side[0]}" for side in sides)
            rule = f"{name} compares responses: mark {first}, and add {', '.join(others)}"
            yield ("data", "train"), rule
    elif origins != {"data"}:
        yield ("data", "train"), f"origin has no effect with method {name}: remove it"


def _size_problems(config: Config) -> Iterator[Problem]:
    """Batches divide over the mesh; the schedule fits into the steps."""
    train, warmup = config.train, config.optimizer.warmup
    if isinstance(warmup, int) and warmup >= train.steps:
        rule = f"must be below train.steps ({train.steps}), or a fraction below 1"
        yield ("optimizer", "warmup"), rule
    data, fsdp, *_ = config.mesh.sizes
    parts = max(data, 1) * max(fsdp, 1)
    yield from rules.batches(train.batch_size, train.micro_batches, config.eval.batch_size, parts)
