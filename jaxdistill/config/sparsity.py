"""The options of sparsity while a student trains, `student.sparsity:`, and what they exclude."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxdistill import rules
from jaxdistill.section import Count, Path, Problem, Section, StepOrFraction

Projection = Literal["query", "key", "value", "out", "gate", "up", "down"]
TARGETS: tuple[Projection, ...] = ("query", "key", "value", "out", "gate", "up", "down")


class Sparsity(Section):
    """Weights of the layers' projections that become 0 while the student trains, and stay 0."""

    pattern: Literal["2:4", "unstructured"] = Field(
        "2:4",
        description="2:4: two of every four weights along the input dimension, which sparse tensor "
        "cores read; unstructured: any.",
    )
    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of the weights that are 0 in the end; 2:4 has 0.5."
    )
    scope: Literal["output", "layer", "global"] = Field(
        "layer",
        description="Whose weights are compared: those of one output, of one matrix, or of all.",
    )
    by: Literal["weight", "wanda", "movement"] = Field(
        "weight",
        description="What a weight is worth: |w|; |w| times the norm of its input (Wanda); or how "
        "far gradients have moved it away from 0 (movement pruning).",
    )
    importance: Path | None = Field(
        None,
        description="Of wanda: the file that `jaxdistill importance` measured on the student.",
    )
    targets: Annotated[tuple[Projection, ...], Field(min_length=1, strict=False)] = Field(
        TARGETS, description="Projections of every layer; norms, embeddings and heads stay dense."
    )
    begin: StepOrFraction = Field(
        0,
        description="First update at which weights become 0, from 0: a whole number of updates, or "
        "a fraction of train.steps below 1.",
    )
    end: StepOrFraction = Field(
        0.5, description="Update at which the share is reached, and masks are final; as begin."
    )
    every: Count = Field(
        10,
        description="Updates between two changes of the masks; the share grows by a cubic ramp.",
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: no setting without effect; each target once."""
        if self.pattern == "2:4" and self.share != 0.5:
            yield ("share",), "is 0.5 for 2:4: remove it, or use pattern: unstructured"
        if self.by == "wanda" and self.importance is None:
            rule = "required for by: wanda: `jaxdistill importance STUDENT -o FILE` measures it"
            yield ("importance",), rule
        if self.by != "wanda" and self.importance is not None:
            yield ("importance",), f"has no effect with by: {self.by}: use wanda, or remove it"
        if len(set(self.targets)) != len(self.targets):
            yield ("targets",), "name each projection once"

    def span(self, steps: int) -> tuple[int, int]:
        """(begin, end) in updates, of a run of so many."""
        return rules.moment(self.begin, steps), rules.moment(self.end, steps)


def problems(config: Any) -> Iterator[Problem]:
    """What is wrong between `student.sparsity` and the other sections of a `Config`."""
    section = config.student.sparsity
    if section is None:
        return
    steps = config.train.steps
    begin, end = section.span(steps)
    if end >= steps:
        rule = f"must be below train.steps ({steps}): the masks would not be final in this run"
        yield ("student", "sparsity", "end"), rule
    if begin > end:
        yield ("student", "sparsity", "begin"), f"is update {begin}, after the end, update {end}"
