"""What eval and compare measure on: text, questions with a right answer, lm-eval's tasks."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from jaxdistill.commands.kinds import Number, Paths, RecordFormat, RowCount, SeedNumber
from jaxdistill.drawing import Temperature
from jaxdistill.section import Count, Dtype, Flag, Path, Problem, Section, Size


class EvalData(Section):
    """The text that a model is measured on."""

    data: Paths = Field(
        description="Files, or names such as python:docs?split=held_out; several are joined."
    )
    format: RecordFormat = Field(
        "auto", description="What a record holds, as data.format in a run."
    )
    batch_size: RowCount = Field(8, description="Rows at a time, over all devices.")
    max_bad_fraction: Annotated[float, Field(ge=0, le=1), Flag(metavar="SHARE")] = Field(
        0.001, description="Stop when more than this fraction of records is broken."
    )
    cache_dir: Annotated[Path, Flag(metavar="DIR")] = Field(
        "runs/.cache", description="Folder of tokenised rows, used again."
    )


class EvalRows(EvalData):
    """The text that a model is measured on, as rows of tokens."""

    seq_len: Annotated[int, Field(ge=2, le=2**20), Flag(metavar="TOKENS")] = Field(
        1024, description="Tokens in a row."
    )


class Evaluate(EvalData):
    """What `eval` measures on."""

    teacher: Annotated[Path, Flag(metavar="MODEL")] | None = Field(
        None, description="Measure KL and agreement against this model."
    )
    seq_len: Annotated[int, Field(ge=2, le=2**20), Flag(metavar="TOKENS")] | None = Field(
        None, description="Tokens in a row; none: as a run's own, 1024 of other models."
    )
    loss_on: Literal["all", "completion", "assistant"] | None = Field(
        None, description="Which tokens count; none: those of the run, all of other models."
    )
    max_rows: Annotated[Count, Flag(metavar="ROWS")] | None = Field(
        None, description="Use only so many rows; none: all."
    )
    dtype: Dtype = Field("float32", description="Of weights and computation.")


class Compare(EvalRows):
    """What models are compared on."""

    teacher: Annotated[Path, Flag(metavar="MODEL")] | None = Field(
        None, description="Measure KL, agreement and acceptance against this model."
    )
    max_rows: Annotated[Count, Flag(metavar="ROWS")] | None = Field(
        None, description="Use only so many rows; none: all."
    )
    questions: Annotated[Path, Flag(metavar="FILE")] | None = Field(
        None, description="Multiple choice: a JSONL file, or `texts`: made out of the data."
    )
    max_questions: Annotated[Count, Flag(metavar="N")] = Field(
        200, description="At most so many questions."
    )
    prompts: Annotated[tuple[str, ...], Flag("-p", "TEXT", "--prompt", repeat=True)] = Field(
        (), strict=False, description="Texts that every model continues."
    )
    speed: bool = Field(True, description="Measure latencies.")
    repeats: Annotated[Count, Flag(metavar="N")] = Field(10, description="Timings of each kind.")
    prompt_tokens: Annotated[Size, Flag(metavar="TOKENS")] = Field(
        128, description="Read in a timed row."
    )
    new_tokens: Annotated[Size, Flag(metavar="TOKENS")] = Field(
        32, description="Written in a timed row."
    )
    dtype: Dtype = Field(
        "float32", description="Of weights and computation, where a model is not quantised."
    )


class Tasks(Section):
    """How questions with a right answer are put to a model."""

    style: Literal["plain", "zero_shot", "few_shot", "preamble", "predict", "chat"] = Field(
        "plain",
        description="plain: Q and A; zero_shot: a published trigger, and a second question for the "
        "answer; few_shot: worked examples; preamble: a text in front; predict: the label task of "
        "Distilling Step-by-Step; chat: the user's turn.",
    )
    exemplars: Annotated[Path, Flag(metavar="FILE")] | None = Field(
        None, description="Worked examples for few_shot, or the text for preamble."
    )
    trigger: Annotated[int, Field(ge=1, le=14), Flag(metavar="N")] = Field(
        1, description="Number of the zero-shot trigger."
    )
    self_consistency: Annotated[int, Field(ge=0, le=10**6), Flag(metavar="K")] = Field(
        0, description="Answers that vote, besides the greedy one."
    )
    temperature: Temperature = Field(0.7, description="Of the answers that vote.")
    max_new_tokens: Number = Field(128, description="Longest answer (tokens).")
    limit: Annotated[Count, Flag(metavar="N")] | None = Field(
        None, description="Questions of each task; none: all."
    )
    seed: Annotated[SeedNumber, Flag(metavar="N")] = Field(
        0, description="Of the answers that vote."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: a file where one is used, and only there; votes that differ."""
        if (self.exemplars is not None) != (self.style in ("few_shot", "preamble")):
            yield ("exemplars",), "a file belongs to few_shot and preamble, and only there"
        if self.self_consistency and self.temperature == 0:
            rule = f"{self.self_consistency} answers at temperature 0 would all be equal"
            yield ("self_consistency",), rule


class Harness(Section):
    """How lm-eval's tasks are run."""

    limit: Annotated[Count, Flag(metavar="N")] | None = Field(
        None, description="Documents of each task; none: all."
    )
    num_fewshot: Annotated[int, Field(ge=0, le=10**4), Flag(metavar="N")] | None = Field(
        None, description="Examples before each question; none: as the task says."
    )
    batch_size: RowCount = Field(8, description="Rows at a time.")
    chat: bool = Field(
        False,
        description="Ask in turns of the tokenizer's chat template, examples as turns before.",
    )
