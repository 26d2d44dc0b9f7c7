"""What every process of a run must have alike: the configuration, the code, the versions."""

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from jaxdistill import agree
from jaxdistill.config import syntax
from jaxdistill.run import changes
from jaxdistill.run.folder import PACKAGES


def check(settings: Mapping[str, Any]) -> None:
    """Stops all processes together where one of them was started otherwise.

    Args:
      settings: of the configuration, section by section.

    Raises:
      ConfigError: naming the field, the processes and their values.
    """
    versions = {package: metadata.version(package) for package in PACKAGES}
    versions |= {"python": platform.python_version(), "code of jaxdistill": changes.code()}
    agree.same(versions | dict(syntax.dotted(settings)))
