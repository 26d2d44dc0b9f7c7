"""Options of several forms: numbers that may move during a run, pairs of layers."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from jaxdistill.ranges import BALANCE
from jaxdistill.section import Section


class AlphaSchedule(Section):
    """A weight that moves from start to end over train.steps."""

    schedule: Literal["linear", "cosine"] = Field(description="Shape of the way.")
    start: float = Field(ge=0, le=1, description="Value at the first step.")
    end: float = Field(ge=0, le=1, description="Value at the last step.")


class TemperatureSchedule(Section):
    """A temperature that moves from start to end over train.steps."""

    schedule: Literal["linear", "cosine"] = Field(description="Shape of the way.")
    start: float = Field(ge=0.01, le=1000, description="Value at the first step.")
    end: float = Field(ge=0.01, le=1000, description="Value at the last step.")


def _knob_kind(value: Any) -> str:
    """Tags are in <> so that the loader can tell them from keys in an error's location."""
    return "<schedule>" if isinstance(value, dict | Section) else "<number>"


Alpha = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("<number>")]
    | Annotated[AlphaSchedule, Tag("<schedule>")],
    Discriminator(_knob_kind),
]
TemperatureKnob = Annotated[
    Annotated[float, Field(ge=0.01, le=1000), Tag("<number>")]
    | Annotated[TemperatureSchedule, Tag("<schedule>")],
    Discriminator(_knob_kind),
]


class WeightSchedule(Section):
    """A weight that moves from start to end over train.steps."""

    schedule: Literal["linear", "cosine"] = Field(description="Shape of the way.")
    start: float = Field(ge=0, le=1e6, description="Value at the first step.")
    end: float = Field(ge=0, le=1e6, description="Value at the last step.")


WeightKnob = Annotated[
    Annotated[float, Field(ge=0, le=1e6), Tag("<number>")]
    | Annotated[WeightSchedule, Tag("<schedule>")],
    Discriminator(_knob_kind),
]


_Share = Annotated[float, Field(ge=BALANCE.least, le=BALANCE.most)]


class BalanceSchedule(Section):
    """A share of two that moves from start to end over train.steps."""

    schedule: Literal["linear", "cosine"] = Field(description="Shape of the way.")
    start: _Share = Field(description="Value at the first step.")
    end: _Share = Field(description="Value at the last step.")


Balance = Annotated[
    Annotated[_Share, Tag("<number>")] | Annotated[BalanceSchedule, Tag("<schedule>")],
    Discriminator(_knob_kind),
]
LayerPair = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
_LAYER_KINDS = {str: "<rule>", int: "<count>"}
Layers = Annotated[
    Annotated[Literal["even", "last"], Tag("<rule>")]
    | Annotated[int, Field(ge=1, le=10**4), Tag("<count>")]
    | Annotated[list[LayerPair], Field(min_length=1), Tag("<pairs>")],
    Discriminator(lambda value: _LAYER_KINDS.get(type(value), "<pairs>")),
]
LAYERS = (
    "Which are compared: even (every layer of the student, with the ends of equal blocks), last, a "
    "number of pairs at the ends of equal blocks, or pairs [student, teacher] of layers from 0."
)


def schedules(options: Section, steps: int, *names: str) -> dict[str, Any]:
    """The named options of a method, each as `scheduled`: its knobs of the same names."""
    return {name: scheduled(getattr(options, name), steps) for name in names}


def scheduled(knob: Any, steps: int) -> Any:
    """A knob's option as a number, or as an Optax schedule over all `steps` of a run."""
    if isinstance(knob, int | float):
        return float(knob)
    from jaxdistill import optim

    return optim.schedule(knob.schedule, knob.start, knob.end, steps)
