"""The options of numbers of few bits in a run: which kernels, by which scheme, and from when."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag

from jaxdistill import rules
from jaxdistill.commands.export import (
    EXCEPTIONS,
    SCHEME,
    Exceptions,
    Quantized,
    SchemeName,
    exception_problems,
)
from jaxdistill.section import Problem, Section, StepOrFraction

_kind = lambda value: "<section>" if isinstance(value, dict | Section) else "<scheme>"
Rounded = Annotated[
    Annotated[SchemeName, Tag("<scheme>")] | Annotated[Quantized, Tag("<section>")],
    Discriminator(_kind),
]

Whole = Literal["int8", "int4"]


class QuantizedBase(Quantized):
    """Which frozen kernels are held in whole numbers, and which scheme each has."""

    scheme: Whole = Field(description="int8 or int4: they round the weights of the layers.")

    def problems(self) -> Iterator[Problem]:
        """Rules: whole numbers alone."""
        yield from super().problems()
        for text in self.exceptions:
            if text.rpartition("=")[2] not in (*get_args(Whole), "none"):
                yield ("exceptions",), f"{text}: a frozen kernel is held as int8, int4 or none"


RoundedBase = Annotated[
    Annotated[Whole, Tag("<whole>")] | Annotated[QuantizedBase, Tag("<section>")],
    Discriminator(lambda value: "<section>" if isinstance(value, dict | Section) else "<whole>"),
]


class LaterScheme(Section):
    """A scheme that begins within a run."""

    at: StepOrFraction = Field(
        description="First step that computes by it, from 0: a whole number of steps before it, or "
        "a fraction of train.steps below 1."
    )
    scheme: SchemeName = Field(description=SCHEME)


class QuantizedAware(Section):
    """How the kernels of a student compute that is trained to be quantised."""

    scheme: SchemeName | Literal["none"] = Field(
        description=f"In the first steps. {SCHEME} none: as they are, until `then`."
    )
    then: Annotated[tuple[LaterScheme, ...], Field(max_length=20, strict=False)] = Field(
        (),
        description="Schemes that follow, such as [{at: 300, scheme: int4}]; each is a program of "
        "its own. Held-out text is measured by the last one, as the student will be written.",
    )
    exceptions: Exceptions = Field((), description=EXCEPTIONS)

    def problems(self) -> Iterator[Problem]:
        """Rules: something is rounded in the end; exceptions fit to every scheme."""
        if self.scheme == "none" and not self.then:
            yield ("scheme",), "none without `then` rounds nothing: add then, or remove quantize"
        schemes = [self.scheme, *(later.scheme for later in self.then)]
        yield from exception_problems(self.exceptions, tuple(schemes))
        for one, next_ in zip(schemes, schemes[1:], strict=False):
            if one == next_:
                yield ("then",), f"{one} follows {one}: remove one of them"


RoundedStudent = Annotated[
    Annotated[SchemeName, Tag("<scheme>")] | Annotated[QuantizedAware, Tag("<section>")],
    Discriminator(_kind),
]


def problems(config: Any) -> Iterator[Problem]:
    """What is wrong between `student.quantize` and the other sections of a `Config`."""
    given = config.student.quantize
    if not isinstance(given, QuantizedAware) or not given.then:
        return
    steps, key, before = config.train.steps, ("student", "quantize", "then"), 0
    for number, later in enumerate(given.then):
        step = rules.moment(later.at, steps)
        if step >= steps:
            rule = f"is step {step}, and the run has {steps} (train.steps): remove it or lower it"
            yield (*key, number, "at"), rule
        elif step <= before:
            after = f"step {before}, where {given.then[number - 1].scheme} begins"
            rule = f"is step {step}: must be after {after if number else 'the first step'}"
            yield (*key, number, "at"), rule
        before = step
    if config.rollout is not None:
        rule = "what the student writes is computed by one scheme: name it alone, or remove rollout"
        yield key, rule
    if config.teacher is not None and config.teacher.self_ is not None:
        yield key, "the student teaches itself by one scheme: name it alone, or remove teacher.self"


def stages(given: Any, steps: int) -> list[tuple[int, Any]]:
    """(first step, from 0; the scheme's name and exceptions) of `student.quantize`, in order.

    Args:
      given: the option; None is one stage without any.
      steps: of the run.
    """
    if not isinstance(given, QuantizedAware):
        return [(0, given)]
    begun = [(0, given.scheme)]
    begun += [(rules.moment(later.at, steps), later.scheme) for later in given.then]
    named = lambda scheme: Quantized(scheme=scheme, exceptions=given.exceptions)
    return [(step, None if scheme == "none" else named(scheme)) for step, scheme in begun]
