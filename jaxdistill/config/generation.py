"""The file of `jaxdistill teacher generate`: who is asked what, how often, and what is kept."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from jaxdistill.commands.kinds import RecordFormat
from jaxdistill.config.loader import loads_as, read
from jaxdistill.config.server import Api
from jaxdistill.drawing import Drawing
from jaxdistill.section import Count, Dtype, Path, Problem, Section


class AskedTeacher(Section):
    """Who explains: a model on this machine, or a server."""

    source: Path | None = Field(None, description="A model, as teacher.source in a run.")
    dtype: Dtype = Field("bfloat16", description="Type of its weights, computing and cache.")
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = Field(
        None, description="Type of its keys and values; null: as dtype."
    )
    slots: int = Field(32, ge=1, le=4096, description="Answers that are written at a time.")
    chat: bool = Field(False, description="Ask as the user's turn of its chat template.")
    api: Api | None = Field(None, description="A server instead.")

    def problems(self) -> Iterator[Problem]:
        """Rules: one of the two."""
        if (self.source is None) == (self.api is None):
            yield (), "needs one of source, api"
        if self.api is not None and self.chat:
            yield ("chat",), "has no effect with a server: use api.chat"


class PromptStyle(Section):
    """How a question is put."""

    style: Literal["zero_shot", "few_shot", "auto_cot", "preamble", "plain"] = Field(
        "zero_shot",
        description="zero_shot: one of the published triggers; few_shot: worked examples; "
        "auto_cot: worked examples that the teacher makes itself; preamble: a text in front; "
        "plain: the question alone, in a chat without Q: and A: around it.",
    )
    trigger: int = Field(1, ge=1, le=14, description="Number of the zero-shot trigger.")
    exemplars: Path | None = Field(None, description="File of worked examples, for few_shot.")
    preamble: Path | None = Field(None, description="Text file, for preamble.")
    symbolic: bool = Field(False, description="Ask for an arithmetic expression as the answer.")
    clusters: int = Field(8, ge=1, le=1000, description="Worked examples of auto_cot.")
    pool: Count = Field(100, description="Questions that auto_cot chooses among.")
    embed: Literal["tfidf", "hidden"] = Field(
        "tfidf", description="What auto_cot clusters: word weights, or mean hidden states."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: files where they are needed, and only there."""
        for name, style in (("exemplars", "few_shot"), ("preamble", "preamble")):
            given = getattr(self, name) is not None
            if given != (self.style == style):
                yield (name,), f"belongs to style: {style}" if given else f"needed by {style}"
        styles = {"trigger": "zero_shot", "symbolic": "few_shot"}
        styles |= dict.fromkeys(("clusters", "pool", "embed"), "auto_cot")
        for name, style in styles.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.style != style:
                yield (name,), f"has no effect without style: {style}"


class Sampling(Drawing):
    """How answers are drawn."""

    samples: int = Field(30, ge=1, le=10000, description="Answers per question, N.")
    max_new_tokens: int = Field(128, ge=1, le=10**6, description="Longest answer (tokens).")
    stop: tuple[Annotated[str, Field(min_length=1, max_length=100)], ...] = Field(
        ("\nQ:",), max_length=16, strict=False, description="Strings that end an answer."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="With question and sample, decides.")

    def problems(self) -> Iterator[Problem]:
        """Rules: no setting without effect."""
        yield from super().problems()
        if self.temperature == 0 and self.samples > 1:
            yield ("samples",), "must be 1 at temperature 0: all answers would be equal"


class Filter(Section):
    """What is kept."""

    correct_only: bool = Field(True, description="Drop answers that are wrong.")
    dedupe: bool = Field(True, description="Drop repetitions within a question.")
    budget: Count | None = Field(None, description="Samples per question; null: all.")
    by: Literal["random", "diversity", "likelihood", "open_endedness"] = Field(
        "random", description="How a budget chooses; open_endedness sets it by question."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: a budget where one is needed, and only there."""
        if self.by in ("diversity", "likelihood") and self.budget is None:
            yield ("by",), "has no effect without filter.budget"
        if self.by == "open_endedness" and self.budget is not None:
            yield ("budget",), "has no effect by open_endedness, which sets its own"


Candidates = Annotated[int, Field(ge=0, le=1000)]


class Augment(Section):
    """What is made out of given records, for task: augment."""

    seeds: Path = Field(description="The records, as data.train in a run.")
    format: RecordFormat = Field(
        "auto", description="What a record holds, as data.format in a run."
    )
    paraphrase: Candidates = Field(
        1, description="Of each record: its question in other words, with its own answer."
    )
    continuation: Candidates = Field(
        1, description="Of each record: the teacher's own answer, or how it goes on with a text."
    )
    question: Candidates = Field(
        1, description="For each record: a new question in the manner of a few, and its answer."
    )
    magpie: Candidates = Field(
        0, description="For each record: what the teacher itself writes as a user, and its answer."
    )
    shown: int = Field(3, ge=1, le=32, description="Questions shown for a new one.")
    user_turn: str | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="What the chat template prints before a user's text, for magpie from a server; "
        "a model on this machine knows.",
    )
    min_characters: int = Field(1, ge=1, le=10**6, description="Shorter texts are dropped.")
    max_characters: int = Field(20000, ge=1, le=10**7, description="Longer texts are dropped.")
    language: Annotated[str, Field(pattern="^[a-z]{2,3}$")] | None = Field(
        None, description="Code such as en: texts in other languages are dropped (extra augment)."
    )
    near: Annotated[float, Field(ge=0.1, lt=1)] | None = Field(
        0.7,
        description="Drop what shares this much (Jaccard, of 5-character pieces) with a seed or an "
        "earlier text (extra augment); null: only what is equal.",
    )
    max_dropped: float = Field(
        0.9, ge=0, le=1, description="Stop when more than this fraction is dropped."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: something is made, within lengths that exist."""
        if not any(self.candidates.values()):
            yield (), f"makes nothing: set one of {', '.join(self.candidates)} above 0"
        if self.min_characters > self.max_characters:
            yield ("min_characters",), f"must be at most max_characters ({self.max_characters})"

    @property
    def candidates(self) -> dict[str, int]:
        """How many of each kind are asked for, for each record."""
        names = ("paraphrase", "continuation", "question", "magpie")
        return {name: getattr(self, name) for name in names}


class Generation(Section):
    """The whole file."""

    version: int = Field(1, ge=1, le=1, description="Version of this format.")
    teacher: AskedTeacher = Field(description="Who explains.")
    task: Path = Field(
        description="Questions, such as svamp_train or FILE.jsonl?kind=number; or augment."
    )
    augment: Augment | None = Field(None, description="What task: augment makes.")
    limit: Count | None = Field(None, description="Only so many questions.")
    prompt: PromptStyle = Field(default_factory=PromptStyle, description="How a question is put.")
    sampling: Sampling = Field(default_factory=Sampling, description="How answers are drawn.")
    filter: Filter = Field(default_factory=Filter, description="What is kept.")
    forms: tuple[Literal["scotd", "label", "step_by_step", "sequence_kd", "think"], ...] = Field(
        ("scotd",), min_length=1, strict=False, description="Training files to write."
    )
    output: Path = Field("runs/rationales", description="Folder for samples and training files.")

    def problems(self) -> Iterator[Problem]:
        """Rules: what a server cannot do, and what belongs to augmentation."""
        yield from _augment_problems(self)
        if self.teacher.api is None:
            return
        if self.prompt.embed == "hidden":
            yield ("prompt", "embed"), "a server shows no hidden states: use tfidf"
        if len(self.sampling.stop) > 4:
            yield ("sampling", "stop"), "must be at most 4 strings: the protocol takes no more"
        if self.filter.by == "likelihood" and not self.teacher.api.logprobs:
            yield ("filter", "by"), "likelihood needs teacher.api.logprobs: true"


def _augment_problems(config: Generation) -> Iterator[Problem]:
    """The section belongs to the task, which reads no others but teacher, sampling and output."""
    if (config.task == "augment") != (config.augment is not None):
        missing = config.augment is None
        rule = "needed by task: augment" if missing else "has no effect without task: augment"
        yield ("augment",), rule
    if config.augment is None:
        return
    for name in ("prompt", "filter", "forms"):
        if name in config.model_fields_set:
            yield (name,), "has no effect with task: augment: remove it"
    if "samples" in config.sampling.model_fields_set:
        yield ("sampling", "samples"), "has no effect with task: augment: say augment.question: N"
    if config.augment.magpie and config.teacher.api and config.augment.user_turn is None:
        yield ("augment", "user_turn"), "needed for magpie from a server"


def load(path: str, overrides: tuple[str, ...] | list[str] = ()) -> Generation:
    """The file, with `key=value` overrides applied, checked.

    Raises:
      ConfigError: with one line for each thing wrong.
    """
    return loads_as(Generation, read(path), path, overrides)
