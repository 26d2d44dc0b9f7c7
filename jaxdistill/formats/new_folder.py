"""Folders of a model that appear whole under their name, or not at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

from safetensors import SafetensorError

from jaxdistill.errors import StorageError


def place(path: str | pathlib.Path) -> pathlib.Path:
    """The absolute path of a folder that is to be made.

    Raises:
      StorageError: where it exists with content.
    """
    folder = pathlib.Path(path).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder}: exists and is not empty; name a new folder")
    return folder


@contextlib.contextmanager
def filled(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill beside `folder`, whose place it takes if all went well.

    Raises:
      StorageError: where it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            inside = pathlib.Path(beside) / "model"
            inside.mkdir()
            yield inside
            if folder.exists():
                folder.rmdir()
            os.rename(inside, folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{folder}: cannot be written ({error}); nothing was left there: check the free space "
            "and the permissions"
        ) from error
