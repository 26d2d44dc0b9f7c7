"""Folders of a model that appear whole under their name, with checksums, or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from safetensors import SafetensorError

from jaxdistill import errors, rules
from jaxdistill.errors import StorageError
from jaxdistill.formats import sums
from jaxdistill.safe import beside, manifest, whole_file


def place(path: str | pathlib.Path) -> pathlib.Path:
    """The absolute path of a folder that is to be made.

    Raises:
      StorageError: where it exists with content.
      ConfigError: for the address of an object store.
    """
    errors.check(rules.local("the new folder", str(path)))
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
    with _written(folder) as inside:
        yield inside
        _finish(inside)
        if folder.exists():
            folder.rmdir()
        _move(inside, folder)


@contextlib.contextmanager
def renewed(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """As `filled`, for a folder of ours that may exist: it is replaced where it is another.

    Raises:
      StorageError: where it cannot be written.
    """
    with _written(folder) as inside:
        yield inside
        _finish(inside)
        if sums.same(inside, folder):
            return
        if folder.exists():  # beside, from where it goes with the rest
            os.rename(folder, inside.with_name(beside.OLD))
        _move(inside, folder)


@contextlib.contextmanager
def _written(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with beside.folder(folder) as inside:
            yield inside
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{folder}: cannot be written ({error}); nothing was left there: check the free space "
            "and the permissions"
        ) from error


def _finish(inside: pathlib.Path) -> None:
    """The last touches of a folder that is complete."""
    for path in inside.glob("*.safetensors"):
        whole_file.usual_mode(path)
    sums.seal(inside)


def _move(inside: pathlib.Path, folder: pathlib.Path) -> None:
    os.rename(inside, folder)
    manifest.sync(folder.parent)
