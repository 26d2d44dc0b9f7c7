"""The table of methods: every name that a configuration may give, and its row."""

import dataclasses
import functools
import operator
from collections.abc import Hashable
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, create_model
from pydantic_core import core_schema

from jaxdistill.methods import (
    alm,
    ctkd,
    distillm2,
    dpo,
    gold,
    grpo,
    hidden,
    kd,
    minilm,
    sampled_kl,
    sft,
    step_by_step,
    taid,
    ted,
    uld,
)
from jaxdistill.methods.base import Built, Facts, Method, Options, at_known_temperature
from jaxdistill.methods.knobs import Alpha

METHODS: dict[str, Method] = {}


def add(name: str, method: Method) -> None:
    """Adds a row to the table, after which `method: {name: NAME}` is a configuration's.

    Raises:
      ValueError: if the table has this name already.
    """
    if name in METHODS:
        raise ValueError(f"name = {name!r}: there is such a method already: choose another name")
    title = "".join(part.capitalize() for part in name.split("_"))
    field = (_literal(name), Field(description="The method."))
    METHODS[name] = _with(method, title, method.options.__doc__, name=field)


def alias(method: Method, summary: str, **fields: Any) -> Method:
    """The same method under settings of its own.

    Args:
      method: the row whose formula it is.
      summary: what it is, in a line.
      fields: option -> (type, pydantic field) that replaces that of `method`; `only` fixes one.
    """
    return _with(method, method.options.__name__, summary, **fields)


def only(value: str) -> Any:
    """An option that has one value."""
    return _literal(value), Field(value, description="Its only one.")


def _literal(value: str) -> Any:
    """`Literal[value]` for a value that is computed."""
    literal: Any = Literal
    return literal[value]


def _with(method: Method, title: str, summary: str | None, **fields: Any) -> Method:
    """The method with some of its options replaced."""
    home = method.options.__module__
    options = create_model(
        title, __base__=method.options, __module__=home, __doc__=summary, **fields
    )
    return dataclasses.replace(method, options=options)


_WEIGHT = "Weight of the hard labels"
for _name, _method in {
    "kd": kd.METHOD,
    "reverse_kd": alias(
        kd.METHOD,
        "Reverse KL, MiniLLM's direction, on given text: the student says what the teacher would.",
        divergence=only("reverse_kl"),
    ),
    "jsd": alias(
        kd.METHOD,
        "Generalised Jensen-Shannon divergence, GKD's loss, on given text; parameters: beta.",
        divergence=only("generalized_jsd"),
    ),
    "total_variation": alias(
        kd.METHOD,
        "Total variation: the rate at which the teacher would reject what the student drafts.",
        divergence=only("total_variation"),
    ),
    "smoothed_kd": alias(
        kd.METHOD,
        "Smoothed KD: mostly the labels, and a little of the teacher's soft ones, at T = 1.",
        alpha=(Alpha, Field(0.9, description=f"{_WEIGHT}; the teacher's is 1 - alpha.")),
    ),
    "distillm": alias(
        kd.METHOD,
        "DistiLLM's loss: the skew KL to a mixture with the teacher, without hard labels.",
        divergence=(
            Literal["skew_forward_kl", "skew_reverse_kl"],
            Field("skew_forward_kl", description="Which of the two directions."),
        ),
        alpha=(Alpha, Field(0.0, description=f"{_WEIGHT}.")),
    ),
    "akl": alias(
        kd.METHOD,
        "Adaptive KL: forward and reverse, weighed by where the models differ; parameters: mu.",
        divergence=only("adaptive_kl"),
    ),
    "alphanet": alias(
        kd.METHOD,
        "AlphaNet: per token the larger of two clipped alpha-divergences; parameters: clip.",
        divergence=only("alphanet"),
    ),
    "dkd": alias(
        kd.METHOD,
        "Decoupled KD: the label's part of the KL and the rest, each with a weight of its own.",
        divergence=only("decoupled_kl"),
    ),
    "abkd": alias(
        kd.METHOD,
        "ABKD: the alpha-beta divergence between forward and reverse KL; parameters: alpha, beta.",
        divergence=only("alpha_beta_divergence"),
    ),
    "distillm2": distillm2.METHOD,
    "hidden": hidden.METHOD,
    "ted": ted.METHOD,
    "minilm": minilm.METHOD,
    "taid": taid.METHOD,
    "ctkd": ctkd.METHOD,
    "alm": alm.METHOD,
    "sampled_kl": sampled_kl.METHOD,
    "uld": uld.METHOD,
    "gold": gold.METHOD,
    "step_by_step": step_by_step.METHOD,
    "dpo": dpo.METHOD,
    "grpo": grpo.METHOD,
    "sft": sft.METHOD,
}.items():
    add(_name, _method)


def of(options: Options) -> Method:
    """The row of a configuration's method."""
    return METHODS[options.name]


def build(options: Options, facts: Facts) -> Built:
    """The method of a run, by its row; a temperature that is 1 throughout is no traced number."""
    method = of(options)
    built = method.build(options, facts)
    objective = built.objective
    assert objective.needs_teacher == method.needs_teacher(options), "the row says so too"
    assert objective.needs_start == method.needs_start(options), "the row says so too"
    return dataclasses.replace(built, objective=at_known_temperature(objective, built.knobs))


def control(options: Options) -> Options:
    """The options of the control that a run with `options` is compared with."""
    name, method = next(row for row in METHODS.items() if row[1].is_control)
    return method.options(name=name, chunk=options.chunk)


def rows() -> tuple[Hashable, ...]:
    """What the table holds now: a key for what is derived from it and cached."""
    return tuple(METHODS.items())


class _ByName:
    """Validates options by the row that `name` names, of the table as it is at that time."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(
            lambda value: _adapter(rows()).validate_python(value)
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return handler(_adapter(rows()).core_schema)


@functools.lru_cache(maxsize=4)
def _adapter(rows: tuple[Any, ...]) -> TypeAdapter:
    every: Any = functools.reduce(operator.or_, [method.options for _, method in rows])
    return TypeAdapter(Annotated[every, Field(discriminator="name")])


AnyMethod = Annotated[Options, _ByName()]
