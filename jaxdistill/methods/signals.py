"""What goes with what: what each loss reads of a teacher, and which stored formats hold it."""

from collections.abc import Mapping
from typing import Any

from jaxdistill.section import Problem

ONLINE = "online"
SERVED = (
    "served"  # log-probabilities of drawn tokens, which a server is asked for as they are drawn
)
# What a loss may read of a teacher -> format that holds it -> how the head loss computes it there:
# None as with the teacher online, or a kind of `kernels.sparse`. The best format comes first.
LAYERS, ROWS, DRAWN = "layers", "rows", "drawn"
TABLE: Mapping[str, Mapping[str, str | None]] = {
    LAYERS: {},
    ROWS: {"hidden": None},
    DRAWN: {"hidden": None, SERVED: None},
    "forward_kl": {"hidden": None, "topk": "forward_kl", "sampled": "cross_entropy"},
    "reverse_kl": {"hidden": None, "topk": "generalized_reverse_kl"},
}
_READS = {
    LAYERS: "its layers, heads or queries",
    ROWS: "whole rows of its probabilities",
    DRAWN: "its probability of tokens that the student draws",
}


def kind(reads: str, form: str) -> str | None:
    """The kind of the head loss on a signal's form; None where it is the one of whole rows."""
    return None if form == ONLINE else TABLE[reads][form]


def sparse(format: str) -> bool:
    """Whether a format knows only some tokens of a row."""
    return format not in (ONLINE, "hidden")


def problem(name: str, reads: str, format: str) -> str | None:
    """Why a method cannot learn from a stored format, and which one would do; None where it can.

    Args:
      name: the method.
      reads: the row of TABLE that it reads.
      format: what is stored, or SERVED.
    """
    holds = TABLE[reads]
    if format in holds:
        return None
    what = _READS.get(reads, f"the teacher's probabilities for {reads}")
    if format == SERVED:
        way = "divergence: sampled_kl" if name == "grpo" else "sampled_kl"
        return (
            f"method {name} reads {what}, and a server says its probability of drawn tokens alone: "
            f"use {way}, or give the model's weights in teacher.source"
        )
    holds = {one: how for one, how in holds.items() if one != SERVED}
    remedy = f"capture with --format {' or '.join(holds)}" if holds else (
        "no stored format holds them: give teacher.source without teacher.cache"
    )  # fmt: skip
    return f"method {name} reads {what}, which the format {format} does not hold: {remedy}"


def temperature_problem(options: Any, format: str, temperatures: tuple[float, ...]) -> str | None:
    """Why a loss's temperature cannot be had from known tokens; None where it can."""
    value = temperature(options)
    if not sparse(format) or value == 1.0:
        return None
    if value is None:
        return (
            "a temperature that moves needs whole rows of the teacher's probabilities: capture "
            "with --format hidden, or give a number"
        )
    if format == SERVED:
        return f"{value}: a server's probabilities are of T = 1: use 1, or give teacher.source"
    if format == "sampled":
        return f"{value}: the draws were made at T = 1: use 1, or capture with --format hidden"
    if value not in temperatures:
        declared = ", ".join(map(str, (1.0, *temperatures)))
        return (
            f"{value}: log-probabilities of T = 1 do not tell those of another T: declared were "
            f"{declared}: capture with --temperatures {value}, or with --format hidden"
        )
    return None


def temperature(options: Any) -> float | None:
    """The temperature of a method's loss; None where it moves."""
    value = getattr(options, "temperature", 1.0)
    return float(value) if isinstance(value, int | float) else None


def problems(
    options: Any, reads: str, format: str, temperatures: tuple[float, ...]
) -> list[Problem]:
    """(field of the method, rule) of everything that a stored format cannot give."""
    faults: list[Problem] = []
    if told := problem(options.name, reads, format):
        faults.append((("name",), told))
    elif told := temperature_problem(options, format, temperatures):
        faults.append((("temperature",), told))
    return faults
