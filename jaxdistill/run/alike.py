"""What every process of a run must have alike: the configuration, the code, the versions."""

import platform
from importlib import metadata

from jaxdistill import agree
from jaxdistill.config import Config, syntax
from jaxdistill.run import changes
from jaxdistill.run.folder import PACKAGES


def check(config: Config) -> None:
    """Stops all processes together where one of them was started otherwise.

    Raises:
      ConfigError: naming the field, the processes and their values.
    """
    versions = {package: metadata.version(package) for package in PACKAGES}
    versions |= {"python": platform.python_version(), "code of jaxdistill": changes.code()}
    agree.same(versions | dict(syntax.dotted(config.model_dump(mode="json"))))
