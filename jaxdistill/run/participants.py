"""Who takes part in a run: shapes and tokenizers of teacher and student, then their weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

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
from jaxdistill.run.pairing import Pairing
from jaxdistill.run.stored import Stored


@dataclasses.dataclass(frozen=True)
class Models:
    """Who takes part.

    Attributes:
      teacher: None where there is none, or its answers are stored.
      student: float32 (or as configured) parameters on the mesh.
      tokenizer: of both; of the student where there is a second view.
      vocab: how many rows of the heads are tokens; where the teacher has its own, of the student's.
      stored: the teacher whose answers are stored, or None.
      pairing: how the tokenizer fits those that the models come with.
      start: the student before the first step, where the method compares with it: a copy of its
        weights in student.compute_dtype.
      second: the teacher's own tokens, where the method has it read them; or None.
      teachers: several by name, in place of the one, those that are stored or behind servers among
        them; {} where there are not several.
      context: how the prompts of a teacher are made that is the student itself; or None.
    """

    teacher: Model | None
    student: Model
    tokenizer: Any
    vocab: int
    stored: Stored | None = None
    pairing: Pairing = Pairing()
    start: Model | None = None
    second: SecondView | None = None
    teachers: Mapping[str, routing.Teaching] = dataclasses.field(default_factory=dict)
    context: PrivilegedView | None = None

    @property
    def read(self) -> tuple[Any, int]:
        """The tokenizer of what the teacher reads, and how many tokens it has."""
        return _read(self.second, self.tokenizer, self.vocab)


def _read(second: SecondView | None, tokenizer: Any, vocab: int) -> tuple[Any, int]:
    """The tokenizer of what a teacher reads, and how many tokens it has."""
    if second is None:
        return tokenizer, vocab
    return second.tokenizer, vocabulary_size(second.tokenizer)


def check_tensor(mesh: Mesh, named: Mapping[str, DecoderConfig]) -> None:
    """Raises where the tensor axis does not divide a model; the vocabulary may be any size.

    Raises:
      ConfigError: with the numbers and the sizes that would do.
    """
    for who, config in named.items():
        sizes = {"heads": config.heads, "kv_heads": config.kv_heads}
        sizes |= {"experts": config.experts.count} if config.experts else {"mlp": config.mlp}
        errors.check(rules.tensor_axis(mesh.shape["tensor"], who, sizes))


def shapes_of(config: Config, mesh: Mesh) -> Models:
    """The models without parameters, from their small files, once they can work together.

    Raises:
      ModelError, MismatchError, ConfigError: for what is missing or does not fit.
    """
    network = config.security.allow_network
    teacher, student = shapes.of(config, network)
    itself = None if options.of(config) is None else student
    tokenizer = shapes.named_tokenizer(config, {"teacher": teacher or itself, "student": student})
    vocab = shapes.vocabulary(config, tokenizer)
    teacher, student = shapes.ended(teacher, tokenizer), shapes.ended(student, tokenizer)
    second = _second_view(config, teacher, tokenizer, mesh)
    asked_before = stored.of(config, teacher, *_read(second, tokenizer, vocab))
    teacher = teacher if asked_before is None else None
    pairs, seated = pairing.of(
        tokenizer,
        teacher if second is None else None,  # it reads its own tokens
        student,
        born=config.student,
        named=config.tokenizer.from_,
        needs_teacher=methods.of(config.method).needs_teacher(config.method),
        best_metric=config.checkpoint.best_metric,
    )
    teacher = seated if second is None else teacher
    several = routing.shapes_of(config, tokenizer, vocab, student)
    in_step = routing.keyed(routing.online(several))
    named = {"teacher": teacher, "student": student, **in_step}
    read = dict.fromkeys(named, (vocab, config.data.seq_len))
    if second is not None:
        read["teacher"] = _read(second, tokenizer, vocab)[1], second.seq_len
    for name, shape in named.items():
        if shape is None:
            continue
        tokens, length = read[name]
        check_rows(name, shape.config.vocab_size, tokens)
        errors.check(rules.row_length(length, name, shape.config.max_positions))
    context = oneself.view_of(config, tokenizer)
    oneself.check(context, student.config, mesh)
    states.check(config, student.config, mesh)
    check_tensor(mesh, {name: shape.config for name, shape in named.items() if shape})
    asked = routing.keyed(config.teachers or {}) | {"teacher": config.teacher}
    for name, given in asked.items():
        if given and given.quantize:
            quantize.check_backend(given.quantize)
            if named.get(name) is not None:
                shapes.teacher_scheme(given, network)
    sections = {**asked, "student": config.student}
    for name, section in sections.items():
        shape = named.get(name)
        if section is not None and shape is not None:
            with jax.set_mesh(mesh):
                platform = choice.current_device().platform
            attention.check(section.attention, shape.config, read[name][1], platform)
    return Models(
        teacher,
        student,
        tokenizer,
        vocab,
        asked_before,
        pairs,
        second=second,
        teachers=several,
        context=context,
    )


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
    teacher = load_teacher(config, models.pairing.as_loaded(models.teacher), mesh)
    teacher = models.pairing.seated(teacher)
    several = {
        name: _loaded_of_several(one, models.teachers[name], mesh)
        for name, one in routing.each(config).items()
    }
    student = student_of(config, models.student, teacher, mesh)
    student = dataclasses.replace(student, tokenizer=models.tokenizer)
    answers = None if models.stored is None else models.stored.loaded(mesh)
    compared = methods.of(config.method).needs_start(config.method)
    start = _start(config, student) if compared or oneself.copies(config) else None
    return dataclasses.replace(
        models, teacher=teacher, student=student, stored=answers, start=start, teachers=several
    )


def attention_of(config: Config, models: Models) -> dict[str, tuple[str, DecoderConfig, int, str]]:
    """What computes whose attention on the mesh in context: (form, model, tokens of a row, dtype).

    The form is as `attention.chosen` names it.
    """
    found = {}
    length = config.data.seq_len
    if models.teacher is not None and config.teacher is not None:
        theirs = length if models.second is None else models.second.seq_len
        found["teacher"] = (config.teacher.attention, models.teacher, theirs, config.teacher.dtype)
    for name, one in routing.online(models.teachers).items():
        given = (config.teachers or {})[name]
        found[f"teachers.{name}"] = (given.attention, one, length, given.dtype)
    student = config.student
    found["student"] = (student.attention, models.student, length, student.compute_dtype)
    return {
        who: (attention.chosen(name, model.config, tokens, dtype), model.config, tokens, dtype)
        for who, (name, model, tokens, dtype) in found.items()
    }


def _start(config: Config, student: Model) -> Model:
    """A copy of the student, which stays as it is, in the type that it computes in."""
    dtype = jnp.dtype(config.student.compute_dtype)
    params = jax.tree.map(lambda leaf: jnp.array(leaf, dtype), student.params)
    return dataclasses.replace(student, params=params)


def load_teacher(config: Config, shape: Model | None, mesh: Mesh) -> Model | None:
    """The teacher of a shape with its parameters on the mesh; None where there is no shape.

    Raises:
      ModelError, ConfigError: if weights cannot be read, or are not those of the shape.
    """
    return None if shape is None or config.teacher is None else _loaded(config, shape, mesh)


def _loaded(config: Config, shape: Model, mesh: Mesh) -> Model:
    assert config.teacher is not None, "the shape is that of a teacher"
    source, dtype = config.teacher, config.teacher.dtype
    if source.random:
        model = random(shape.config, config.seed + 1, dtype, mesh)
    else:
        model = load_any(
            shapes.source(source),
            dtype=dtype,
            mesh=mesh,
            tokenizer=False,
            allow_network=config.security.allow_network,
        )
    if source.quantize:
        model = quantize.quantized(model, source.quantize)
    return dataclasses.replace(model, tokenizer=shape.tokenizer)


def _loaded_of_several(config: Config, one: routing.Teaching, mesh: Mesh) -> routing.Teaching:
    if isinstance(one, Model):
        return _loaded(config, one, mesh)
    return one.loaded(mesh) if isinstance(one, Stored) else one


def _uncut_teacher(config: Config, mesh: Mesh) -> Model:
    """The weights that the student is cut out of, read for this alone, as their files have them.

    Raises:
      MismatchError: if they are not those that were asked.
    """
    assert config.teacher is not None
    teacher = load_teacher(config, shapes.of(config, config.security.allow_network)[0], mesh)
    assert teacher is not None, "the configuration names the weights to cut the student out of"
    # A random one is made anew, on another mesh rounded otherwise.
    if config.teacher.cache and not config.teacher.random:
        stored.check_weights(config.teacher.cache, changes.weights(teacher.params))
    return teacher


def _cut_out(config: Config, shape: Model, teacher: Model) -> Model:
    """The layers, or the units, of a teacher that make a student."""
    student, dtype = config.student, config.student.param_dtype
    if student.prune:
        found = importance.load(student.prune.importance)
        made, _ = command.cut(teacher, student.prune, found, dtype)
        return dataclasses.replace(made, tokenizer=shape.tokenizer)
    layers = shapes.kept_layers(config, teacher.config.layers)
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
    """A student before its first step, with arrays of its own."""
    student, dtype = config.student, config.student.param_dtype
    if student.from_ == "teacher":
        if teacher is None or student.tokenizer:  # stored, aside, or in other ids
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
    )
