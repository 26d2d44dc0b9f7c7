"""The options of on-policy distillation, `rollout:`, and everything that cannot go with it."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxdistill import methods
from jaxdistill.drawing import Drawing, Temperature
from jaxdistill.methods import signals
from jaxdistill.section import Count, Path, Problem, Section, Size

# Of one of several teachers: part of keys and of names of metrics, which dots and slashes divide.
TeacherName = Annotated[
    str, Field(min_length=1, max_length=40, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
]


class PromptSource(Section):
    """One file or collection of prompts."""

    path: Path = Field(
        description="As data.train.path. A record holds `prompt`, a text or messages, or "
        "`messages`, of which the last answer is not asked for; what it holds for verifiers, "
        "`teachers` and `teacher.self.context` is kept."
    )
    teacher: TeacherName | None = Field(
        None, description="Which of `teachers` its prompts are for, where they do not say."
    )
    learns_from: Literal["both", "reward", "teacher"] = Field(
        "both",
        description="Of grpo with a teacher: what answers to its prompts are for. Each of the two "
        "terms is a mean over its own answers; those for the teacher alone are not judged.",
    )


SLOTS_PER_DEVICE = 64  # where the configuration names none
# Of answers that later updates learn from, in a checkpoint's meta: half of the largest file that
# `safe.json_file` reads.
AHEAD_BYTES = 50_000_000
_TOKEN_BYTES, _ANSWER_BYTES = 16, 128  # three numbers in base 64; places and sizes, one a line

PromptSources = Annotated[tuple[PromptSource, ...], Field(max_length=1000, strict=False)]


class Replay(Section):
    """DistiLLM's share, which rises with the validation loss, and its buffer of old answers."""

    capacity: Size = Field(1000, description="Answers in the buffer; the oldest go first.")
    schedule: Literal["decreasing", "increasing", "constant"] = Field(
        "decreasing",
        description="Of the updates that phi gives to the student, how many write anew: from all "
        "to none over train.steps, from none to all, or half; before the buffer is full, all.",
    )
    rise: float = Field(0.1, gt=0, le=1, description="By which phi rises, to 1 at most.")
    tolerance: float = Field(
        0.1,
        ge=0,
        le=1000,
        description="phi rises where eval/loss is at least the loss of the last rise, or of the "
        "first validation, and this much, in nats.",
    )


class Rollout(Drawing):
    """Text that the student writes itself, answers to data.prompts, in place of given text."""

    share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="GKD's lambda (lmbda): the chance that an update learns from the student's "
        "answers, drawn once for each update; the others learn from data.train. With replay it is "
        "phi of the first update.",
    )
    prompts_per_step: Size = Field(description="Prompts that an update learns from.")
    samples: Size = Field(1, description="Answers to each prompt (num_generations).")
    max_new_tokens: Size = Field(description="Tokens of an answer at most, its end included.")
    temperature: Temperature = Field(
        1.0, description="T of the sampling; the loss has its own. 0 is greedy."
    )
    max_age: int = Field(
        0,
        ge=0,
        le=1000,
        description="Updates by which an answer may be older than the parameters that learn from "
        "it: the prompts of max_age + 1 updates are answered at once. Checkpoints keep the answers "
        f"that later updates learn from, at most {AHEAD_BYTES // 10**6} MB.",
    )
    replay: Replay | None = Field(
        None, description="Lets the share adapt, as DistiLLM does; null: it stays as it is."
    )
    distilled_tokens: Count | None = Field(
        None, description="Only so many tokens at the beginning of an answer count; null: all."
    )
    slots: Count | None = Field(
        None,
        description="Answers that are written at the same time, over all devices; null: all of "
        f"them, at most {SLOTS_PER_DEVICE} for each device of mesh.data * mesh.fsdp.",
    )
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="In which keys and values are kept while answers are written; auto: "
        "student.compute_dtype.",
    )

    @property
    def answers(self) -> int:
        """Answers that an update learns from, the rows of its batch at most."""
        return self.prompts_per_step * self.samples

    @property
    def answer_bytes(self) -> int:
        """Bytes that an answer takes at most in a checkpoint."""
        return _TOKEN_BYTES * self.max_new_tokens + _ANSWER_BYTES

    @property
    def ahead_bytes(self) -> int:
        """Bytes that a checkpoint takes at most for answers that later updates learn from."""
        replayed = 0 if self.replay is None else self.replay.capacity
        return (self.max_age * self.answers + replayed) * self.answer_bytes

    @property
    def reads(self) -> bool:
        """Whether any update learns from given text."""
        return self.share < 1

    @property
    def writes(self) -> bool:
        """Whether any update learns from the student's text."""
        return self.share > 0 or self.replay is not None

    def slots_on(self, parts: int) -> int:
        """How many answers are written at the same time, over mesh.data * mesh.fsdp parts."""
        at_once = self.answers * (self.max_age + 1)
        return self.slots or min(-(-at_once // parts), SLOTS_PER_DEVICE) * parts

    def slots_problems(self, parts: int) -> Iterator[Problem]:
        """Rule: every part of mesh.data * mesh.fsdp has as many slots as the others."""
        if self.slots is not None and self.slots % parts:
            yield ("slots",), f"must be a multiple of mesh.data * mesh.fsdp ({parts})"

    def _replay_problems(self) -> Iterator[Problem]:
        """Rules: something adapts, and the buffer holds the answers of an update."""
        if self.share == 1:
            yield ("share",), "replay adapts the share, which is 1 already: use 0.0"
        if self.max_age:
            yield ("max_age",), "replay meets old answers itself: remove it"
        if self.replay is not None and self.replay.capacity < self.answers:
            rule = f"must hold the answers of an update ({self.answers}): raise it"
            yield ("replay", "capacity"), rule

    def problems(self) -> Iterator[Problem]:
        """Rules: no setting without effect, and checkpoints that can be read."""
        if self.ahead_bytes > AHEAD_BYTES:
            rule = f"checkpoints would keep up to {self.ahead_bytes / 1e6:.0f} MB of answers, and "
            rule += f"{AHEAD_BYTES // 10**6} MB are the limit"
            where = ("max_age",) if self.replay is None else ("replay", "capacity")
            yield where, f"{rule}: lower it, or max_new_tokens"
        if self.replay is not None:
            yield from self._replay_problems()
        yield from super().problems()
        if self.temperature == 0 and self.samples > 1:
            yield ("samples",), "would all be the same at temperature 0: use 1"
        if self.distilled_tokens is not None and self.distilled_tokens > self.max_new_tokens:
            rule = f"has no effect above max_new_tokens ({self.max_new_tokens}): remove it"
            yield ("distilled_tokens",), rule


def with_batch_size(raw: Any) -> Any:
    """A configuration as it is given, with the batch size that its rollouts need.

    What is given stays: `problems` says so where it is another one.
    """
    if not isinstance(raw, Mapping):
        return raw
    rollout, train = raw.get("rollout"), raw.get("train")
    if isinstance(rollout, Mapping):
        sizes = rollout.get("prompts_per_step"), rollout.get("samples", 1)
        if not all(type(size) is int and 0 < size <= 10**7 for size in sizes):
            return raw  # which is reported
        rows = sizes[0] * sizes[1]
    elif isinstance(rollout, Rollout):
        rows = rollout.answers
    else:
        return raw
    if isinstance(train, Mapping) and "batch_size" not in train:
        return {**raw, "train": {**train, "batch_size": rows}}
    if isinstance(train, Section) and "batch_size" not in train.model_fields_set:
        return {**raw, "train": train.model_copy(update={"batch_size": rows})}
    return raw


def problems(config: Any) -> Iterator[Problem]:
    """What is wrong between `rollout` and the other sections of a `Config`."""
    rollout, data = config.rollout, config.data
    if rollout is None and methods.of(config.method).reads_sampler:
        rule = f"{config.method.name} learns from tokens that the student draws: add rollout"
        yield ("method", "name"), rule
    if rollout is None:
        if data.prompts:
            yield ("data", "prompts"), "has no effect without a section rollout: remove it"
        if not data.train:
            given = "train" in data.model_fields_set
            yield ("data", "train"), "needs 1 or more entries" if given else "required, but missing"
        return
    if not data.prompts:
        rule = "rollout answers prompts, and there are none: name files, such as [{path: p.jsonl}]"
        yield ("data", "prompts"), rule
    if not data.train and rollout.share < 1:
        rule = f"rollout.share = {rollout.share:g} leaves updates to data.train, which is empty"
        yield ("data", "train"), f"{rule}: name files, or use share: 1.0"
    if not data.train and config.eval.compare:
        rule = "the SFT control learns from given answers, and data.train is empty"
        yield ("eval", "compare"), f"{rule}: name files there, or remove it"
    if data.held_out_share is not None:
        rule = "a share of data.train may be among data.prompts: name files of its own"
        yield ("data", "eval"), rule
    if rollout.max_new_tokens >= data.seq_len:
        rule = f"leaves no room for a prompt within data.seq_len ({data.seq_len}): lower it"
        yield ("rollout", "max_new_tokens"), rule
    if rollout.replay is not None and config.train.eval_every is None:
        rule = "adapts to the validation loss, and train.eval_every is null: give a number of steps"
        yield ("rollout", "replay"), rule
    if config.train.batch_size != rollout.answers:
        rule = f"follows from rollout: prompts_per_step * samples = {rollout.answers}: remove it"
        yield ("train", "batch_size"), rule
    yield from _method_problems(config)
    parts = config.mesh.row_parts
    yield from ((("rollout", *key), rule) for key, rule in rollout.slots_problems(parts))


def _method_problems(config: Any) -> Iterator[Problem]:
    """The method learns from rewards, see `config.reward`, or from a teacher at hand."""
    if not methods.of(config.method).rewards:
        yield from _divergence_problems(config)
    several = {("teachers", name): one for name, one in (config.teachers or {}).items()}
    asked = {("teacher",): config.teacher, **several}
    served = any(teacher is not None and teacher.served for teacher in asked.values())
    if served and methods.of(config.method).needs_teacher(config.method):
        yield from _served_problems(config)
    for path, teacher in asked.items():
        if teacher is not None and teacher.cache:
            remedy = "the server is asked while it does" if teacher.api else "and name the model"
            rule = f"was never asked about what the student will write: remove it, {remedy}"
            yield (*path, "cache"), rule


def _divergence_problems(config: Any) -> Iterator[Problem]:
    """The method minimises a divergence from a teacher that can read any text."""
    name, row = config.method.name, methods.of(config.method)
    if not row.needs_teacher(config.method):
        rule = f"{name} has no teacher: the student would learn its own words from itself"
        yield ("method", "name"), f"{rule}: use a method with a teacher"
    elif row.sides or not row.any_text:
        rule = f"{name} needs text that is given and marked, and the student writes its own"
        yield ("method", "name"), f"{rule}: use another method"
    elif config.rollout.writes and _most(getattr(config.method, "alpha", 0.0)) > 0:
        rule = "the labels of what the student writes are its own words: use 0"
        yield ("method", "alpha"), rule
    if row.reads_sampler:
        yield from _sampler_problems(config)


def _served_problems(config: Any) -> Iterator[Problem]:
    """A server says log p of drawn tokens at T = 1, and nothing of text that is held out."""
    reads = methods.of(config.method).reads(config.method)
    for path, rule in signals.problems(config.method, reads, signals.SERVED, ()):
        yield ("method", *path), rule.removeprefix(f"{signals.temperature(config.method)}: ")
    best = config.checkpoint.best_metric
    if best in ("eval/kl_t1", "eval/agree_top1"):
        rule = "is measured against a teacher at hand, and a server is asked about drawn tokens"
        yield ("checkpoint", "best_metric"), f"{rule}: use eval/loss"


def _sampler_problems(config: Any) -> Iterator[Problem]:
    """A method that reads with which probability tokens were drawn reads it of every token."""
    rollout, name = config.rollout, config.method.name
    if rollout.replay is not None:
        rule = f"{name} needs the ratio to the sampler, which old answers make large: remove it"
        yield ("rollout", "replay"), rule
    elif rollout.share < 1:
        rule = f"{name} learns from drawn tokens, and nobody drew those of data.train: use 1.0"
        yield ("rollout", "share"), rule
    for filter in ("top_k", "top_p", "min_p"):
        if getattr(rollout, filter) is not None:
            rule = f"{name} compares the probabilities of all tokens, not of those kept: remove it"
            yield ("rollout", filter), rule
    if rollout.temperature != signals.temperature(config.method):
        rule = f"must be rollout.temperature ({rollout.temperature:g}), which tokens are drawn at"
        if hasattr(config.method, "temperature"):
            yield ("method", "temperature"), rule
        else:
            yield ("rollout", "temperature"), f"{name} reads probabilities at 1: use 1.0"


def _most(alpha: Any) -> float:
    """The largest value of a knob."""
    return alpha if isinstance(alpha, int | float) else max(alpha.start, alpha.end)
