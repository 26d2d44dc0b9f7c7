"""Kinds of values that the options of several commands have."""

from typing import Annotated, Literal

from pydantic import Field

from jaxdistill.section import Flag, Path, Size

Paths = Annotated[
    tuple[Path, ...],
    Field(min_length=1, max_length=1000, strict=False),
    Flag(metavar="PATH", repeat=True),
]
RowCount = Annotated[Size, Flag(metavar="ROWS")]
Number = Annotated[Size, Flag(metavar="N")]
SeedNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]
RecordFormat = Literal[
    "auto", "text", "messages", "completion", "sharegpt", "alpaca", "alpaca_prompt", "pairs",
    "plain", "paragraphs",
]  # fmt: skip
SpecialTokens = Literal["refuse", "parse", "text"]
