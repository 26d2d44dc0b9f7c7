"""The options of a teacher that is the student itself, `teacher.self`, and what goes with it."""

import string
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxdistill import methods
from jaxdistill.data.context_names import PROMPT, SIBLING, places
from jaxdistill.data.records import NOTES
from jaxdistill.methods import signals
from jaxdistill.section import PLAIN_PATTERN, Problem, Section, Size

FIELDS = tuple(name for name in NOTES if name != "teacher")
_OF_CONTEXT = {
    "without_context": "refuse",
    "long_context": "leave_out",
    "seq_len": None,
    "skip_first": 0,
    "template_kwargs": {},
    "leak_phrases": "auto",
}


class Oneself(Section):
    """The student itself as its teacher: its weights of some time, behind a fuller prompt."""

    weights: Literal["frozen", "ema", "live"] = Field(
        description="Whose: those before the first step (frozen; with student.lora the model "
        "without its adapters, and no copy), their moving average (ema; with student.lora of the "
        "adapters), or those of the moment (live); no gradient reaches them."
    )
    ema_decay: float = Field(
        0.95,
        ge=0,
        le=1,
        description="d of the average: d * average + (1 - d) * student (1 - ema_update_rate).",
    )
    ema_every: Size = Field(1, description="Updates between two moves of the average (sync_steps).")
    context: Annotated[str, Field(min_length=1, max_length=20000)] | None = Field(
        None,
        description="The teacher's prompt as a template: {prompt} is the prompt, in a chat the "
        "user's last message; {" + "}, {".join(FIELDS) + "} are fields of the record (privileged "
        "context), {sibling} is a right answer of the same group, where there are rewards. Null: "
        "it reads what the student reads.",
    )
    without_context: Literal["refuse", "mask"] = Field(
        "refuse",
        description="What becomes of records without one of these fields: they are broken "
        "(refuse), or teach nothing and are left out (mask).",
    )
    long_context: Literal["leave_out", "cut"] = Field(
        "leave_out",
        description="What becomes of prompts that leave no room for the answer in seq_len: the "
        "record is left out, or the longest field is cut at its end; never the answer.",
    )
    seq_len: Size | None = Field(
        None, description="Tokens in a row of the teacher's view; null: twice data.seq_len."
    )
    skip_first: int = Field(
        0,
        ge=0,
        le=10**6,
        description="So many tokens at the beginning of an answer count nothing "
        "(num_loss_tokens_to_skip).",
    )
    template_kwargs: dict[str, Any] = Field(
        {},
        max_length=20,
        description="What the chat template is given for the teacher, beside or in place of "
        "data.template_kwargs, such as {enable_thinking: true}.",
    )
    leak_phrases: (
        Literal["auto"]
        | Annotated[
            tuple[Annotated[str, Field(min_length=1, max_length=200, pattern=PLAIN_PATTERN)], ...],
            Field(max_length=100, strict=False),
        ]
    ) = Field(
        "auto",
        description="Words whose share of the student's answers is reported as rollout/leaks; "
        "auto: pairs of neighbouring words of the template, of five letters or more.",
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: something is said that the student does not hear; no setting without effect."""
        if self.weights != "ema":
            for name, usual in (("ema_decay", 0.95), ("ema_every", 1)):
                if getattr(self, name) != usual:
                    yield (name,), f"has no effect with weights: {self.weights}: remove it"
        if self.context is None:
            for name, usual in _OF_CONTEXT.items():
                if getattr(self, name) != usual:
                    yield (name,), "has no effect without context: remove it"
            if self.weights == "live":
                rule = "a teacher of the same weights behind the same prompt says the same"
                yield ("weights",), f"{rule}: give context, or use ema or frozen"
            if self.ema_decay == 0 and self.ema_every == 1:
                rule = "the average of one moment says what the student says behind the same prompt"
                yield ("ema_decay",), f"{rule}: give context, raise it, or give ema_every"
            return
        yield from _template_problems(self.context)
        for name, value in self.template_kwargs.items():
            if not isinstance(value, str | int | float | bool | None):
                yield ("template_kwargs", name), "must be text, a number, true, false or null"


def _template_problems(template: str) -> Iterator[Problem]:
    """The template holds the prompt, and something that the student is not told."""
    names = places(template)
    where: tuple[str | int, ...] = ("context",)
    for name in names:
        if name not in (PROMPT, SIBLING, *FIELDS):
            known = ", ".join((PROMPT, SIBLING, *FIELDS))
            yield where, f"{{{name}}} is no field of a record: use {known}"
            return
    if names.count(PROMPT) != 1:
        yield where, f"holds {{prompt}} {names.count(PROMPT)} times: it must stand there once"
    elif len(names) == 1 and not template.replace("{prompt}", "").strip(string.whitespace):
        yield where, "is the student's own prompt: add a field such as {solution}, or leave it out"
    elif len(names) == 1:
        yield where, f"asks for no field of the record: add one of {', '.join(FIELDS)}"


def length(oneself: Oneself, seq_len: int) -> int:
    """Tokens in a row of the teacher's view, beside rows of `seq_len` of the student's."""
    return 2 * seq_len if oneself.seq_len is None else oneself.seq_len


def of(config: Any) -> Oneself | None:
    """The section of a configuration whose method asks for a teacher; None where there is none."""
    teacher = config.teacher
    if teacher is None or not methods.of(config.method).needs_teacher(config.method):
        return None
    return teacher.self_


def problems(config: Any) -> Iterator[Problem]:
    """What is wrong between `teacher.self` and the other sections of a `Config`."""
    oneself = None if config.teacher is None else config.teacher.self_
    if oneself is None:
        return
    where, row, name = ("teacher", "self"), methods.of(config.method), config.method.name
    if not row.needs_teacher(config.method):
        yield where, f"method {name} asks for no teacher: remove it, or use kd or reverse_kd"
        return
    if row.second_view or row.pairs or row.reads(config.method) == signals.LAYERS:
        rule = "needs a teacher that is another model: use kd, reverse_kd, jsd or distillm"
        yield ("method", "name"), f"{name} {rule}"
    student = config.student
    if student.from_ == "teacher" or (student.random and student.random.like == "teacher"):
        yield ("student",), "the teacher is the student itself: name its model in student.source"
    if config.checkpoint.best_metric in ("eval/kl_t1", "eval/agree_top1"):
        rule = "is measured against a teacher at hand, and this one exists in a step: use eval/loss"
        yield ("checkpoint", "best_metric"), rule
    if config.mesh.context > 1 and oneself.context is not None:
        rule = "parts rows by their length, and the teacher's answers lie elsewhere in its rows"
        yield ("mesh", "context"), f"{rule}: use 1"
    yield from _context_problems(config, oneself)


def _context_problems(config: Any, oneself: Oneself) -> Iterator[Problem]:
    """Where the context comes from, and what is compared."""
    if oneself.context is None:
        return
    names, where = places(oneself.context), ("teacher", "self", "context")
    if length(oneself, config.data.seq_len) < config.data.seq_len:
        rule = f"the teacher reads what the student reads and more: at least {config.data.seq_len}"
        yield ("teacher", "self", "seq_len"), rule
    if config.data.train and "completion" in names:
        yield where, "{completion} of given text is the answer itself: use another field"
    rewards = methods.of(config.method).rewards
    if rewards and oneself.skip_first:
        rule = "the tokens that are skipped would earn no reward either: use 0"
        yield ("teacher", "self", "skip_first"), rule
    if SIBLING in names and not rewards:
        rule = (
            "{sibling} is an answer that was judged: use it with method grpo and a section reward"
        )
        yield where, rule
    if config.rollout is not None and oneself.skip_first >= config.rollout.max_new_tokens:
        rule = f"leaves nothing of answers of {config.rollout.max_new_tokens} tokens: lower it"
        yield ("teacher", "self", "skip_first"), rule
    for name, kinds in (("loss_on", ("completion", "assistant")), ("turns", ("whole",)),
                        ("long_documents", ("auto", "reject"))):  # fmt: skip
        if config.data.train and getattr(config.data, name) not in kinds:
            rule = f"the context stands before one whole answer: use {' or '.join(kinds)}"
            yield ("data", name), rule
