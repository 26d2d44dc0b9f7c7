"""How tokens are drawn: the options that commands, files and rollouts share."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from jaxdistill.ranges import DRAWING
from jaxdistill.section import Flag, Problem, Section

_T, _K, _P, _MIN = (DRAWING[name] for name in ("temperature", "top_k", "top_p", "min_p"))

Temperature = Annotated[float, Field(ge=_T.least, le=_T.most), Flag(metavar="T")]
FILTERS = ("top_k", "top_p", "min_p")


class Drawing(Section):
    """How a token is drawn."""

    temperature: Temperature = Field(1.0, description="0 is greedy.")
    top_k: Annotated[int, Field(ge=int(_K.least), le=int(_K.most)), Flag(metavar="K")] | None = (
        Field(None, description="Draw among the k most probable tokens.")
    )
    top_p: Annotated[float, Field(gt=_P.least, le=_P.most), Flag(metavar="P")] | None = Field(
        None, description="Draw among the fewest tokens whose probability reaches p."
    )
    min_p: Annotated[float, Field(ge=_MIN.least, le=_MIN.most), Flag(metavar="P")] | None = Field(
        None, description="Draw among tokens at least min_p times as probable as the likeliest."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: no filter where nothing is drawn."""
        if self.temperature == 0:
            for name in FILTERS:
                if getattr(self, name) is not None:
                    yield (name,), "has no effect at temperature 0: remove it"
