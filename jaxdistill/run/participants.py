"""Who takes part in a run: shapes and tokenizers of teacher and student, then their weights."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdistill import errors, methods, rules
from jaxdistill.compress import command, importance, prune, quantize
from jaxdistill.config import Config
from jaxdistill.config import oneself as options
from jaxdistill.data import spelling
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.second_view import SecondView
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice
from jaxdistill.methods import two_tokenizers
from jaxdistill.models import DecoderConfig, Model, attention, attention_check, random, reseat
from jaxdistill.models.vocabulary import check_rows, vocabulary_size
from jaxdistill.references import load_any
from jaxdistill.run import changes, oneself, pairing, routing, shapes, states, stored
from jaxdistill.run.ahead import Ahead, check_meshes, divided, on_own_mesh
from jaxdistill.run.pairing import Pairing
from jaxdistill.run.teaching import Nobody, Online, Served, StudentStart, Teaching, online


@dataclasses.dataclass(frozen=True)
class Models:
    """Who takes part.

    Attributes:
      teaching: the teacher, of whatever kind, or several, or nobody.
      student: float32 (or as configured) parameters on the mesh.
      tokenizer: of both; of the student where there is a second view.
      vocab: how many rows of the heads are tokens; where the teacher has its own, of the student's.
      pairing: how the tokenizer fits those that the models come with.
      start: the student before the first step, where the method compares with it: a copy of its
        weights in student.compute_dtype.
      second: the teacher's own tokens, where the method has it read them; or None.
      context: how the prompts of a teacher are made that is the student itself; or None.
    """

    teaching: Teaching
    student: Model
    tokenizer: Any
    vocab: int
    pairing: Pairing = Pairing()
    start: Model | None = None
    second: SecondView | None = None
    context: PrivilegedView | None = None

    @property
    def teacher(self) -> Model | None:
        """The one teacher in the step; None where there is none there, or several."""
        return self.teaching.model if isinstance(self.teaching, Online) else None

    def read_length(self, length: int) -> int:
        """Tokens in a row that the teacher reads, of rows of `length` tokens of the student's."""
        return length if self.second is None else self.second.seq_len

    @property
    def read(self) -> tuple[Any, int]:
        """The tokenizer of what the teacher reads, and how many tokens it has."""
        return _read(self.second, self.tokenizer, self.vocab)


class InStep(NamedTuple):
    """A model that the step computes.

    Attributes:
      model: its shape.
      vocab: tokens of the tokenizer whose ids it reads.
      length: tokens in a row.
      attention: the form that was asked for.
      dtype: that it computes in.
    """

    model: Model
    vocab: int
    length: int
    attention: str
    dtype: str


def _read(second: SecondView | None, tokenizer: Any, vocab: int) -> tuple[Any, int]:
    """The tokenizer of what a teacher reads, and how many tokens it has."""
    if second is None:
        return tokenizer, vocab
    return second.tokenizer, vocabulary_size(second.tokenizer)


def given_of(config: Config) -> shapes.Given:
    """What a configuration says of its models."""
    network = config.security.allow_network
    seq_len = config.data.seq_len
    return shapes.Given(config.teacher, config.student, config.tokenizer, seq_len, network)


def shapes_of(config: Config, mesh: Mesh, devices: Sequence[Any] | None = None) -> Models:
    """The models without parameters, from their small files, once they can work together.

    Args:
      config: of the run.
      mesh: of the student.
      devices: of the run, some of which may be the teacher's own; None: all.

    Raises:
      ModelError, MismatchError, ConfigError: for what is missing or does not fit.
    """
    given = given_of(config)
    shape, student = shapes.of(given)
    itself = options.of(config)
    named = {"teacher": student if shape is None and itself else shape, "student": student}
    tokenizer = shapes.named_tokenizer(given, named)
    vocab = shapes.vocabulary(config.tokenizer, tokenizer)
    shape, student = shapes.ended(shape, tokenizer), shapes.ended(student, tokenizer)
    second = _second_view(config, shape, tokenizer, mesh)
    best, words = config.checkpoint.best_metric, _read(second, tokenizer, vocab)
    asked_before = stored.of(config.teacher, config.method, shape, *words, best_metric=best)
    shape = shape if asked_before is None else None
    pairs, seated = pairing.of(
        tokenizer,
        shape if second is None else None,  # it reads its own tokens
        student,
        born=config.student,
        named=config.tokenizer.from_,
        needs_teacher=methods.of(config.method).needs_teacher(config.method),
        best_metric=best,
    )
    shape = seated if second is None else shape
    several = routing.several_of(
        config.teachers,
        config.routing,
        given,
        tokenizer,
        vocab,
        student,
        method=config.method,
        best_metric=best,
        seed=config.seed,
    )
    teaching = several or asked_before or _alone(config, shape, student, pairs, second, devices)
    models = Models(teaching, student, tokenizer, vocab, pairs, second=second)
    for name, one in _in_step(config, models).items():
        check_rows(name, one.model.config.vocab_size, one.vocab)
        errors.check(rules.row_length(one.length, name, one.model.config.max_positions))
    models = dataclasses.replace(models, context=oneself.view_of(itself, config.data, tokenizer))
    oneself.check(models.context, student.config, mesh)
    _check_devices(config, models, mesh)
    return models


def _in_step(config: Config, models: Models) -> dict[str, InStep]:
    """The models of the step by the keys of their sections: teachers that are online, student."""
    theirs, student = models.read_length(config.data.seq_len), config.student
    shapes_by_name = {
        key: InStep(one.model, models.read[1], theirs, one.given.attention, one.given.dtype)
        for key, one in online(models.teaching).items()
    }
    shapes_by_name["student"] = InStep(
        models.student,
        models.vocab,
        config.data.seq_len,
        student.attention,
        student.compute_dtype,
    )
    return shapes_by_name


def _check_devices(config: Config, models: Models, mesh: Mesh) -> None:
    """Everything that the devices ask of the models of the step.

    Raises:
      ConfigError, ModelError: for what they cannot divide, hold or compute.
    """
    in_step, given = _in_step(config, models), given_of(config)
    states.check(config, models.student.config, mesh)
    shaped = {who: one.model.config for who, one in in_step.items()}
    check_meshes(models.teaching, mesh, shaped, config.data.seq_len)
    device = mesh.devices.flat[0]
    for key, section in config.teacher_sections.items():
        one = in_step.get(key)
        shapes.check_teacher(key, section, None if one is None else one.model.config, device)
    shapes.check_student(given, models.student, device)
    if config.teacher is not None and config.teacher.offload:
        states.check_host("teacher.offload", device, "spread the teacher")
    for one in online(models.teaching).values():
        if one.given.quantize:
            shapes.teacher_rounded(one.given, given.network)
    for who, one in in_step.items():
        with jax.set_mesh(mesh), on_own_mesh(models.teaching, who):
            platform = choice.current_device().platform
            attention.check(one.attention, one.model.config, one.length, platform)


def _alone(
    config: Config,
    shape: Model | None,
    student: Model,
    pairs: Pairing,
    second: SecondView | None,
    devices: Sequence[Any] | None,
) -> Teaching:
    """The one teacher that was not asked before, or nobody."""
    given, itself = config.teacher, options.of(config)
    if itself is not None:
        start = (
            StudentStart(config.student, student)
            if oneself.copies(itself, config.student)
            else None
        )
        offload = config.optimizer.offload
        return oneself.Itself(itself, config.student, offload, student.config, start)
    if given is not None and shape is not None:
        network = config.security.allow_network
        _, own = divided(given, devices)
        made = Online if own is None else functools.partial(Ahead, mesh=own)
        return made(given, shape, config.seed + 1, network, pairs, second is not None)
    return Served(given.api) if given is not None and given.served and given.api else Nobody()


def _second_view(
    config: Config, teacher: Model | None, tokenizer: Any, mesh: Mesh
) -> SecondView | None:
    """The tokens that the teacher reads, where the method gives it its own.

    Raises:
      ConfigError: for a mesh that parts rows by their length.
    """
    if not methods.of(config.method).second_view:
        return None
    if mesh.shape["context"] > 1:
        raise ConfigError(
            f"mesh.context = {mesh.shape['context']}: method {config.method.name} sums over chunks "
            "of text, which lie elsewhere in the rows of teacher and student: use mesh.context: 1"
        )
    own = None if teacher is None else teacher.tokenizer
    length = two_tokenizers.length(config.method, config.data.seq_len)
    return SecondView(tokenizer if own is None else own, length)


def load_models(config: Config, models: Models, mesh: Mesh) -> Models:
    """The models of `shapes_of` with parameters on the mesh, read from their files or made.

    Raises:
      ModelError, ConfigError: if weights cannot be read, or are not those of the shapes.
    """
    with jax.set_mesh(mesh):
        chosen = attention_of(config, models)
    for who, (name, model, length, dtype) in chosen.items():
        attention_check.self_check(who, name, model, length, dtype)
    models = dataclasses.replace(models, teaching=models.teaching.loaded(mesh))
    student = student_of(config, models.student, models.teacher, mesh)
    student = dataclasses.replace(student, tokenizer=models.tokenizer)
    start, teaching = None, models.teaching
    if methods.of(config.method).needs_start(config.method):
        start = _start(config, student)
    if isinstance(teaching, oneself.Itself) and teaching.start is not None:
        start = _start(config, student) if start is None else start
        teaching = dataclasses.replace(teaching, start=StudentStart(config.student, start))
    return dataclasses.replace(models, student=student, start=start, teaching=teaching)


def attention_of(config: Config, models: Models) -> dict[str, tuple[str, DecoderConfig, int, str]]:
    """What computes whose attention on the mesh in context: (form, model, tokens of a row, dtype).

    The form is as `attention.chosen` names it.
    """
    loaded = {}
    for who, one in _in_step(config, models).items():
        with on_own_mesh(models.teaching, who):
            form = attention.chosen(one.attention, one.model.config, one.length, one.dtype)
        loaded[who] = (form, one.model.config, one.length, one.dtype)
    return loaded


def _start(config: Config, student: Model) -> Model:
    """A copy of the student, which stays as it is, in the type that it computes in.

    Whole numbers of `student.base` stay such.
    """
    dtype = jnp.dtype(config.student.compute_dtype)

    def copied(leaf: Any) -> jax.Array:
        return jnp.array(leaf, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)

    return dataclasses.replace(student, params=jax.tree.map(copied, student.params))


def _uncut_teacher(config: Config, mesh: Mesh) -> Model:
    """The weights that the student is cut out of, read for this alone, as their files have them.

    Raises:
      MismatchError: if they are not those that were asked.
    """
    assert config.teacher is not None
    given = given_of(config)
    shape = shapes.teacher_of(given)
    assert shape is not None, "the configuration names the weights to cut the student out of"
    section = config.teacher.model_copy(update={"offload": False})
    teacher = Online(section, shape, config.seed + 1, given.network).loaded(mesh).model
    # A random one is made anew, on another mesh rounded otherwise.
    if config.teacher.cache and not config.teacher.random:
        stored.check_weights(config.teacher.cache, changes.weights(teacher.params))
    return teacher


def _cut_out(config: Config, shape: Model, teacher: Model) -> Model:
    """The layers, or the units, of a teacher that make a student."""
    student, dtype = config.student, config.student.param_dtype
    if student.prune:
        scores = importance.load(student.prune.importance)
        made, _ = command.cut(teacher, student.prune, scores, dtype)
        return dataclasses.replace(made, tokenizer=shape.tokenizer)
    layers = shapes.kept_layers(student, teacher.config.layers)
    arch, params = prune.keep_layers(teacher.config, teacher.params, layers, dtype)
    return dataclasses.replace(shape, config=arch, params=params)


def _respelled(config: Config, made: Model, shape: Model, teacher: Model) -> Model:
    """A student with rows for the tokens of its own tokenizer.

    Raises:
      ConfigError: for rows of a teacher whose tokens nobody knows.
    """
    if config.student.embeddings == "random":
        none: list[list[int]] = [[]] * shape.config.vocab_size
        return reseat.respelled(made, none, shape.config, jax.random.key(config.seed))
    if teacher.tokenizer is None:
        raise ConfigError(
            "student.embeddings = mean: the teacher has no tokenizer that says what its rows "
            "spell: use random"
        )
    rows = spelling.spelled(shape.tokenizer, teacher.tokenizer, teacher.config.vocab_size)
    rows += [[]] * (shape.config.vocab_size - len(rows))
    return reseat.respelled(made, rows, shape.config)


def student_of(config: Config, shape: Model, teacher: Model | None, mesh: Mesh) -> Model:
    """A student before its first step, with arrays of its own, its frozen kernels as they stay.

    Raises:
      ConfigError: if groups of `student.base` do not divide a projection.
    """
    made = _born(config, shape, teacher, mesh)
    base = quantize.of(config.student.base)
    if base is None or config.student.source is not None:  # rounded as it was read
        return made
    return dataclasses.replace(quantize.quantized(made, base), source=made.source)


def _born(config: Config, shape: Model, teacher: Model | None, mesh: Mesh) -> Model:
    """A student in floating point; with `student.base` one that is read is rounded as it is."""
    student, dtype = config.student, config.student.param_dtype
    if student.from_ == "teacher":
        section = config.teacher
        away = section is not None and (section.offload or section.mesh is not None)
        if teacher is None or student.tokenizer or away:  # stored, aside, in other ids, elsewhere
            teacher = _uncut_teacher(config, mesh)
        made = _cut_out(config, shape, teacher)
        return made if student.tokenizer is None else _respelled(config, made, shape, teacher)
    if student.random:
        return random(shape.config, config.seed, dtype, mesh)
    return load_any(
        shapes.source(student),
        dtype=dtype,
        mesh=mesh,
        tokenizer=False,
        allow_network=config.security.allow_network,
        rounded=quantize.of(student.base),
    )
