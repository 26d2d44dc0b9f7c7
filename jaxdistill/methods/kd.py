"""Knowledge distillation: alpha * CE + (1 - alpha) * T^2 * divergence(teacher, student)."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, Unpack

from pydantic import Field

from jaxdistill.methods import signals
from jaxdistill.methods.base import Built, Facts, Head, Method, Objective, Options, no_parameters
from jaxdistill.methods.knobs import Alpha, TemperatureKnob, WeightKnob, scheduled, schedules
from jaxdistill.ranges import ENTRIES, PARAMETERS
from jaxdistill.section import Problem


class Kd(Options):
    """Knowledge distillation: alpha * CE + (1 - alpha) * T^2 * divergence(teacher, student)."""

    divergence: Literal[tuple(PARAMETERS)] = Field(  # pyrefly: ignore
        "forward_kl", description="forward_kl is KL(teacher || student), reverse_kl the other way."
    )
    parameters: dict[str, WeightKnob] = Field(
        {},
        description="Of the divergence, such as {beta: 0.1} of generalized_jsd; each a number or "
        "{schedule, start, end}.",
    )
    alpha: Alpha = Field(
        0.5,
        description="Weight of the hard labels, 0 to 1: alpha * CE + (1 - alpha) * divergence; a "
        "number or {schedule, start, end}.",
    )
    temperature: TemperatureKnob = Field(
        1.0, description="T, divides both models' logits; a number or {schedule, start, end}."
    )
    scale_by_t2: bool = Field(
        True, description="Multiply the divergence by T^2, so that T does not change its weight."
    )
    label_smoothing: float = Field(
        0.0, ge=0, le=1, description="Share of the hard labels spread evenly over the vocabulary."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: parameters belong to the divergence and stay in their range through the run."""
        ranges = PARAMETERS[self.divergence]
        for name, given in self.parameters.items():
            if name not in ranges:
                has = ", ".join(ranges) or "none"
                yield ("parameters", name), f"no parameter of {self.divergence}; it has: {has}"
                continue
            moves = not isinstance(given, int | float)
            if moves and self.divergence not in ENTRIES:
                yield ("parameters", name), f"must be a number: {self.divergence} cannot move it"
                continue
            for value in (given.start, given.end) if moves else (given,):
                if value not in ranges[name]:
                    yield ("parameters", name), f"{value}: must be {ranges[name]}"
                elif moves and self.divergence == "generalized_jsd" and value in (0, 1):
                    rule = f"{value}: must lie inside (0, 1): the divergence jumps at its ends"
                    yield ("parameters", name), rule

    def parameter_values(self) -> dict[str, Any]:
        """The divergence's parameters: numbers or schedules, defaults where none is given."""
        ranges = PARAMETERS[self.divergence]
        return {name: one.default for name, one in ranges.items()} | self.parameters


def objective(
    *,
    divergence: str | Callable[..., Any] = "forward_kl",
    parameters: tuple[float | str, ...] = (),
    scale_by_t2: bool = True,
    label_smoothing: float | None = None,
    **head: Unpack[Head],
) -> Objective:
    """Knowledge distillation: alpha * CE + (1 - alpha) * T^2 * D(teacher, student).

    Knobs: alpha, temperature, and those that `parameters` names.

    Args:
      divergence: a kind of `kernels.rows.KINDS`, `forward_kl` is KL(teacher || student); or a
        function of whole rows, such as `losses.whole_rows` makes.
      parameters: the kind's own numbers, or names of knobs that hold them.
      scale_by_t2: multiply the divergence by T^2.
      label_smoothing: eps of the cross-entropy.
      head: see `Head`.

    Reference: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.
    """
    from jaxdistill.methods.head_loss import from_heads

    needed = divergence if divergence in signals.TABLE else signals.ROWS

    def apply(params, student, signal, batch, knobs):
        return from_heads(
            head,
            student,
            signal.outputs,
            batch,
            knobs,
            kind=divergence,
            parameters=tuple(knobs[one] if isinstance(one, str) else one for one in parameters),
            alpha=knobs["alpha"],
            temperature=knobs["temperature"],
            scale_by_t2=scale_by_t2,
            label_smoothing=label_smoothing,
            known=signal.known,
            sparse=signals.kind(needed, signal.form),
        )

    return Objective(no_parameters, apply)


def build(options: Kd, facts: Facts) -> Built:
    """The method of a run; a parameter NAME that moves is the knob divergence_NAME."""
    from jaxdistill.losses import whole_rows

    values = options.parameter_values()
    moving = {name: value for name, value in values.items() if not isinstance(value, int | float)}
    if options.divergence in ENTRIES:
        divergence: Any = options.divergence
        parameters = tuple(f"divergence_{n}" if n in moving else v for n, v in values.items())
    else:
        divergence, parameters = whole_rows.bound(options.divergence, **values), ()
    return Built(
        objective(
            divergence=divergence,
            parameters=parameters,
            scale_by_t2=options.scale_by_t2,
            label_smoothing=options.label_smoothing or None,
            **options.head(facts),
        ),
        schedules(options, facts.steps, "alpha", "temperature")
        | {f"divergence_{n}": scheduled(value, facts.steps) for n, value in moving.items()},
    )


def reads(options: Kd) -> str:
    """What of the teacher the loss reads."""
    return options.divergence if options.divergence in signals.TABLE else signals.ROWS


METHOD = Method(Kd, build, reads=reads, measured=True)
