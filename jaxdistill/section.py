"""What every part of the configuration shares: frozen, strict, and rules between its fields."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

Problem = tuple[tuple[str | int, ...], str]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
PLAIN_PATTERN = r"^[^\x00-\x1f\x7f]*$"

Path = Annotated[str, Field(min_length=1, max_length=1024, pattern=PLAIN_PATTERN)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Size = Annotated[int, Field(ge=1, le=10**7)]
Budget = Annotated[str, Field(max_length=20)]
Dtype = Literal["float32", "bfloat16"]
# A step of a run: its number, or a fraction of all steps. `rules.moment` makes a number of it.
StepOrFraction = Annotated[
    Annotated[int, Field(ge=0, le=10**9), Tag("<steps>")]
    | Annotated[float, Field(ge=0, lt=1), Tag("<fraction>")],
    Discriminator(lambda value: "<fraction>" if isinstance(value, float) else "<steps>"),
]


@dataclass(frozen=True)
class Flag:
    """How an option looks on the command line, where its name and its type do not say it.

    Attributes:
      short: a second spelling, such as -o.
      metavar: what stands for its value in the help text.
      name: how it is typed where that is not the field's name, such as --from.
      positional: the value stands alone, without the option's name.
      repeat: the option is given once for each of several values, not once for all of them.
    """

    short: str | None = None
    metavar: str | None = None
    name: str | None = None
    positional: bool = False
    repeat: bool = False


class Section(BaseModel):
    """A frozen part of the configuration; no unknown keys, lax types or non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def problems(self) -> Iterator[Problem]:
        """Yields (path below this section, message) for each rule between fields that is broken."""
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self) -> "Section":
        problems = list(self.problems())
        if problems:
            text = "; ".join(f"{'.'.join(map(str, path))}: {message}" for path, message in problems)
            raise PydanticCustomError("rules", "{text}", {"text": text, "problems": problems})
        return self
