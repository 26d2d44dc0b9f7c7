"""What is read of a folder that a stranger made: regular files, inside it, of sane size."""

import pathlib
import stat
from typing import Any

from jaxdistill.errors import ModelError
from jaxdistill.safe import strict_json

MAX_JSON_BYTES = 100_000_000
MAX_FILES = 10_000
_HUB_CACHE = "blobs"  # where the Hub's client keeps what the folders of its cache link to
# Fields of tokenizer_config.json that transformers may open as files.
_FILE_FIELDS = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "gguf_file")


def check_folder(folder: pathlib.Path) -> None:
    """Refuses a folder with files that are none, or that lie elsewhere.

    A link may lead to a file inside the folder, or to the blobs of the Hub's cache it belongs to.

    Raises:
      ModelError: naming the file.
    """
    home = folder.resolve()
    allowed = (home, home.parent.parent / _HUB_CACHE)
    for number, path in enumerate(sorted(folder.iterdir()), start=1):
        if number > MAX_FILES:
            raise ModelError(f"{folder}: holds more than {MAX_FILES} files: this is no model")
        if not path.exists():
            raise ModelError(f"{path}: is a link to nothing: copy or download the whole folder")
        if path.is_symlink():
            place = path.resolve()
            if not any(place.is_relative_to(root) for root in allowed):
                raise ModelError(
                    f"{path}: is a link to {place}, outside the folder: copy the file here if you "
                    "trust it"
                )
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ModelError(f"{path}: is a device, a pipe or a socket, no model's file: remove it")
        if path.suffix == ".json" and status.st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: larger than {MAX_JSON_BYTES} bytes; not a model's file")


def tokenizer_settings(folder: pathlib.Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, {} without one; no file elsewhere is named in it.

    Raises:
      ModelError: naming the field.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    settings = read_json(path)
    if settings.get("init_inputs"):
        raise ModelError(f"{path}: init_inputs: is not supported: remove the field")
    for field in _FILE_FIELDS:
        name = settings.get(field)
        if isinstance(name, str) and pathlib.PurePath(name).name != name:
            raise ModelError(
                f"{path}: {field}: {name[:80]!r} must be the plain name of a file inside the "
                "folder: remove the field"
            )
    return settings


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object of bounded size.

    Raises:
      ModelError: where the file is missing, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: larger than {MAX_JSON_BYTES} bytes; not a model's file")
        content = strict_json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object; download it again")
    return content
