"""The options of a teacher on devices of its own, `teacher.mesh`, and what cannot go with them."""

import math
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from jaxdistill import methods, rules
from jaxdistill.methods import signals
from jaxdistill.section import Problem, Section, Size

KEY = "teacher.mesh"


class TeacherMesh(Section):
    """A teacher's own devices as a grid: the last ones of each process, `mesh` is of the others."""

    data: Size = Field(1, description="Copies of its parameters (devices).")
    fsdp: Size = Field(1, description="Parts of its parameters and of the batch (devices).")
    tensor: Size = Field(1, description="Parts of heads, MLP and vocabulary (devices).")
    context: Size = Field(1, description="Parts of every row's length (devices).")
    expert: Size = Field(
        1, description="Parts of each layer's experts, and of all that fsdp divides (devices)."
    )

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.model_dump().values())

    @property
    def row_parts(self) -> int:
        """Parts of a batch's rows."""
        return self.data * self.fsdp * self.expert


def problems(config: Any) -> Iterator[Problem]:
    """What is wrong between `teacher.mesh` and the other sections of a `Config`."""
    teacher = config.teacher
    if teacher is None or teacher.mesh is None:
        return
    for why in _excluded(config):
        yield ("teacher", "mesh"), why
    train, parts = config.train, teacher.mesh.row_parts
    yield from rules.batches(
        train.batch_size, passes(train), config.eval.batch_size, parts, where=KEY
    )


def mesh_of(config: Any, who: str) -> tuple[str, Any]:
    """(its key, its options) of the mesh that a model lies on."""
    own = None if config.teacher is None else config.teacher.mesh
    return ("mesh", config.mesh) if own is None or who != "teacher" else (KEY, own)


def meshes(config: Any) -> dict[str, Any]:
    """The options of every mesh of a run, by their keys."""
    return dict(mesh_of(config, who) for who in ("student", "teacher"))


def passes(train: Any) -> int:
    """Parts in which a batch is read there: the micro-batches, or the whole at once."""
    return train.micro_batches if train.gather_once == "none" else 1


def _excluded(config: Any) -> Iterator[str]:
    """Why the teacher cannot read a batch before the step that learns from it."""
    teacher, row, name = config.teacher, methods.of(config.method), config.method.name
    if teacher.cache or not (teacher.source or teacher.random):
        yield "no weights of a teacher are read in this run, or not for its steps: remove it"
    elif not row.needs_teacher(config.method) or row.needs_start(config.method):
        yield f"method {name} asks no teacher, and its devices would be idle: remove it"
    elif row.reads(config.method) == signals.LAYERS:
        rule = "and its final hidden states alone are sent from devices of its own: remove it"
        yield f"method {name} reads its layers, heads or queries, {rule}"
    if config.rollout is not None:
        yield "what the student writes is there too late to be read a step ahead: remove it"
    if teacher.offload:
        yield "layers in host memory (teacher.offload) are for devices that are shared: remove one"
    if teacher.from_ is not None or teacher.until is not None:
        yield "its devices would be idle in some steps (teacher.from, until): remove it, or these"
    if teacher.mesh.context > 1 and row.second_view:
        yield f"method {name} has it read rows of its own tokens: use {KEY}.context: 1"
