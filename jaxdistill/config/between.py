"""What the sections of a run's configuration ask of each other."""

from collections.abc import Iterator
from typing import Any

from jaxdistill import methods, rules
from jaxdistill.config import (
    ahead,
    oneself,
    quantize,
    reward,
    rollout,
    routing,
    sparsity,
    stages,
)
from jaxdistill.section import Problem


def problems(config: Any) -> Iterator[Problem]:
    """What is wrong between the sections of a `Config`."""
    for rule in _RULES:
        yield from rule(config)


def _teacher_problems(config: Any) -> Iterator[Problem]:
    """What needs a teacher has one."""
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
    if teacher and teacher.sharding != "fsdp" and student.from_ == "teacher":
        rule = "the student, cut out of it, would lie as it does: use fsdp, or student.source"
        yield ("teacher", "sharding"), rule
    if methods.of(config.method).is_control and config.eval.compare:
        rule = f"has no effect with method {config.method.name}, which is the control itself"
        yield ("eval", "compare"), rule
    if methods.of(config.method).pairs and config.eval.compare:
        rule = "the SFT control would learn the rejected answers too: remove it"
        yield ("eval", "compare"), rule


def _tokenizer_problems(config: Any) -> Iterator[Problem]:
    """The tokenizer of the run exists."""
    student, teacher = config.student, config.teacher
    itself = teacher is not None and teacher.self_ is not None
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


def _second_view_problems(config: Any) -> Iterator[Problem]:
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
    if config.teacher is not None and config.teacher.api is not None:
        rule = f"says the likeliest tokens alone, and method {name} reads whole rows of its own"
        yield ("teacher", "api"), f"{rule}: give teacher.source"
    if config.data.special_tokens == "parse":
        rule = "special tokens are written for one model, and there are two tokenizers: use text"
        yield ("data", "special_tokens"), rule


def _origin_problems(config: Any) -> Iterator[Problem]:
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


def _size_problems(config: Any) -> Iterator[Problem]:
    """Batches divide over the mesh; the schedule fits into the steps."""
    train, warmup = config.train, config.optimizer.warmup
    if isinstance(warmup, int) and warmup >= train.steps:
        rule = f"must be below train.steps ({train.steps}), or a fraction below 1"
        yield ("optimizer", "warmup"), rule
    parts = config.mesh.row_parts
    yield from rules.batches(train.batch_size, train.micro_batches, config.eval.batch_size, parts)


def _once_problems(config: Any) -> Iterator[Problem]:
    """What crosses the mesh once a step would cross it several times."""
    place, wanted = ("train", "gather_once"), config.train.gather_once
    if wanted == "none":
        return
    if config.teachers is not None:
        yield place, "each micro-batch is of one of several teachers: use none"
    elif config.train.micro_batches == 1:
        yield place, "has no effect with train.micro_batches: 1, where all crosses once: use none"
    elif wanted == "teacher" and not _reads_in_the_step(config):
        yield place, "no teacher computes in the step: use none, or both for the student's layers"
    if wanted == "both" and config.student.quantize is not None:
        rule = "student.quantize rounds the weights of every micro-batch where they lie: use "
        yield place, f"{rule}teacher or none"


def _reads_in_the_step(config: Any) -> bool:
    """Whether a teacher computes in the step: none that is stored or served."""
    teacher, method = config.teacher, methods.of(config.method)
    if method.needs_start(config.method):
        return True
    needed = method.needs_teacher(config.method) and teacher is not None
    return needed and teacher.cache is None and not teacher.served


_RULES = (
    routing.problems,
    _teacher_problems,
    _tokenizer_problems,
    oneself.problems,
    _second_view_problems,
    _origin_problems,
    _size_problems,
    _once_problems,
    rollout.problems,
    reward.problems,
    quantize.problems,
    sparsity.problems,
    stages.problems,
    ahead.problems,
)
