"""Which shapes a run's models have, and their tokenizer, from its configuration: no weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from jaxdistill import errors, rules
from jaxdistill.compress import command, prune, quantize
from jaxdistill.config.models import RandomModel, Student, Teacher, Tokenizer
from jaxdistill.config.quantize import Whole, stages
from jaxdistill.errors import ConfigError, ModelError
from jaxdistill.formats.families import FAMILIES
from jaxdistill.models import DecoderConfig, Model
from jaxdistill.models.architecture import picked
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.models.quantized import SCHEMES, Quantization, name_of
from jaxdistill.models.vocabulary import vocabulary_size
from jaxdistill.references import generation_any, rounded_any, spec_any
from jaxdistill.run import stored


@dataclasses.dataclass(frozen=True)
class Given:
    """What a configuration says of the models of a run.

    Attributes:
      teacher: its section, or None.
      student: its section.
      tokenizer: its section.
      seq_len: tokens in a row.
      network: whether the Hub may be asked.
    """

    teacher: Teacher | None
    student: Student
    tokenizer: Tokenizer
    seq_len: int
    network: bool


def of(given: Given) -> tuple[Model | None, Model]:
    """Configurations and tokenizers of teacher and student, without weights.

    Raises:
      ModelError, ConfigError: for a model that is not there, or numbers that fit no model.
    """
    teacher, student = teacher_of(given), given.student
    if student.from_ == "teacher":
        assert teacher is not None, "the configuration has a teacher to cut the student out of"
        if student.prune:
            small = command.shape_of(teacher.config, student.prune)
            return teacher, _cut(given, teacher, small, "pruned teacher")
        layers = kept_layers(student, teacher.config.layers)
        small = picked(teacher.config, layers)
        return teacher, _cut(given, teacher, small, f"layers {layers} of the teacher")
    if student.random:
        return teacher, _random_shape(student.random, teacher, given, "student.random")
    return teacher, _spec(source(student), given.network)


def teacher_of(given: Given) -> Model | None:
    """The teacher without weights; None where there is none, or no shape of it.

    Raises:
      ModelError, ConfigError: as `of`.
    """
    teacher = given.teacher
    if teacher is None:
        return None
    if teacher.random:
        return _random_shape(teacher.random, None, given, "teacher.random")
    if teacher.source:
        return _spec(teacher.source, given.network)
    return stored.spec(teacher) if teacher.cache else None


def named_tokenizer(given: Given, shapes: Mapping[str, Model | None]) -> Any:
    """The tokenizer that `tokenizer.from` names.

    Raises:
      ModelError: if there is none.
    """
    name = given.tokenizer.from_
    if name in ("teacher", "student"):
        model = shapes.get(name)
        tokenizer = model.tokenizer if model else None
    else:
        return _tokenizer_at("tokenizer.from", name, given.network)
    if tokenizer is None:
        raise _no_tokenizer("tokenizer.from", name)
    return tokenizer


def _tokenizer_at(key: str, name: str, network: bool) -> Any:
    """The tokenizer of a model folder that a setting names, or the one of bytes."""
    if name == "bytes":
        return byte_tokenizer()
    tokenizer = spec_any(name, allow_network=network, tokenizer_only=True)
    if tokenizer is None:
        raise _no_tokenizer(key, name)
    return tokenizer


def _no_tokenizer(key: str, name: str) -> ModelError:
    return ModelError(
        f"{key} = {name!r}: there is no tokenizer: name a model folder that has one, or use bytes"
    )


def vocabulary(section: Tokenizer, tokenizer: Any) -> int:
    """How many rows of the heads are tokens.

    Raises:
      ConfigError: for `tokenizer.rows` below the tokenizer's own number.
    """
    known, rows = vocabulary_size(tokenizer), section.rows
    errors.check(rules.tokenizer_rows(rows, known))
    return rows or known


def ended(shape: Any, tokenizer: Any) -> Any:
    """A random model with the tokenizer's end token, so that what it writes ends; others as is."""
    if shape is None or shape.tokenizer is not None or shape.config.eos_ids:
        return shape
    ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return dataclasses.replace(shape, config=dataclasses.replace(shape.config, eos_ids=ends))


def source(model: Teacher | Student) -> str:
    """Where a model is loaded from that is neither random nor cut out of another."""
    assert model.source is not None, "the configuration gives every model one origin"
    return model.source


def teacher_rounded(teacher: Teacher, network: bool) -> Quantization | None:
    """How the teacher's kernels are held in few bits, by `quantize` or in its own files.

    Raises:
      ConfigError: where both would round them.
    """
    own = None if teacher.random else rounded_any(source(teacher), allow_network=network)
    wanted = quantize.of(teacher.quantize)
    if wanted is None:
        return own
    if own is not None:
        raise ConfigError(
            f"teacher.quantize = {wanted}: {teacher.source} is quantised already: leave it out, or "
            "name the model it was"
        )
    return wanted


def check_teacher(key: str, teacher: Teacher, config: DecoderConfig | None, device: Any) -> None:
    """What `quantize` of a teacher's section says can be done here.

    Args:
      key: of its section.
      teacher: the section.
      config: its shape; None where no weights of it are read.
      device: of the mesh.

    Raises:
      ConfigError: for patterns that match nothing, groups that do not divide, or a backend or
        device that cannot compute so.
    """
    wanted = quantize.of(teacher.quantize)
    if wanted is None:
        return
    if config is not None:
        quantize.check(f"{key}.quantize", wanted, config)
    quantize.check_backend(wanted, in_step=True, device=device)


def check_student(given: Given, student: Model, device: Any) -> None:
    """The student's kernels can be held as `base` says, and computed as `quantize` does.

    Args:
      given: what the configuration says.
      student: its shape.
      device: of the mesh.

    Raises:
      ConfigError: where the backend or the device cannot, groups do not divide, a pattern matches
        nothing, or its files hold others.
    """
    section, own = given.student, None
    for _, stage in stages(section.quantize, steps=1):
        if (aware := quantize.of(stage)) is not None:
            quantize.check("student.quantize", aware, student.config)
            quantize.check_backend(aware, device=device)
    if section.source is not None:
        own = rounded_any(section.source, allow_network=given.network)
    wanted = quantize.of(section.base)
    table = None if wanted is None else wanted.table(student.config)
    if own is not None and own.table(student.config) != table:
        beside = ""
        if all(one in map(SCHEMES.get, get_args(Whole)) for one in own.schemes):
            beside = f"train adapters beside it (student.lora, base: {_written(own)}), or "
        raise ConfigError(
            f"student.source = {section.source}: its kernels are whole numbers, which no step "
            f"moves: {beside}name the model it was"
        )
    if wanted is not None:
        quantize.check("student.base", wanted, student.config)
        quantize.check_backend(wanted, in_step=True, device=device)


def _written(own: Quantization) -> str:
    """A quantisation as a configuration says it."""
    scheme = name_of(own.scheme)
    if not own.exceptions:
        return scheme
    exceptions = ", ".join(f"{pattern}={name_of(one)}" for pattern, one in own.exceptions)
    return f"{{scheme: {scheme}, exceptions: [{exceptions}]}}"


def kept_layers(student: Student, count: int) -> list[int]:
    """The layers of a teacher of `count` that its student keeps."""
    if student.layers is not None:
        return prune.check_layers(count, student.layers)
    return list(range(0, count, student.every or 1))


def _cut(given: Given, teacher: Model, small: DecoderConfig, source: str) -> Model:
    """The shape of a student cut out of its teacher, with all else that is the teacher's.

    A tokenizer of its own brings as many rows as it has tokens, and its ends of texts.
    """
    cut = dataclasses.replace(teacher, config=small, source=source)
    name = given.student.tokenizer
    if name is None:
        return cut
    own = _tokenizer_at("student.tokenizer", name, given.network)
    arch = dataclasses.replace(
        small,
        vocab_size=vocabulary(given.tokenizer, own),
        bos_id=own.bos_token_id,
        eos_ids=() if own.eos_token_id is None else (own.eos_token_id,),
        pad_id=own.pad_token_id,
    )
    return dataclasses.replace(cut, config=arch, tokenizer=own)


def _spec(source: str, network: bool) -> Model:
    config, tokenizer = spec_any(source, allow_network=network)
    drawn = generation_any(source, allow_network=network)
    return Model(config, None, tokenizer, source, drawn)


def _random_shape(shape: RandomModel, teacher: Model | None, given: Given, key: str) -> Model:
    """The configuration of a random model: numbers given, the rest from the model it is like."""
    like = None
    if shape.like == "teacher":
        like = teacher
    elif shape.like is not None:
        like = _spec(shape.like, given.network)
    numbers = {
        name: getattr(shape, name)
        for name in ("layers", "embed", "mlp", "heads", "kv_heads", "head_dim", "vocab_size")
        if getattr(shape, name) is not None
    }
    for name in ("tied_head", "initializer_range"):
        if getattr(shape, name) is not None:
            numbers[name] = getattr(shape, name)
    if like is not None:
        base = like.config
        if "heads" in numbers and "kv_heads" not in numbers:
            numbers["kv_heads"] = numbers["heads"] // max(1, base.heads // base.kv_heads)
        if {"heads", "embed"} & numbers.keys() and "head_dim" not in numbers:
            heads, embed = numbers.get("heads", base.heads), numbers.get("embed", base.embed)
            numbers["head_dim"] = base.head_dim if "embed" not in numbers else embed // heads
        layers = _like_layers(base, numbers.get("layers", base.layers), key)
        arch = dataclasses.replace(picked(base, layers), **numbers)
        return Model(arch, None, like.tokenizer, f"random, like {like.source}")
    numbers.setdefault("kv_heads", numbers["heads"])
    numbers.setdefault("head_dim", numbers["embed"] // numbers["heads"])
    numbers.setdefault("tied_head", True)
    numbers.setdefault("max_positions", max(2048, given.seq_len))
    if "vocab_size" not in numbers:
        numbers["vocab_size"] = vocabulary(
            given.tokenizer, named_tokenizer(given, {"teacher": teacher})
        )
    family = FAMILIES[shape.family or "llama"]
    every: dict[str, Any] = {**family.features, **numbers}
    arch = DecoderConfig(shape.family or "llama", **every)
    return Model(arch, None, None, "random")


def _like_layers(base: DecoderConfig, count: int, key: str) -> list[int]:
    """Which layer of the model it is like each of `count` layers is like: the first, or again."""
    if count <= base.layers:
        return list(range(count))
    all_of = (None,) * base.layers
    own = list(zip(base.windows or all_of, base.turned or all_of, strict=True))
    for size in range(1, max(2, base.layers // 2 + 1)):
        if all(one == own[layer % size] for layer, one in enumerate(own)):
            return [layer % size for layer in range(count)]
    raise ConfigError(
        f"{key}.layers: the windows of the model it is like follow no pattern that would carry "
        f"over to {count} layers: take at most its {base.layers}"
    )
