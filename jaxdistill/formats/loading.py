"""Finds a model by folder, Hub id, GGUF file or package file, and loads it with its reader."""

import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxdistill.errors import ModelError
from jaxdistill.formats import assemble, exchange, huggingface
from jaxdistill.formats.tokenizer_files import folder_tokenizer
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.model import Model
from jaxdistill.models.quantized import Quantization
from jaxdistill.sharding import RULES

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_WORDS = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
_FORMS = (
    "give a model folder, a .gguf file, package:NAME/FILE for a file inside an installed Python "
    "package, or a Hub id such as org/name"
)


def load(
    path_or_id: str | pathlib.Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Mapping = RULES,
    tokenizer: bool = True,
    allow_network: bool = True,
    revision: str | None = None,
    rounded: Quantization | None = None,
    offload: bool = False,
) -> Model:
    """Loads a model.

    Args:
      path_or_id: a Hugging Face folder; a .gguf file; "package:NAME/FILE", either of them inside an
        installed Python package (which is not imported); or a Hub id "org/name" or "hf:org/name".
      dtype: dtype of the parameters; None keeps the files'. Students are trained from float32.
      mesh: where the parameters lie; each process reads only as many bytes as its devices need, and
        all processes of the mesh load together. None: one device.
      rules: table from logical axes to mesh axes.
      tokenizer: also load the tokenizer; None in the model where the folder has none.
      allow_network: a Hub id that is not in the local cache may be downloaded.
      revision: branch, tag or commit on the Hub.
      rounded: which of its kernels, and to which numbers, as they are read: in floating point there
        is one weight at a time. None leaves them as they are.
      offload: whether the layers wait in the memory of the devices' host, moved as they are read.

    Raises:
      ConfigError: if groups do not divide, or it is quantised otherwise.
      ModelError: where nothing is there, or it cannot be used; the message says what to do.
    """
    place = exchange.together(
        mesh, lambda: resolve(path_or_id, allow_network=allow_network, revision=revision)
    )
    read: Callable[..., Any] = huggingface.load_folder
    if place.is_file():
        from jaxdistill.formats import gguf

        read = gguf.load_file
    return read(
        place,
        dtype=dtype,
        mesh=mesh,
        rules=rules,
        tokenizer=tokenizer,
        rounded=rounded,
        offload=offload,
    )


def spec(
    path_or_id: str | pathlib.Path,
    *,
    tokenizer: bool = True,
    allow_network: bool = True,
    revision: str | None = None,
) -> tuple[DecoderConfig, Any]:
    """(configuration, tokenizer or None) of a model, without reading its weights."""
    place = resolve(path_or_id, weights=False, allow_network=allow_network, revision=revision)
    if place.is_file():
        from jaxdistill.formats import gguf

        return gguf.file_spec(place, tokenizer=tokenizer)
    config = huggingface.folder_config(place)
    return config, folder_tokenizer(place) if tokenizer else None


def random(
    config: DecoderConfig,
    seed: int = 0,
    dtype: DTypeLike = "float32",
    mesh: Mesh | None = None,
    *,
    rules: Mapping = RULES,
    tokenizer: Any = None,
) -> Model:
    """A model with random parameters, the same numbers on any mesh."""
    params = assemble.random(config, seed, dtype, mesh, rules)
    return Model(config=config, params=params, tokenizer=tokenizer, source=f"random:{seed}")


def resolve(
    path_or_id: str | pathlib.Path,
    *,
    weights: bool = True,
    allow_network: bool = True,
    revision: str | None = None,
) -> pathlib.Path:
    """The local folder or GGUF file that `path_or_id` means; may download from the Hub.

    Raises:
      ModelError: where it means nothing that exists.
    """
    text = str(path_or_id)
    if text.startswith("package:"):
        return _in_package(text)
    if not text.startswith("hf:"):
        path = pathlib.Path(path_or_id).expanduser()
        if path.is_dir():
            return path
        if path.is_file():
            if path.suffix == ".gguf":
                return path
            raise ModelError(f"{path}: is a file but not .gguf; {_FORMS}")
        if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(text):
            raise ModelError(f"{path}: does not exist; {_FORMS}")
    name = text.removeprefix("hf:")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"{text}: {name!r} is no Hub id (org/name); {_FORMS}")
    return _from_hub(name, weights, allow_network, revision)


def may_exist(text: str) -> bool:
    """Whether a name is that of something that is here, or could be on the Hub or in a package."""
    place = pathlib.Path(text).expanduser()
    folder, _, _ = text.rpartition("@")  # of a run
    if text.startswith(("package:", "hf:")) or place.exists():
        return True
    if folder and pathlib.Path(folder).expanduser().exists():
        return True
    # Beside runs there would be a run.
    return bool(_HUB_ID.fullmatch(text)) and not any(place.parent.glob("*/RUN.json"))


def _in_package(text: str) -> pathlib.Path:
    """The file of "package:NAME/FILE", found without running any of the package's code."""
    name, _, inside = text.removeprefix("package:").partition("/")
    relative = pathlib.PurePosixPath(inside)
    if not name.isidentifier() or not inside or relative.is_absolute() or ".." in relative.parts:
        raise ModelError(f"{text}: expected package:NAME/FILE, a file inside the package's folder")
    package = importlib.util.find_spec(name)  # a top-level name: looks, does not import
    folders = [] if package is None else list(package.submodule_search_locations or [])
    if not folders:
        raise ModelError(
            f"{text}: the Python package {name} is not installed; run: pip install "
            f"{name.replace('_', '-')}"
        )
    for folder in folders:
        path = pathlib.Path(folder) / relative
        if path.is_dir() or path.is_file():
            return path
    raise ModelError(
        f"{text}: {folders[0]} holds no {inside}; is it another version of the package?"
    )


def _from_hub(name: str, weights: bool, allow_network: bool, revision: str | None) -> pathlib.Path:
    """The cached or downloaded snapshot of a Hub model: JSON, tokenizer and safetensors only."""
    import huggingface_hub

    patterns = _WORDS + (["*.safetensors"] if weights else [])
    options = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": ["*/*"]}
    try:
        folder = huggingface_hub.snapshot_download(
            name, local_files_only=not allow_network, **options
        )
    except Exception as error:  # the Hub's client raises its own, its transport's and OS errors
        cause = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        remedy = (
            "check the name, the network and, for gated models, `hf auth login`"
            if allow_network
            else "the network is not allowed here and the model is not in the local cache"
        )
        raise ModelError(
            f"{name}: no folder of that name here, and the Hub gave no model ({cause}); {remedy}, "
            "or give the path of a local folder"
        ) from error
    return pathlib.Path(folder)
