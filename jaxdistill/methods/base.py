"""What a method is: options, pure functions, and what they ask of a run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Required, TypedDict

from pydantic import Discriminator, Field, Tag

from jaxdistill.methods import signals
from jaxdistill.section import Section

# A bool among the knobs: whether the metrics at T = 1 are wanted; absent, they are.
MONITOR = "monitor"
# A mean among an objective's own: what adaptive knobs read instead of the loss.
CONTROL = "control"

Chunk = Annotated[
    Annotated[Literal["auto"], Tag("<auto>")]
    | Annotated[int, Field(ge=1, le=2**24), Tag("<tokens>")],
    Discriminator(lambda value: "<auto>" if isinstance(value, str) else "<tokens>"),
]
CHUNK = "Tokens whose logits exist at one time; auto chooses by vocabulary. Only memory changes."


class Head(TypedDict, total=False):
    """How the fused head loss is computed; but for rounding the numbers are the same.

    Attributes:
      vocab: how many rows of both heads are real tokens; padded rows behind them are left out.
      columns: the rows that both models have, rising; None: all. Divergences compare these alone,
        cross-entropy is over all of the student's.
      chunk: tokens whose logits exist at one time on a device; None chooses.
      implementation: of the row statistics, see `kernels.support`; None chooses.
      logits_dtype: dtype of a chunk's logits; None: that of the hidden states, and float32 for
        log-probabilities.
    """

    vocab: Required[int]
    columns: tuple[int, ...] | None
    chunk: int | None
    implementation: str | None
    logits_dtype: str | None


class Options(Section):
    """The options that every method has: its name, and how the fused head loss is computed."""

    chunk: Chunk = Field("auto", description=CHUNK)
    implementation: Literal["auto", "xla", "mosaic_gpu"] = Field(
        "auto", description="Of the row statistics: a Pallas kernel where one runs, or XLA's form."
    )
    logits_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="In which a chunk's logits are kept; auto: that of the hidden states, and "
        "float32 for log-probabilities. float32 leaves bfloat16 models' logits unrounded at twice "
        "the traffic.",
    )
    name: str = Field(description="The method.")

    def head(self, facts: "Facts") -> Head:
        """The options of the head loss, for the vocabularies of a run."""
        given = lambda value: None if value == "auto" else value
        return {
            "vocab": facts.vocab,
            "columns": facts.columns,
            "chunk": given(self.chunk),
            "implementation": given(self.implementation),
            "logits_dtype": given(self.logits_dtype),
        }


class Objective(NamedTuple):
    """What a method minimises, as pure functions.

        init(key) -> params
        apply(params, student, signal, batch, knobs) -> {name: Mean}, "loss" among them

    Attributes:
      init: key -> parameters of its own; trained with the student, dropped at export.
      apply: takes these parameters, the student's `types.Outputs`, a `types.TeacherSignal`, a
        `types.Batch` and the knobs' values by name.
      needs_teacher: whether `signal` must hold a teacher.
      needs_start: whether `signal` must hold, in the teacher's place, the student as it was before
        the first step.
      student_taps: layers of the student whose outputs `apply` reads.
      teacher_taps: layers of the teacher.
      student_relations: layers of the student whose queries, keys and values `apply` reads.
      teacher_relations: layers of the teacher.
      prepare: whole batch -> more knobs, made before it is split into micro-batches; or None.
      token_means: whether its metrics are means over tokens; if not, `measuring` is evaluated.
    """

    init: Callable[..., Any]
    apply: Callable[..., dict[str, Any]]
    needs_teacher: bool = True
    needs_start: bool = False
    student_taps: tuple[int, ...] = ()
    teacher_taps: tuple[int, ...] = ()
    student_relations: tuple[int, ...] = ()
    teacher_relations: tuple[int, ...] = ()
    prepare: Callable[..., Mapping[str, Any]] | None = None
    token_means: bool = True


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a method may know of a run, as plain values.

    Attributes:
      student: `DecoderConfig` of the student.
      teacher: that of the teacher, or None.
      student_tokenizer: turns text into the student's tokens.
      teacher_tokenizer: the teacher's; the same object where both share one.
      vocab: rows of the heads that are tokens.
      steps: optimizer steps of the run.
      learning_rate: the highest of the student's parameters.
      columns: the rows of tokens that both models have, rising, or None: all of them.
      longest: tokens of an answer at most, where the student writes.
    """

    student: Any
    teacher: Any
    student_tokenizer: Any
    teacher_tokenizer: Any
    vocab: int
    steps: int
    learning_rate: float
    columns: tuple[int, ...] | None = None
    longest: int | None = None


@dataclasses.dataclass(frozen=True)
class Built:
    """A method with the options of a run: the objective, its knobs, and how parameters train.

    Attributes:
      objective: what is minimised.
      knobs: name -> number, Optax schedule, or a transformation that keeps the knob's state, for
        each name that the objective reads from its knobs.
      measuring: name -> value of a knob while models are measured; 1 where nothing is said.
      learning_rate: the highest of the objective's own parameters; None: the student's.
      trained: which parameters train when, as `optim.optimizer` takes it; the rest always do.
      scaled: by how much their updates are multiplied when, as `optim.optimizer` takes it.
    """

    objective: Objective
    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measuring: Mapping[str, float] = dataclasses.field(default_factory=dict)
    learning_rate: float | None = None
    trained: Mapping[str, tuple[int, int | None]] = dataclasses.field(default_factory=dict)
    scaled: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
      options: what a configuration may say; the docstring is its line in `jaxdistill ls methods`.
      build: (options, facts) -> the method of a run.
      needs_teacher: options -> whether the run must have a teacher.
      needs_start: options -> whether it compares with the student before the first step.
      reads: options -> what of the teacher its loss reads, a row of `signals.TABLE`.
      sides: the origins of the records that it compares, a tuple for each side; the training data
        must hold each side. () where it does not matter who wrote a record.
      pairs: whether its records are pairs of answers, of which it prefers one.
      second_view: whether the teacher reads the text in tokens of its own: the batch carries them,
        and the options are `two_tokenizers.TwoTokenizers`.
      rewards: whether it learns from rewards of what the student writes itself.
      marks_wrong: options -> whether its loss reads which answers the first verifier gave less
        than 1.
      any_text: whether it can learn from any text; if not, its records are of a form of their own.
      reads_sampler: whether its loss reads the probability that a token was drawn with, which only
        the student's own text has.
      is_control: whether it is what distillation is compared with: the same data, no teacher.
      measured: whether its numbers on a real model are in benchmarks/results, for better or worse;
        if not, its loss and gradient equal the authors' code or the paper's formula.
    """

    options: type[Options]
    build: Callable[[Any, Facts], Built]
    needs_teacher: Callable[[Any], bool] = lambda options: True
    needs_start: Callable[[Any], bool] = lambda options: False
    reads: Callable[[Any], str] = lambda options: signals.ROWS
    sides: tuple[tuple[str, ...], ...] = ()
    pairs: bool = False
    second_view: bool = False
    rewards: bool = False
    marks_wrong: Callable[[Any], bool] = lambda options: False
    any_text: bool = True
    reads_sampler: bool = False
    is_control: bool = False
    measured: bool = False


def at_known_temperature(objective: Objective, knobs: Mapping[str, Any]) -> Objective:
    """The same, with T = 1 as part of the program where the knob `temperature` is 1 throughout.

    A knob is traced: one program serves all of its values. One that is known to be 1 lets the
    losses make every sum once, see `kernels.operands.LossSpec`; the run has the knob all the same.
    """
    given = knobs.get("temperature")
    if not isinstance(given, int | float) or given != 1:
        return objective

    def apply(params, student, signal, batch, knobs):
        return objective.apply(params, student, signal, batch, {**knobs, "temperature": 1.0})

    return objective._replace(apply=apply)


def no_parameters(key: Any) -> dict:
    """The `init` of an objective without parameters of its own."""
    return {}
