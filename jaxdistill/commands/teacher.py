"""What is stored of a teacher, who checks it, and how its tokens meet a student's."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from jaxdistill.commands.kinds import SeedNumber
from jaxdistill.section import Count, Flag, Path, Problem, Section, Size


class Align(Section):
    """A text, and the two models that cut it into tokens."""

    text: Annotated[str, Flag(positional=True, metavar="TEXT")] = Field(
        description="The text itself; - reads it from standard input."
    )
    student: Annotated[Path, Flag(metavar="S")] = Field(
        description="A model folder, a .gguf file, a run, or bytes, for one token per byte."
    )
    teacher: Annotated[Path, Flag(metavar="T")] = Field(description="The same of the teacher.")
    allow_network: bool = Field(False, description="Download what is named and not here.")


class TeacherCache(Section):
    """What is stored of a teacher, and where."""

    output: Annotated[Path, Flag("-o", "DIR")] | None = Field(
        None, description="A folder, or gs://... or s3://...; none: teacher.cache of the file."
    )
    teacher: Annotated[str, Flag(metavar="NAME")] | None = Field(
        None, description="Which of several teachers is asked, about its own records alone."
    )
    format: Literal["hidden", "topk", "sampled"] = Field(
        "hidden",
        description="hidden: last hidden states, exact for every method of logits; topk: the k "
        "likeliest tokens; sampled: tokens drawn, unbiased.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="Of the stored numbers; auto: bfloat16 of hidden, else float16."
    )
    k: Annotated[Size, Flag(metavar="K")] | None = Field(
        None, description="Tokens of a position: 64 of topk, 50 draws of sampled."
    )
    temperatures: Annotated[
        tuple[Annotated[float, Field(ge=0.01, le=1000)], ...], Flag(metavar="T")
    ] = Field(
        (), max_length=16, strict=False, description="Of topk, besides 1: which T losses use."
    )
    draws: Annotated[int, Field(ge=1, le=1000), Flag(metavar="N")] | None = Field(
        None, description="Of sampled: independent draws, one for each epoch in turn."
    )
    seed: Annotated[SeedNumber, Flag(metavar="N")] | None = Field(
        None, description="Of sampled: of the draws; none: 0."
    )
    shard: Annotated[
        str, Field(pattern=r"^[1-9][0-9]{0,5}/[1-9][0-9]{0,5}$"), Flag(metavar="I/N")
    ] = Field("1/1", description="Ask only for every N-th part, from the I-th on.")
    dry_run: bool = Field(False, description="Only say how large it is; nobody is asked.")

    def share(self) -> tuple[int, int]:
        """(I, N) of the shard."""
        number, count = self.shard.split("/")
        return int(number), int(count)

    def problems(self) -> Iterator[Problem]:
        """Rules: a shard of those there are."""
        number, count = self.share()
        if number > count:
            yield ("shard",), f"{self.shard}: I must be from 1 to N"


class TeacherVerify(Section):
    """Who is asked again, and about how much."""

    teacher: Annotated[Path, Flag(metavar="MODEL")] = Field(
        description="The teacher, as teacher.source names it."
    )
    segments: Annotated[Count, Flag("-n", "N")] = Field(
        100, description="Segments, spread over all that are stored."
    )
