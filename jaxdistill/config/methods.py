"""The options of the methods, and how far each has come."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from jaxdistill.config.knobs import (
    LAYERS,
    Alpha,
    Balance,
    Layers,
    Temperature,
    Weight,
    WeightSchedule,
)
from jaxdistill.config.section import Count, Problem, Section

Chunk = Annotated[
    Annotated[Literal["auto"], Tag("<auto>")]
    | Annotated[int, Field(ge=1, le=2**24), Tag("<tokens>")],
    Discriminator(lambda value: "<auto>" if isinstance(value, str) else "<tokens>"),
]
CHUNK = "Tokens whose logits exist at one time; auto chooses by vocabulary. Only memory changes."


class Head(Section):
    """How the fused head loss is computed; but for rounding the numbers are the same."""

    chunk: Chunk = Field("auto", description=CHUNK)
    implementation: Literal["auto", "xla", "mosaic_gpu"] = Field(
        "auto", description="Of the row statistics: a Pallas kernel where one runs, or XLA's form."
    )
    logits_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="In which a chunk's logits are kept; auto: that of the hidden states. float32 "
        "leaves bfloat16 models' logits unrounded at twice the traffic.",
    )


# Divergence -> its parameters with their defaults and ranges (least, most).
DIVERGENCES: dict[str, dict[str, tuple[float, float, float]]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {"weight": (0.5, 0, 1)},
    "generalized_jsd": {"beta": (0.5, 0, 1)},
    "skew_forward_kl": {"skew": (0.1, 0, 1)},
    "skew_reverse_kl": {"skew": (0.1, 0, 1)},
    "total_variation": {},
    "alpha_divergence": {"alpha": (0.5, 0, 1)},
    "alpha_beta_divergence": {"alpha": (0.2, 0, 10), "beta": (0.7, 0, 10)},
    "adaptive_kl": {"mu": (0.5, 0, 1)},
    "alphanet": {"clip": (5.0, 0.01, 1e6)},
    "decoupled_kl": {"target_weight": (1.0, 0, 1e6), "rest_weight": (0.5, 0, 1e6)},
    "smoothed_forward_kl": {"target_smoothing": (0.1, 0, 1)},
}
# Those that read whole rows of logits: their parameters are part of the compiled program.
WHOLE_ROWS = (
    "adaptive_kl",
    "alphanet",
    "decoupled_kl",
    "smoothed_forward_kl",
)
Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "generalized_jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "alpha_divergence",
    "alpha_beta_divergence",
    "adaptive_kl",
    "alphanet",
    "decoupled_kl",
    "smoothed_forward_kl",
]


class Kd(Head):
    """Knowledge distillation: alpha * CE + (1 - alpha) * T^2 * divergence(teacher, student)."""

    name: Literal["kd"] = Field(description="The method.")
    divergence: Divergence = Field(
        "forward_kl", description="forward_kl is KL(teacher || student), reverse_kl the other way."
    )
    parameters: dict[str, Weight] = Field(
        {},
        description="Of the divergence, such as {beta: 0.1} of generalized_jsd; each a number or "
        "{schedule, start, end}.",
    )
    alpha: Alpha = Field(
        0.5,
        description="Weight of the hard labels, 0 to 1: alpha * CE + (1 - alpha) * divergence; a "
        "number or {schedule, start, end}.",
    )
    temperature: Temperature = Field(
        1.0, description="T, divides both models' logits; a number or {schedule, start, end}."
    )
    scale_by_t2: bool = Field(
        True, description="Multiply the divergence by T^2, so that T does not change its weight."
    )
    label_smoothing: float = Field(
        0.0, ge=0, le=1, description="Share of the hard labels spread evenly over the vocabulary."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: parameters belong to the divergence and lie in their range, all the way."""
        known = DIVERGENCES[self.divergence]
        for name, given in self.parameters.items():
            if name not in known:
                has = ", ".join(known) or "none"
                yield ("parameters", name), f"no parameter of {self.divergence}; it has: {has}"
                continue
            moves = not isinstance(given, int | float)
            if moves and self.divergence in WHOLE_ROWS:
                yield ("parameters", name), f"must be a number: {self.divergence} cannot move it"
                continue
            _, least, most = known[name]
            for value in (given.start, given.end) if moves else (given,):
                if not least <= value <= most:
                    yield ("parameters", name), f"{value}: must be in [{least}, {most}]"
                elif moves and self.divergence == "generalized_jsd" and value in (0, 1):
                    rule = f"{value}: must lie inside (0, 1): the divergence jumps at its ends"
                    yield ("parameters", name), rule

    def parameter_values(self) -> dict[str, float | WeightSchedule]:
        """The divergence's parameters, defaults where nothing is given."""
        defaults = {name: entry[0] for name, entry in DIVERGENCES[self.divergence].items()}
        return defaults | self.parameters


class SmoothedKd(Kd):
    """Smoothed KD: mostly the labels, and a little of the teacher's soft ones, at T = 1."""

    name: Literal["smoothed_kd"] = Field(description="The method.")  # pyrefly: ignore
    alpha: Alpha = Field(0.9, description="Weight of the hard labels; the teacher's is 1 - alpha.")


class Distillm(Kd):
    """DistiLLM's loss: the skew KL to a mixture with the teacher, without hard labels."""

    name: Literal["distillm"] = Field(description="The method.")  # pyrefly: ignore
    divergence: Literal["skew_forward_kl", "skew_reverse_kl"] = Field(
        "skew_forward_kl", description="Which of the two directions."
    )
    alpha: Alpha = Field(0.0, description="Weight of the hard labels.")


class ReverseKd(Kd):
    """Reverse KL, MiniLLM's direction, on given text: the student says what the teacher would."""

    name: Literal["reverse_kd"] = Field(description="The method.")  # pyrefly: ignore
    divergence: Literal["reverse_kl"] = Field("reverse_kl", description="Its only one.")


class Jsd(Kd):
    """Generalised Jensen-Shannon divergence, GKD's loss, on given text; parameters: beta."""

    name: Literal["jsd"] = Field(description="The method.")  # pyrefly: ignore
    divergence: Literal["generalized_jsd"] = Field("generalized_jsd", description="Its only one.")


class TotalVariation(Kd):
    """Total variation: the rate at which the teacher would reject what the student drafts."""

    name: Literal["total_variation"] = Field(description="The method.")  # pyrefly: ignore
    divergence: Literal["total_variation"] = Field("total_variation", description="Its only one.")


class Akl(Kd):
    """Adaptive KL: forward and reverse, weighed by where the models differ; parameters: mu."""

    name: Literal["akl"] = Field(description="The method.")  # pyrefly: ignore
    divergence: Literal["adaptive_kl"] = Field("adaptive_kl", description="Its only one.")


class Alphanet(Kd):
    """AlphaNet: per token the larger of two clipped alpha-divergences; parameters: clip."""

    name: Literal["alphanet"] = Field(description="The method.")  # pyrefly: ignore
    divergence: Literal["alphanet"] = Field("alphanet", description="Its only one.")


class Dkd(Kd):
    """Decoupled KD: the label's part of the KL and the rest, each with a weight of its own."""

    name: Literal["dkd"] = Field(description="The method.")  # pyrefly: ignore
    divergence: Literal["decoupled_kl"] = Field("decoupled_kl", description="Its only one.")


class Abkd(Kd):
    """ABKD: the alpha-beta divergence between forward and reverse KL; parameters: alpha, beta."""

    name: Literal["abkd"] = Field(description="The method.")  # pyrefly: ignore
    divergence: Literal["alpha_beta_divergence"] = Field(
        "alpha_beta_divergence", description="Its only one."
    )


class Hidden(Head):
    """Hidden states beside logits: a distance of chosen layers joins the KL."""

    name: Literal["hidden"] = Field(description="The method.")
    alpha: Alpha = Field(0.0, description="Weight of the hard labels.")
    temperature: Temperature = Field(1.0, description="T of the KL.")
    layers: Layers = Field("even", description=LAYERS)
    distance: Literal["cosine", "mse"] = Field("cosine", description="Of two hidden states.")
    feature_weight: Weight = Field(
        1.0, description="Weight of the distance; a number or {schedule, start, end}."
    )
    balance: bool = Field(
        False, description="Keep the distance as large as the divergence, times feature_weight."
    )
    projector_lr: float = Field(
        1e-3, gt=0, le=10, description="Highest learning rate of the projectors between widths."
    )


class Ted(Head):
    """TED: filters on chosen layers learn the task, then the student matches the teacher's."""

    name: Literal["ted"] = Field(description="The method.")
    alpha: Alpha = Field(0.5, description="Weight of the hard labels.")
    temperature: Temperature = Field(2.0, description="T of the KL; the paper's is 2.")
    layers: Layers = Field(4, description=LAYERS)
    feature_weight: Weight = Field(
        1.0, description="Weight of the filters' distance; a number or {schedule, start, end}."
    )
    filter_steps: float = Field(
        0.3, gt=0, lt=1, description="Share of the run in which the filters alone learn."
    )
    filter_lr: float = Field(1e-3, gt=0, le=10, description="Highest learning rate of the filters.")


class Minilm(Head):
    """MiniLMv2: how tokens relate in one layer, by queries, keys and values, beside the KL."""

    name: Literal["minilm"] = Field(description="The method.")
    alpha: Alpha = Field(0.0, description="Weight of the hard labels.")
    temperature: Temperature = Field(1.0, description="T of the KL.")
    student_layer: Annotated[int, Field(ge=0)] | None = Field(
        None, description="The student's layer, from 0; null: its last."
    )
    teacher_layer: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="The teacher's layer, from 0; null: its last. The paper takes one below it of "
        "large teachers.",
    )
    heads: Count | None = Field(
        None,
        description="Relation heads; must divide the widths of queries, keys and values of both "
        "models; null: the most that do, up to the student's heads.",
    )
    feature_weight: Weight = Field(
        1.0, description="Weight of the relations; a number or {schedule, start, end}."
    )


class Distillm2(Head):
    """DistiLLM-2: towards the teacher's responses, away from the student's own, each a mean."""

    name: Literal["distillm2"] = Field(description="The method.")
    alpha: Alpha = Field(0.0, description="Weight of the hard labels.")
    skew: float = Field(0.1, ge=0, le=1, description="Weight of the model that is compared.")
    balance: Balance = Field(
        1.0,
        description="Weight of the student's responses; 2 - balance is that of the teacher's. A "
        "number or {schedule, start, end}.",
    )


class Taid(Head):
    """TAID: the target moves from the student to the teacher; its t adapts to the loss."""

    name: Literal["taid"] = Field(description="The method.")
    alpha: Alpha = Field(0.0, description="Weight of the hard labels; not TAID's own alpha.")
    mode: Literal["paper", "scaled", "linear"] = Field(
        "paper",
        description="How t moves: the paper's step size, which adapts in runs of more than 4,000 "
        "steps; one scaled to the run, which adapts in any; or the straight line alone.",
    )
    t_start: float = Field(0.4, ge=0, le=1, description="t of the first step.")
    t_end: float = Field(1.0, ge=0, le=1, description="The largest t; 1 is the teacher itself.")
    step_size: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="The paper's alpha; null: 5e-4, or 15 / train.steps where mode is scaled."
    )
    beta: float = Field(0.99, ge=0, lt=1, description="Momentum of the loss's relative change.")

    def problems(self) -> Iterator[Problem]:
        """Rules: the way goes forward; no setting without effect."""
        if self.t_start > self.t_end:
            yield ("t_start",), f"{self.t_start}: must not be above t_end = {self.t_end}"
        if self.mode == "linear" and self.step_size is not None:
            yield ("step_size",), "has no effect with mode: linear: remove it"


class Ctkd(Head):
    """CTKD: the temperature is learned against the student, at first softly."""

    name: Literal["ctkd"] = Field(description="The method.")
    alpha: Alpha = Field(0.1, description="Weight of the hard labels.")
    t_start: float = Field(1.0, ge=0.1, le=100, description="The least temperature.")
    t_range: float = Field(20.0, gt=0, le=100, description="Its width: T < t_start + t_range.")
    ramp: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the run in which the reversal grows to its full size.",
    )
    per_token: bool = Field(False, description="A temperature for every token, from its state.")
    temperature_lr: float = Field(
        0.01, gt=0, le=10, description="Highest learning rate of the temperature."
    )


class Sft(Head):
    """Supervised fine-tuning: cross-entropy only, the control every distillation is measured by."""

    name: Literal["sft"] = Field(description="The method.")


class StepByStep(Head):
    """Distilling Step-by-Step: labels and rationales as two tasks, each with a mean of its own."""

    name: Literal["step_by_step"] = Field(description="The method.")
    label_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="a of a * L_label + (1 - a) * L_rationale; the paper's lambda is (1 - a) / a.",
    )
    alpha: Alpha = Field(
        1.0, description="Weight of the hard labels within each task; below 1 a teacher adds a KL."
    )
    temperature: Temperature = Field(1.0, description="T of the teacher's KL.")

    @property
    def with_teacher(self) -> bool:
        """Whether a teacher takes part."""
        return self.alpha != 1.0

    def problems(self) -> Iterator[Problem]:
        """Rules: no setting without effect."""
        if not self.with_teacher and self.temperature != 1.0:
            yield ("temperature",), "has no effect with alpha: 1, where there is no teacher"


Method = Annotated[
    Kd
    | ReverseKd
    | Jsd
    | TotalVariation
    | SmoothedKd
    | Distillm
    | Akl
    | Alphanet
    | Dkd
    | Abkd
    | Distillm2
    | Hidden
    | Ted
    | Minilm
    | Taid
    | Ctkd
    | StepByStep
    | Sft,
    Field(discriminator="name"),
]
METHODS = {
    "kd": Kd,
    "reverse_kd": ReverseKd,
    "jsd": Jsd,
    "total_variation": TotalVariation,
    "smoothed_kd": SmoothedKd,
    "distillm": Distillm,
    "akl": Akl,
    "alphanet": Alphanet,
    "dkd": Dkd,
    "abkd": Abkd,
    "distillm2": Distillm2,
    "hidden": Hidden,
    "ted": Ted,
    "minilm": Minilm,
    "taid": Taid,
    "ctkd": Ctkd,
    "step_by_step": StepByStep,
    "sft": Sft,
}
# measured: its numbers on a real model are in benchmarks/results, for better or worse.
# exact: loss and gradient equal the authors' code or the paper's formula; no such numbers yet.
MATURITY = {name: "measured" for name in METHODS} | {"distillm2": "exact", "step_by_step": "exact"}
