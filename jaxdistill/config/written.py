"""Where a configuration says what: its file and line, or the override, for later messages."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping

from jaxdistill.config.syntax import KeyPath, shown
from jaxdistill.errors import UserError

# What a line of a message begins with: `data.train.0.path = 'x': ...`, or `rollout: ...`.
_KEY = re.compile(r"[a-z_]+(?:\.[\w-]+)*(?= = |: )")


@dataclasses.dataclass(eq=False)
class Written:
    """Where each part of a configuration stands.

    Any two are equal: where something stands changes nothing of what it says.

    Attributes:
      places: path -> `file:line:column`.
      overrides: path -> the override that the part comes from.
    """

    places: Mapping[KeyPath, object] = dataclasses.field(default_factory=dict)
    overrides: Mapping[KeyPath, str] = dataclasses.field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Written)

    __hash__ = None  # type: ignore[assignment]

    def of(self, path: KeyPath) -> str | None:
        """The nearest thing that the user wrote at a path or above it; None without any."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overrides:
                return f"override {shown(self.overrides[path[:end]])}"
            if path[:end] in self.places:
                return str(self.places[path[:end]])
        return None

    def located(self, message: str) -> str:
        """A message, each line that begins with a key behind the place of that key."""
        return "\n".join(map(self._located, message.split("\n")))

    def _located(self, line: str) -> str:
        key = _KEY.match(line)
        if key is None:
            return line
        parts = (int(part) if part.isdecimal() else part for part in key[0].split("."))
        place = self.of(tuple(parts))
        return line if place is None else f"{place}: {line}"

    def locate(self, error: UserError) -> UserError:
        """The error, its message `located`."""
        error.args = (self.located(str(error)),)
        return error

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Says of each error that is raised inside where the configuration caused it."""
        try:
            yield
        except UserError as error:
            self.locate(error)
            raise
