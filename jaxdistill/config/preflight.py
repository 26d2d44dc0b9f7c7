"""What can be checked before a run without loading a model: paths, folders, sizes in JSON files."""

import dataclasses
import filecmp
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdistill import methods, rules
from jaxdistill.config import ahead, trackers
from jaxdistill.config import oneself as selves
from jaxdistill.config.model_files import FIELDS, ModelFiles, here, look, random_shape
from jaxdistill.config.schema import Config
from jaxdistill.config.syntax import shown
from jaxdistill.data import paths, tables, vocabularies
from jaxdistill.data.vocabularies import Vocabulary
from jaxdistill.errors import ConfigError, DataError, MismatchError, UserError
from jaxdistill.methods import two_tokenizers

_PYTHON_DATA = re.compile(
    r"^python:docs(\?split=(all|train|held_out)(&part=(all|manual|library))?)?$"
)
_EXPERTS = ("num_experts", "num_local_experts")
_BYTES = 257  # tokens of `models.byte_tokenizer`, which would take seconds to import


def notes(config: Config) -> list[str]:
    """What small files say of a run that is no error: how its vocabularies go together."""
    folders = _models(config)
    pairs = _pairs(config, folders, folders.get("tokenizer", ModelFiles()).vocabulary())
    return [f"{name}: vocabulary: {pair}" for name, pair in pairs.items()]


def check(config: Config, *, run_dir: bool = True) -> list[UserError]:
    """Everything that would stop this run later and can be seen now, in milliseconds.

    Args:
      config: of the run.
      run_dir: whether there will be a run, whose folder must be free.
    """
    errors: list[UserError] = []
    of_run = _run_dir_errors(config.run.dir) if run_dir else iter(())
    tracked = trackers.missing(config.logging) if run_dir else iter(())
    for part in (of_run, tracked, _data_errors(config), _model_errors(config)):
        try:
            errors.extend(part)
        except OSError as error:
            errors.append(ConfigError(f"{error.filename}: cannot be read: {error.strerror}"))
    return [config.written.locate(error) for error in errors]


def _run_dir_errors(folder: str) -> Iterator[UserError]:
    """The run folder is free."""
    key = f"run.dir = {shown(folder)}"
    if "://" in folder:
        yield from rules.local("run.dir", folder)
    elif os.path.exists(os.path.join(folder, "RUN.json")):
        yield ConfigError(
            f"{key}: holds a run already: `jaxdistill resume {folder}` goes on with it, another "
            "run.dir starts a new one"
        )
    elif os.path.isdir(folder) and os.listdir(folder):
        yield ConfigError(f"{key}: is not empty and holds no run: give another folder")
    elif os.path.exists(folder) and not os.path.isdir(folder):
        yield ConfigError(f"{key}: is a file: give a folder")


def _data_errors(config: Config) -> Iterator[UserError]:
    """Every source of data is there and can be read, and held-out files are no training files."""
    data, network = config.data, config.security.allow_network
    files: dict[str, list[tuple[str, paths.File]]] = {"train": [], "prompts": [], "eval": []}
    groups = (("train", data.train), ("prompts", data.prompts), ("eval", data.eval_files))
    for name, sources in groups:
        for i, source in enumerate(sources):
            key = f"data.{name}.{i}.path = {shown(source.path)}"
            try:
                matched = _data_files(source.path, network)
            except DataError as error:
                yield DataError(f"{key}: {str(error).removeprefix(source.path + ': ')}")
                continue
            files[name] += [(key, path) for path in matched]
            if matched and all(paths.size_of(path) == 0 for path in matched):
                yield DataError(f"{key}: the file is empty")
    for key, path in files["eval"]:
        for other_key, other in files["train"] + files["prompts"]:
            if paths.same_content(path, other):
                section = ".".join(other_key.split(".")[:2])
                yield DataError(
                    f"{key}: is {shown(str(other))} of {section} again: held-out data must not be "
                    "trained on: name another file, or use data.eval: {fraction: 0.01}"
                )
                break
    template = data.chat_template
    if template is not None and not os.path.isfile(template):
        yield DataError(f"data.chat_template = {shown(template)}: no such file ({here()})")


def _data_files(path: str, network: bool) -> Sequence[paths.File]:
    """The files of a source; none where it is a set with a name.

    Raises:
      DataError: if it cannot be read.
    """
    if path.startswith("python:"):
        if not _PYTHON_DATA.match(path):
            raise DataError(
                "use python:docs?split=train or ?split=held_out, with or without &part=manual or "
                "&part=library"
            )
        return []
    if path.startswith("hf:"):
        tables.HubDataset(path, network)
        return []
    return paths.find(path)[0]


def _model_errors(config: Config) -> Iterator[UserError]:
    """Every model is there, kept layers exist, rows are not too long, vocabularies are the same."""
    folders = _models(config)
    for name, one in config.teacher_sections.items():
        if one.cache is None or "://" in one.cache:
            continue
        place = os.path.expanduser(one.cache)
        if not os.path.isfile(os.path.join(place, "identity.json")):
            which = "" if name == "teacher" else f" --teacher {name.removeprefix('teachers.')}"
            yield ConfigError(
                f"{name}.cache = {shown(one.cache)}: holds no teacher's answers ({here()}): "
                f"`jaxdistill teacher cache CONFIG -o DIR{which}` asks for them"
            )
    yield from (model.error for model in folders.values() if model.error)
    teacher, student = folders.get("teacher", ModelFiles()), config.student
    layers = teacher.number("num_hidden_layers")
    if student.layers and layers is not None:
        yield from rules.kept_layers(student.layers, layers)
    if student.prune and not os.path.isfile(student.prune.importance):
        yield ConfigError(
            f"student.prune.importance = {shown(student.prune.importance)}: no such file "
            f"({here()}): `jaxdistill importance` measures it"
        )
    for where, mesh in ahead.meshes(config).items():
        yield from rules.context_axis(config.data.seq_len, mesh.context, where=where)
    vocabulary = folders.get("tokenizer", ModelFiles()).vocabulary()
    known = _BYTES if config.tokenizer.from_ == "bytes" else vocabulary.size if vocabulary else 0
    if known:
        yield from rules.tokenizer_rows(config.tokenizer.rows, known)
        known = max(known, config.tokenizer.rows or 0)
    for name in (*config.teacher_sections, "student"):
        model = folders.get(name, ModelFiles())
        # A teacher with a tokenizer of its own is read through what both share.
        own = name == "teacher" != config.tokenizer.from_ and model.tokenizer_file
        yield from _fit_errors(config, name, model, 0 if own else known)
    in_step = _in_step(config, folders)
    yield from _expert_errors(config, in_step)
    yield from _exception_errors(config, in_step)
    yield from _vocabulary_errors(config, folders, vocabulary)


def _in_step(config: Config, found: Mapping[str, ModelFiles]) -> dict[str, Mapping[str, Any]]:
    """config.json of each model that a step computes; {} where small files do not tell it."""
    own = "teacher" if config.student.from_ else "student"
    shapes = {"student": found.get(own, ModelFiles()).shape}
    for name, one in config.teacher_sections.items():
        if not one.cache and (one.source or one.random):
            shapes[name] = found.get(name, ModelFiles()).shape
    # A random model that is like one of these has some of its numbers, and not its family.
    return {name: shape if "model_type" in shape else {} for name, shape in shapes.items()}


def _expert_errors(config: Config, in_step: Mapping[str, Mapping[str, Any]]) -> Iterator[UserError]:
    """An expert axis has experts to divide, where small files tell that of all models on it."""
    on: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, shape in in_step.items():
        on.setdefault(ahead.mesh_of(config, name)[0], {})[name] = shape
    for where, shapes in on.items():
        mesh = ahead.meshes(config)[where]
        counts = {name: _experts(shape) for name, shape in shapes.items()}
        known = {name: count for name, count in counts.items() if count is not None}
        if len(known) == len(counts) and mesh.tensor > 0:
            experts = {name: count for name, count in known.items() if count}
            yield from rules.expert_axis(mesh.expert, mesh.tensor, experts, where=where)


def _experts(shape: Mapping[str, Any]) -> int | None:
    """How many experts a layer has, 0 where it has one MLP; None where it is not told."""
    count = next((shape[key] for key in _EXPERTS if isinstance(shape.get(key), int)), None)
    return 0 if count is None and shape and not _routed(shape) else count


def _routed(shape: Mapping[str, Any]) -> bool:
    return any("experts" in key for key in shape)


def _exception_errors(
    config: Config, in_step: Mapping[str, Mapping[str, Any]]
) -> Iterator[UserError]:
    """Exceptions to schemes name projections, where small files tell the model's family."""
    models = {**config.teacher_sections, "student": config.student}
    options = {f"{name}.quantize": (name, one.quantize) for name, one in models.items() if one}
    options["student.base"] = "student", config.student.base
    for key, (name, option) in options.items():
        patterns = [text.rpartition("=")[0] for text in getattr(option, "exceptions", ())]
        if patterns and in_step.get(name):
            yield from _matched(key, patterns, in_step[name])


def _matched(key: str, patterns: Sequence[str], shape: Mapping[str, Any]) -> Iterator[UserError]:
    # The table of weights comes with JAX, which takes seconds: for configurations that ask alone.
    from jaxdistill.formats.families import FAMILIES
    from jaxdistill.models.architecture import DecoderConfig, Experts
    from jaxdistill.models.quantized import in_layer, projections

    family = shape["model_type"]
    if family not in FAMILIES:
        return
    sizes = ("vocab_size", "embed", "mlp", "layers", "heads", "kv_heads", "head_dim")
    experts = Experts(1, 1) if _routed(shape) else None
    fields: dict[str, Any] = {**FAMILIES[family].features, **dict.fromkeys(sizes, 1)}
    fields["experts"] = experts
    names = projections(DecoderConfig(family, **fields))
    yield from rules.exceptions_match(key, patterns, family, [in_layer(name) for name in names])


def _fit_errors(config: Config, name: str, model: ModelFiles, known: int) -> Iterator[UserError]:
    """What config.json says of a model fits the rows, the mesh and `known` tokens."""
    longest, length = model.number("max_position_embeddings"), config.data.seq_len
    if name == "teacher" and methods.of(config.method).second_view:
        length = two_tokenizers.length(config.method, length)
    if longest is not None:
        yield from rules.row_length(length, name, longest)
        oneself = selves.of(config)
        if name == "student" and oneself is not None and oneself.context is not None:
            theirs = selves.length(oneself, length)
            yield from rules.row_length(theirs, name, longest, "teacher.self.seq_len")
    fields = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    if not any("experts" in key for key in model.shape):
        fields["mlp"] = "intermediate_size"
    sizes = {name: model.number(field) for name, field in fields.items()}
    sizes = {name: size for name, size in sizes.items() if size}
    where, mesh = ahead.mesh_of(config, name)
    if sizes and mesh.tensor > 0:
        yield from rules.tensor_axis(mesh.tensor, name, sizes, where=where)
    rows = model.number("vocab_size")
    if known and rows is not None:
        yield from rules.head_rows(name, rows, known)


def _models(config: Config) -> dict[str, ModelFiles]:
    """What can be told of the models that are named by path or by numbers, and of the tokenizer."""
    network = config.security.allow_network
    folders: dict[str, ModelFiles] = {}
    asked = {**config.teacher_sections, "student": config.student}
    for name, model in asked.items():
        if model and model.source:
            folders[name] = look(f"{name}.source", model.source, network)
        elif model and model.random:
            like = model.random.like
            if like == "teacher":
                base = dataclasses.replace(folders.get("teacher", ModelFiles()), error=None)
            elif like:
                base = look(f"{name}.random.like", like, network, weights=False)
            else:
                base = ModelFiles()
            folders[name] = dataclasses.replace(base, shape=random_shape(model.random, base.shape))
    student, teacher = config.student, folders.get("teacher")
    if student.prune and teacher:  # the sizes it has not from the teacher
        sizes = student.prune.sizes().items()
        cut = {FIELDS[axis]: size for axis, size in sizes if axis in FIELDS}
        folders["student"] = dataclasses.replace(teacher, shape=cut, error=None)
    chosen = config.tokenizer.from_
    if chosen == "teacher" and config.teacher and config.teacher.self_:
        chosen = "student"
    if chosen == "student" and student.from_ == "teacher":
        chosen = student.tokenizer or "teacher"
    if chosen in ("teacher", "student"):
        # A model that is like another has its tokenizer; what is wrong with it is said once.
        folders["tokenizer"] = dataclasses.replace(folders.get(chosen, ModelFiles()), error=None)
    elif chosen != "bytes":
        key = "student.tokenizer" if student.tokenizer else "tokenizer.from"
        folders["tokenizer"] = look(key, chosen, network, weights=False)
    return folders


def _vocabulary_errors(
    config: Config, found: Mapping[str, ModelFiles], vocabulary: Vocabulary | None
) -> Iterator[UserError]:
    """No text can be read by a model that shares no ordinary token with the run's tokenizer."""
    second_view = methods.of(config.method).second_view
    for name, pair in _pairs(config, found, vocabulary).items():
        assert vocabulary is not None, "there are pairs"
        if name == "teacher" and second_view:
            continue  # it reads its own tokens
        if len(pair.ours.ordinary) == len(vocabulary.table.keys() - vocabulary.added):
            yield MismatchError(
                f"{name} ({found[name].folder}): its vocabulary has none of the tokenizer's "
                f"ordinary tokens ({pair}): take a student of the teacher's family, or cut one out "
                "of the teacher (student.from: teacher)"
            )


def _pairs(
    config: Config, found: Mapping[str, ModelFiles], vocabulary: Vocabulary | None
) -> dict[str, vocabularies.Pair]:
    """The run's vocabulary beside each model's own, where files say that they are two."""
    chosen, pairs = found.get("tokenizer", ModelFiles()).tokenizer_file, {}
    alone = config.student.random or config.student.from_
    names = ("teacher",) if alone else ("teacher", "student")
    for name in names:
        model = found.get(name, ModelFiles())
        own = model.tokenizer_file
        if chosen is None or vocabulary is None or own is None:
            continue
        other = None if filecmp.cmp(chosen, own, shallow=False) else model.vocabulary()
        if other is not None:
            pairs[name] = vocabularies.compare(vocabulary, other)
    return pairs
