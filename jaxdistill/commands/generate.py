"""How a model answers: one prompt, or whoever asks its server."""

from typing import Annotated

from pydantic import Field

from jaxdistill.commands.kinds import SeedNumber, SpecialTokens
from jaxdistill.drawing import Drawing, Temperature
from jaxdistill.section import Dtype, Flag, Section, Size


class Generate(Drawing):
    """How an answer is drawn."""

    temperature: Temperature = Field(0.0, description="0 is greedy.")
    max_new_tokens: Annotated[int, Field(ge=1, le=10**6), Flag(metavar="N")] = Field(
        128, description="Longest answer (tokens)."
    )
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=100)], ...],
        Flag(metavar="TEXT", repeat=True),
    ] = Field((), max_length=16, strict=False, description="Strings that end an answer.")
    seed: Annotated[SeedNumber, Flag(metavar="N")] = Field(0, description="Of the draws.")


class Serve(Section):
    """How a model is served."""

    host: Annotated[str, Flag(metavar="ADDRESS")] = Field(
        "127.0.0.1", description="Where to listen; 127.0.0.1 is this machine only."
    )
    port: Annotated[int, Field(ge=0, le=65535), Flag(metavar="N")] = Field(
        8000, description="0 takes a free one."
    )
    slots: Annotated[int, Field(ge=1, le=4096), Flag(metavar="ROWS")] = Field(
        32, description="Answers that are written at a time."
    )
    length: Annotated[Size, Flag(metavar="TOKENS")] | None = Field(
        None, description="Prompt and answer together; none: at most 2048 of the model's context."
    )
    special_tokens: SpecialTokens = Field(
        "refuse",
        description="What a special token's string in a plain prompt is, such as <|im_start|>: "
        "refused, parsed to the token, or kept as text. In messages it is always text.",
    )
    dtype: Dtype = Field("bfloat16", description="Of weights, computation and cache.")
