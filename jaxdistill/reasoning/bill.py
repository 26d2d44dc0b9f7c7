"""What was spent on a teacher, over all processes that asked it for the same thing, in a file."""

import json
from collections.abc import Mapping
from pathlib import Path

from jaxdistill.data.store import writing
from jaxdistill.errors import ConfigError
from jaxdistill.reasoning.asking import added
from jaxdistill.safe import json_file, whole_file


class Bill:
    """The sum of what earlier processes and this one spent.

    Args:
      path: the file.
      what: was paid for, for messages.

    Raises:
      ConfigError: if there is a file that cannot be read.
    """

    def __init__(self, path: Path, what: str):
        self._path = path
        try:
            self._before = json_file.amounts(json_file.read(path, missing={}))
        except ValueError as error:
            raise ConfigError(
                f"{path}: {error}: it says what was spent on {what}: mend or remove it"
            ) from error

    def spend(self, now: Mapping[str, float]) -> dict[str, float]:
        """Records what was spent since this was opened; returns the sum over all processes.

        Raises:
          StorageError: if it cannot be written.
        """
        total = added(self._before, now)
        with writing(self._path.parent):
            whole_file.write_text(self._path, json.dumps(total) + "\n")
        return total
