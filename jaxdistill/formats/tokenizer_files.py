"""The tokenizer of a model folder, made by transformers, which never sees code of the folder's."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdistill.errors import ModelError
from jaxdistill.formats import sums, tokenizer_bounds
from jaxdistill.model_folder import check_folder, read_json, tokenizer_settings
from jaxdistill.steady_tokenizer import made_steady

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def folder_tokenizer(folder: pathlib.Path) -> Any:
    """The transformers tokenizer of a folder, or None where it has no tokenizer files.

    Raises:
      ModelError: where the files are damaged, or want code of their own to be run.
    """
    if not any((folder / name).is_file() for name in FILES):
        return None
    check_folder(folder)
    sums.check(folder, weights=False)
    settings = tokenizer_settings(folder)
    _check_class(folder, settings)
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        tokenizer_bounds.check(path, read_json(path))
    from jaxdistill.quiet_transformers import transformers

    try:
        with _without_code(folder) as place:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                str(place), trust_remote_code=False, local_files_only=True
            )
    except (KeyboardInterrupt, SystemExit):
        raise
    # transformers raises many kinds for one cause, unusable files; the tokenizers library panics,
    # which Python sees as a BaseException.
    except BaseException as error:
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: "
            f"{str(error)[:300]}); a tokenizer.json is the safest form (custom code is never run)"
        ) from error
    tokenizer.name_or_path = str(folder)
    return made_steady(tokenizer)


def _check_class(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """A class that a file names is a tokenizer of transformers' own, or none that it knows.

    transformers calls `from_pretrained` of whatever attribute of its own has that name: an Auto
    class among them would ask on stdin whether code of the folder's may be run.

    Raises:
      ModelError: naming file and class, or where auto_map is needed and so is code.
    """
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    from jaxdistill.quiet_transformers import transformers  # first

    path = folder / "tokenizer_config.json"
    named = {path: settings.get("tokenizer_class")}
    if (folder / "config.json").is_file():
        config = folder / "config.json"
        named[config] = read_json(config).get("tokenizer_class")
    known = {}
    for file, name in named.items():
        if name is None:
            continue
        kind = tokenizer_class_from_name(name) if isinstance(name, str) else name
        known[file] = isinstance(kind, type) and issubclass(
            kind, transformers.PreTrainedTokenizerBase
        )
        if kind is not None and not known[file]:
            raise ModelError(
                f"{file}: tokenizer_class: {str(name)[:80]!r} is no tokenizer of transformers': "
                "remove the field if tokenizer.json is enough without it"
            )
    if settings.get("auto_map") and not (known.get(path) and (folder / "tokenizer.json").is_file()):
        raise ModelError(
            f"{path}: auto_map: asks for Python code of the folder's own, which is never run: "
            "without it, it needs a tokenizer.json and a tokenizer_class of transformers' own"
        )


@contextlib.contextmanager
def _without_code(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder, or copies of its small files without auto_map where one of them has it.

    With an auto_map, even one that it does not follow, transformers takes another way to the class.
    """
    files = [folder / name for name in ("config.json", "tokenizer_config.json")]
    contents = {file.name: read_json(file) for file in files if file.is_file()}
    asked = any(content.get("auto_map") for content in contents.values())
    if not asked or not (folder / "tokenizer.json").is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="jaxdistill-tokenizer-") as beside:
        place = pathlib.Path(beside)
        for file in (*folder.glob("*.json"), *folder.glob("*.jinja")):
            (place / file.name).symlink_to(file.resolve())
        for name, content in contents.items():
            content.pop("auto_map", None)
            (place / name).unlink()
            (place / name).write_text(json.dumps(content))
        yield place
