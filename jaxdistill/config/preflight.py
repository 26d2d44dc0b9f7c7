"""What can be checked before a run without loading a model: paths, folders, sizes in JSON files."""

import dataclasses
import filecmp
import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdistill import methods, rules
from jaxdistill.config import oneself as selves
from jaxdistill.config import trackers
from jaxdistill.config.models import RandomModel
from jaxdistill.config.schema import Config
from jaxdistill.config.syntax import shown
from jaxdistill.data import paths, tables, vocabularies
from jaxdistill.data.vocabularies import Vocabulary
from jaxdistill.errors import ConfigError, DataError, MismatchError, ModelError, UserError
from jaxdistill.methods import two_tokenizers
from jaxdistill.model_folder import check_folder, read_json

_PYTHON_DATA = re.compile(
    r"^python:docs(\?split=(all|train|held_out)(&part=(all|manual|library))?)?$"
)
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BYTES = 257  # tokens of `models.byte_tokenizer`, which would take seconds to import
_FIELDS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
    "vocab_size": "vocab_size",
}


def notes(config: Config) -> list[str]:
    """What small files say of a run that is no error: how its vocabularies go together."""
    found = _models(config)
    pairs = _pairs(config, found, _vocabulary(found.get("tokenizer", _Found())))
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
                found = _data_files(source.path, network)
            except DataError as error:
                yield DataError(f"{key}: {str(error).removeprefix(source.path + ': ')}")
                continue
            files[name] += [(key, path) for path in found]
            if found and all(paths.size_of(path) == 0 for path in found):
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
        yield DataError(f"data.chat_template = {shown(template)}: no such file ({_here()})")


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


def _here() -> str:
    return f"relative paths start at {os.getcwd()}"


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the small files of a model say.

    Attributes:
      folder: where it lies, if it is a folder.
      shape: its config.json.
      error: what is wrong.
    """

    folder: pathlib.Path | None = None
    shape: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: UserError | None = None

    def number(self, name: str) -> int | None:
        """A whole number of config.json, if it holds one."""
        value = self.shape.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def words_file(self) -> pathlib.Path | None:
        """Its tokenizer.json, if there is one."""
        file = self.folder / "tokenizer.json" if self.folder else None
        return file if file is not None and file.is_file() else None


def _model_errors(config: Config) -> Iterator[UserError]:
    """Every model is there, kept layers exist, rows are not too long, vocabularies are the same."""
    found = _models(config)
    for name, one in {"teacher": config.teacher, **_several(config)}.items():
        if one is None or one.cache is None or "://" in one.cache:
            continue
        place = os.path.expanduser(one.cache)
        if not os.path.isfile(os.path.join(place, "identity.json")):
            which = "" if name == "teacher" else f" --teacher {name.removeprefix('teachers.')}"
            yield ConfigError(
                f"{name}.cache = {shown(one.cache)}: holds no teacher's answers ({_here()}): "
                f"`jaxdistill teacher cache CONFIG -o DIR{which}` asks for them"
            )
    yield from (model.error for model in found.values() if model.error)
    teacher, student = found.get("teacher", _Found()), config.student
    layers = teacher.number("num_hidden_layers")
    if student.layers and layers is not None:
        yield from rules.kept_layers(student.layers, layers)
    if student.prune and not os.path.isfile(student.prune.importance):
        yield ConfigError(
            f"student.prune.importance = {shown(student.prune.importance)}: no such file "
            f"({_here()}): `jaxdistill importance` measures it"
        )
    if config.mesh.context > 0:
        yield from rules.context_axis(config.data.seq_len, config.mesh.context)
    words = _vocabulary(found.get("tokenizer", _Found()))
    known = _BYTES if config.tokenizer.from_ == "bytes" else words.size if words else 0
    if known:
        yield from rules.tokenizer_rows(config.tokenizer.rows, known)
        known = max(known, config.tokenizer.rows or 0)
    for name in ("teacher", "student", *_several(config)):
        model = found.get(name, _Found())
        # A teacher with a tokenizer of its own is read through what both share.
        own = name == "teacher" != config.tokenizer.from_ and model.words_file
        yield from _fit_errors(config, name, model, 0 if own else known)
    yield from _vocabulary_errors(config, found, words)


def _fit_errors(config: Config, name: str, model: _Found, known: int) -> Iterator[UserError]:
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
    if sizes and config.mesh.tensor > 0:
        yield from rules.tensor_axis(config.mesh.tensor, name, sizes)
    rows = model.number("vocab_size")
    if known and rows is not None:
        yield from rules.head_rows(name, rows, known)


def _models(config: Config) -> dict[str, _Found]:
    """What can be told of the models that are named by path or by numbers, and of the tokenizer."""
    network = config.security.allow_network
    found: dict[str, _Found] = {}
    asked = {"teacher": config.teacher, "student": config.student, **_several(config)}
    for name, model in asked.items():
        if model and model.source:
            found[name] = _look(f"{name}.source", model.source, network)
        elif model and model.random:
            like = model.random.like
            if like == "teacher":
                base = dataclasses.replace(found.get("teacher", _Found()), error=None)
            elif like:
                base = _look(f"{name}.random.like", like, network, weights=False)
            else:
                base = _Found()
            found[name] = dataclasses.replace(base, shape=_random_shape(model.random, base.shape))
    student, teacher = config.student, found.get("teacher")
    if student.prune and teacher:  # the sizes it has not from the teacher
        sizes = student.prune.sizes().items()
        cut = {_FIELDS[axis]: size for axis, size in sizes if axis in _FIELDS}
        found["student"] = dataclasses.replace(teacher, shape=cut, error=None)
    chosen = config.tokenizer.from_
    if chosen == "teacher" and config.teacher and config.teacher.self_:
        chosen = "student"
    if chosen == "student" and student.from_ == "teacher":
        chosen = student.tokenizer or "teacher"
    if chosen in ("teacher", "student"):
        # A model that is like another has its tokenizer; what is wrong with it is said once.
        found["tokenizer"] = dataclasses.replace(found.get(chosen, _Found()), error=None)
    elif chosen != "bytes":
        key = "student.tokenizer" if student.tokenizer else "tokenizer.from"
        found["tokenizer"] = _look(key, chosen, network, weights=False)
    return found


def _several(config: Config) -> dict[str, Any]:
    """Several teachers by their keys."""
    return {f"teachers.{name}": model for name, model in (config.teachers or {}).items()}


def _random_shape(random: RandomModel, like: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that follow from the numbers of a random model."""
    given = {field: getattr(random, name) for name, field in _FIELDS.items()}
    given = {field: size for field, size in given.items() if size is not None}
    heads, groups = _FIELDS["heads"], _FIELDS["kv_heads"]
    if heads in given and groups not in given:
        old, few = like.get(heads), like.get(groups)
        if random.like is None:
            given[groups] = given[heads]
        elif isinstance(old, int) and isinstance(few, int) and few > 0:
            given[groups] = given[heads] // max(1, old // few)
    return {**like, **given}


def _vocabulary_errors(
    config: Config, found: Mapping[str, _Found], words: Vocabulary | None
) -> Iterator[UserError]:
    """No text can be read by a model that shares no ordinary token with the run's tokenizer."""
    second_view = methods.of(config.method).second_view
    for name, pair in _pairs(config, found, words).items():
        assert words is not None, "there are pairs"
        if name == "teacher" and second_view:
            continue  # it reads its own tokens
        if len(pair.ours.ordinary) == len(words.table.keys() - words.added):
            yield MismatchError(
                f"{name} ({found[name].folder}): its vocabulary has none of the tokenizer's "
                f"ordinary tokens ({pair}): take a student of the teacher's family, or cut one out "
                "of the teacher (student.from: teacher)"
            )


def _pairs(
    config: Config, found: Mapping[str, _Found], words: Vocabulary | None
) -> dict[str, vocabularies.Pair]:
    """The run's vocabulary beside each model's own, where files say that they are two."""
    chosen, pairs = found.get("tokenizer", _Found()).words_file, {}
    alone = config.student.random or config.student.from_
    names = ("teacher",) if alone else ("teacher", "student")
    for name in names:
        model = found.get(name, _Found())
        own = model.words_file
        if chosen is None or words is None or own is None:
            continue
        other = None if filecmp.cmp(chosen, own, shallow=False) else _vocabulary(model)
        if other is not None:
            pairs[name] = vocabularies.compare(words, other)
    return pairs


def _vocabulary(model: _Found) -> Vocabulary | None:
    """What a model's tokenizer.json says, None where there is none, or of another kind."""
    if model.words_file is None:
        return None
    try:
        return vocabularies.described(read_json(model.words_file))
    except (ModelError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None  # other kinds are compared when the tokenizers are loaded


def _look(key: str, source: str, network: bool, weights: bool = True) -> _Found:
    """Finds a model and reads its config.json, without opening its weights."""
    key = f"{key} = {shown(source)}"
    path = source
    if source.startswith("package:"):
        try:
            path = os.fspath(package_file(source))
        except ModelError as error:
            return _Found(error=ModelError(f"{key}: {error}"))
    path = os.path.expanduser(path)
    folder, at, _ = path.rpartition("@")
    if _is_run(path) or (at and not os.path.exists(path) and _is_run(folder)):
        return _Found()
    for missing in rules.run_is_there(path):
        return _Found(error=ConfigError(f"{key}: {missing}"))
    if os.path.isdir(path):
        return _look_into(key, pathlib.Path(path), weights)
    if os.path.exists(path):
        wrong = ModelError(f"{key}: is no model folder and no .gguf file")
        return _Found() if path.endswith(".gguf") else _Found(error=wrong)
    name = source.removeprefix("hf:")
    if _HUB_NAME.match(name):
        if network or os.path.isdir(_hub_folder(name)):
            return _Found()
        hint = "; if it is a name to download, set security.allow_network: true"
    else:
        hint = ""
    return _Found(error=ModelError(f"{key}: no such file or folder ({_here()}){hint}"))


def _hub_folder(name: str) -> str:
    """Where the Hub's client keeps a model it has downloaded before."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return os.path.join(cache, "models--" + name.replace("/", "--"))


def _is_run(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "RUN.json"))


def _look_into(key: str, folder: pathlib.Path, weights: bool) -> _Found:
    """Reads config.json of a model folder and looks for safe weights."""
    try:
        check_folder(folder)
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return _Found(error=ModelError(f"{key}: cannot be read: {error.strerror or error}"))
    except ModelError as error:
        return _Found(error=ModelError(f"{key}: {error}"))
    if not weights and "config.json" not in names and "tokenizer.json" in names:
        return _Found(folder)
    if "config.json" not in names:
        return _Found(error=ModelError(f"{key}: holds no config.json; is it a model folder?"))
    if weights and not any(name.endswith(_WEIGHTS) for name in names):
        unsafe = [name for name in names if name.endswith(_UNSAFE)]
        hint = (
            f" ({unsafe[0]} can run code when it is read: convert it elsewhere)" if unsafe else ""
        )
        return _Found(error=ModelError(f"{key}: holds no .safetensors file{hint}"))
    try:
        shape = read_json(folder / "config.json")
        text = shape.get("text_config")  # of a model that sees as well
        return _Found(folder, {**shape, **text} if isinstance(text, dict) else shape)
    except ModelError as error:
        return _Found(error=ModelError(f"{key}: {error}"))


def package_file(source: str) -> pathlib.Path:
    """The file that `package:NAME/FILE` names, inside an installed package that is not imported.

    Raises:
      ModelError: if there is no such package or file.
    """
    name, slash, inner = source.removeprefix("package:").partition("/")
    if not slash or not inner or not name.isidentifier():
        raise ModelError("write it as package:NAME/FILE")
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ModelError(f"the Python package {name} is not installed")
    for folder in folders:
        path = (pathlib.Path(folder) / inner).resolve()
        if path.is_relative_to(pathlib.Path(folder).resolve()) and path.exists():
            return path
    raise ModelError(f"the Python package {name} has no file {shown(inner)}")
