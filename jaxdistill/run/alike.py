"""What every process of a run must have alike: the configuration, the code, the versions."""

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from jaxdistill import agree
from jaxdistill.config import Config
from jaxdistill.run import changes
from jaxdistill.run.folder import PACKAGES


def check(config: Config) -> None:
    """Stops all processes together where one of them was started otherwise.

    Raises:
      ConfigError: naming the field, the processes and their values.
    """
    versions = {package: metadata.version(package) for package in PACKAGES}
    versions |= {"python": platform.python_version(), "code of jaxdistill": changes.code()}
    agree.same(versions | dict(_flat(config.model_dump(mode="json"))))


def _flat(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Keys as they are overridden, such as data.train.0.path, with their values."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for name, value in items:
        below = (*path, str(name))
        if isinstance(value, Mapping | list | tuple):
            yield from _flat(value, below)
        else:
            yield ".".join(below), value
