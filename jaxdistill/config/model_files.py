"""What the small files of a model say: its folder, sizes and tokenizer; or what is wrong."""

import dataclasses
import importlib.util
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jaxdistill import rules
from jaxdistill.config.models import RandomModel
from jaxdistill.config.syntax import shown
from jaxdistill.data import vocabularies
from jaxdistill.data.vocabularies import Vocabulary
from jaxdistill.errors import ConfigError, ModelError, UserError
from jaxdistill.model_folder import check_folder, read_json

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FIELDS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
    "vocab_size": "vocab_size",
}


@dataclasses.dataclass(frozen=True)
class ModelFiles:
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
    def tokenizer_file(self) -> pathlib.Path | None:
        """Its tokenizer.json, if there is one."""
        file = self.folder / "tokenizer.json" if self.folder else None
        return file if file is not None and file.is_file() else None

    def vocabulary(self) -> Vocabulary | None:
        """What its tokenizer.json says, None where there is none, or of another kind."""
        if self.tokenizer_file is None:
            return None
        try:
            return vocabularies.described(read_json(self.tokenizer_file))
        except (ModelError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None  # other kinds are compared when the tokenizers are loaded


def random_shape(random: RandomModel, like: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that follow from the numbers of a random model."""
    given = {field: getattr(random, name) for name, field in FIELDS.items()}
    given = {field: size for field, size in given.items() if size is not None}
    if random.like is None:
        given["model_type"] = random.family or "llama"
    heads, groups = FIELDS["heads"], FIELDS["kv_heads"]
    if heads in given and groups not in given:
        old, few = like.get(heads), like.get(groups)
        if random.like is None:
            given[groups] = given[heads]
        elif isinstance(old, int) and isinstance(few, int) and few > 0:
            given[groups] = given[heads] // max(1, old // few)
    return {**like, **given}


def here() -> str:
    """Where relative paths start, for messages."""
    return f"relative paths start at {os.getcwd()}"


def look(key: str, source: str, network: bool, weights: bool = True) -> ModelFiles:
    """Finds a model and reads its config.json, without opening its weights."""
    key = f"{key} = {shown(source)}"
    path = source
    if source.startswith("package:"):
        try:
            path = os.fspath(package_file(source))
        except ModelError as error:
            return ModelFiles(error=ModelError(f"{key}: {error}"))
    path = os.path.expanduser(path)
    folder, at, _ = path.rpartition("@")
    if _is_run(path) or (at and not os.path.exists(path) and _is_run(folder)):
        return ModelFiles()
    for missing in rules.run_is_there(path):
        return ModelFiles(error=ConfigError(f"{key}: {missing}"))
    if os.path.isdir(path):
        return _look_into(key, pathlib.Path(path), weights)
    if os.path.exists(path):
        wrong = ModelError(f"{key}: is no model folder and no .gguf file")
        return ModelFiles() if path.endswith(".gguf") else ModelFiles(error=wrong)
    name = source.removeprefix("hf:")
    if _HUB_NAME.match(name):
        if network or os.path.isdir(_hub_folder(name)):
            return ModelFiles()
        hint = "; if it is a name to download, set security.allow_network: true"
    else:
        hint = ""
    return ModelFiles(error=ModelError(f"{key}: no such file or folder ({here()}){hint}"))


def _hub_folder(name: str) -> str:
    """Where the Hub's client keeps a model it has downloaded before."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return os.path.join(cache, "models--" + name.replace("/", "--"))


def _is_run(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "RUN.json"))


def _look_into(key: str, folder: pathlib.Path, weights: bool) -> ModelFiles:
    """Reads config.json of a model folder and looks for safe weights."""
    try:
        check_folder(folder)
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return ModelFiles(error=ModelError(f"{key}: cannot be read: {error.strerror or error}"))
    except ModelError as error:
        return ModelFiles(error=ModelError(f"{key}: {error}"))
    if not weights and "config.json" not in names and "tokenizer.json" in names:
        return ModelFiles(folder)
    if "config.json" not in names:
        return ModelFiles(error=ModelError(f"{key}: holds no config.json; is it a model folder?"))
    if weights and not any(name.endswith(_WEIGHTS) for name in names):
        unsafe = [name for name in names if name.endswith(_UNSAFE)]
        hint = (
            f" ({unsafe[0]} can run code when it is read: convert it elsewhere)" if unsafe else ""
        )
        return ModelFiles(error=ModelError(f"{key}: holds no .safetensors file{hint}"))
    try:
        shape = read_json(folder / "config.json")
        text = shape.get("text_config")  # of a model that sees as well
        return ModelFiles(folder, {**shape, **text} if isinstance(text, dict) else shape)
    except ModelError as error:
        return ModelFiles(error=ModelError(f"{key}: {error}"))


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
