"""The options of several teachers, `teachers:` and `routing:`, and what cannot go with them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from jaxdistill import methods
from jaxdistill.config.models import Teacher
from jaxdistill.config.rollout import TeacherName
from jaxdistill.methods import signals
from jaxdistill.section import Problem, Section

if TYPE_CHECKING:  # NumPy, which `--help` and `validate` do without
    from jaxdistill.data import routes

Teachers = Annotated[dict[TeacherName, Teacher], Field(min_length=1, max_length=64)]


class Routing(Section):
    """Several teachers: which record is for whom, and what each counts for."""

    default: TeacherName | None = Field(
        None, description="The teacher of records that name none; null: they are an error."
    )
    normalise: Literal["token", "teacher"] = Field(
        "token",
        description="token: the loss is a mean over all tokens of the batch; teacher: a mean over "
        "the teachers in it, each a mean over its own tokens, so that one with few counts as much.",
    )


def of(config: Any) -> "routes.TeacherRoutes | None":
    """Who the records of a run may be for; None where there are not several teachers."""
    if config.teachers is None:
        return None
    default = None if config.routing is None else config.routing.default
    from jaxdistill.data import routes

    return routes.TeacherRoutes(tuple(config.teachers), default)


def layout(config: Any) -> "routes.MicroBatchLayout | None":
    """How the batches of a run lie, where it has several teachers."""
    if config.teachers is None:
        return None
    from jaxdistill.data import routes

    return routes.MicroBatchLayout(len(config.teachers), config.train.micro_batches)


def rows(config: Any) -> int:
    """Rows of the batch that the step takes, padding between teachers among them."""
    lies = layout(config)
    return config.train.batch_size if lies is None else lies.size(config.train.batch_size)


def each(config: Any) -> dict[str, Any]:
    """The configuration as it would be with each of several teachers alone; random ones differ."""
    alone = {"teachers": None, "routing": None}
    return {
        name: config.model_copy(update={**alone, "teacher": teacher, "seed": config.seed + place})
        for place, (name, teacher) in enumerate((config.teachers or {}).items())
    }


def problems(config: Any) -> Iterator[Problem]:
    """What is wrong between `teachers`, `routing` and the other sections of a `Config`."""
    yield from _named(config)
    if config.teachers is None:
        if config.routing is not None:
            yield ("routing",), "has no effect without teachers: remove it"
        return
    if config.teacher is not None:
        yield (
            ("teachers",),
            "give teacher, or teachers by name, not both: teacher: null removes one",
        )
    for name, teacher in config.teachers.items():
        if teacher.served and config.rollout is None:
            rule = "a server takes no part in a step: `jaxdistill teacher cache --teacher "
            rule += f"{name}` asks it once, into the folder that is named here; with rollout, "
            yield ("teachers", name, "cache"), f"{rule}sampled_kl asks it while the student writes"
        if teacher.self_ is not None:
            rule = "the student itself teaches alone: give source or random, or teacher.self"
            yield ("teachers", name, "self"), rule
        if teacher.offload:
            yield ("teachers", name, "offload"), "one teacher alone can wait on the host: remove it"
        if teacher.mesh is not None:
            rule = "one teacher alone can have devices of its own: remove it"
            yield ("teachers", name, "mesh"), rule
    if (why := problem(config.method)) is not None:
        yield (
            ("method", "name"),
            f"{config.method.name} {why}: it does not go with several teachers",
        )
    if config.reward is not None and config.routing and config.routing.normalise == "teacher":
        rule = "would weigh rewards by how much text is for a teacher: use token"
        yield ("routing", "normalise"), rule
    student, several = config.student, "and there are several teachers"
    if student.from_ == "teacher":
        yield ("student", "from"), f"is cut out of one, {several}: give student.source"
    if student.random and student.random.like == "teacher":
        yield ("student", "random", "like"), f"is like one, {several}: give a path"
    if config.tokenizer.from_ == "teacher":
        yield ("tokenizer", "from"), f"is that of one, {several}: use student, bytes or a path"


def problem(options: Any) -> str | None:
    """Why a method cannot learn from several teachers; None where it can."""
    row = methods.of(options)
    silent = "has no teacher with teacher_weight: 0" if row.rewards else "has no teacher"
    for alone, why in (
        (not row.needs_teacher(options), silent),
        (row.second_view, "has a teacher read tokens of its own"),
        (row.reads(options) == signals.LAYERS, "reads layers, whose widths it fits to one teacher"),
        (bool(row.sides), "compares text of several origins"),
        (not (row.any_text or row.rewards), "reads records of a form of their own"),
    ):
        if alone:
            return why
    return None


def _named(config: Any) -> Iterator[Problem]:
    """Whoever is named is there."""
    known = config.teachers or {}
    data = config.data
    groups = {"train": data.train, "prompts": data.prompts, "eval": data.eval_files}
    named: dict[tuple[str | int, ...], str | None] = {
        ("data", group, place, "teacher"): source.teacher
        for group, sources in groups.items()
        for place, source in enumerate(sources)
    }
    if config.reward is not None and config.reward.held_out is not None:
        for place, source in enumerate(config.reward.held_out.prompts):
            named["reward", "held_out", "prompts", place, "teacher"] = source.teacher
    if config.teachers is not None and config.routing is not None:
        named["routing", "default"] = config.routing.default
    for path, name in named.items():
        if name is not None and name not in known:
            there = f"there are {', '.join(known)}" if known else "there is no section teachers"
            yield path, f"no such teacher: {there}"
