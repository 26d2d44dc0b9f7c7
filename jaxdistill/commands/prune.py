"""How a student is cut out of a model: importance, sizes or one budget, sparsity."""

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from jaxdistill import budgets as budgets_in_words
from jaxdistill.commands.evaluate import EvalRows
from jaxdistill.commands.kinds import Number
from jaxdistill.section import Budget, Count, Dtype, Flag, Path, Problem, Section, Size

Axis = Literal["layers", "embed", "mlp", "heads", "kv_heads", "experts"]
AXES: tuple[str, ...] = get_args(Axis)
BUDGETS = ("parameters", "memory", "latency")
SPARSITY_PATTERN = r"^(2:4|[0-9]{1,2}(\.[0-9]+)?%)$"


class Importance(EvalRows):
    """What importance is measured on, and how thoroughly."""

    rows: Annotated[Count, Flag(metavar="ROWS")] = Field(
        1024, description="Rows; the data must have them."
    )
    without: Annotated[tuple[Size, ...], Flag(metavar="N")] = Field(
        (),
        strict=False,
        description="Also measure the loss without N layers in a row, at every place, for each N.",
    )


class Sizes(Section):
    """What a model is pruned to: sizes, or one budget; and how its layers are chosen."""

    layers: Number | None = Field(None, description="Layers that stay.")
    embed: Number | None = Field(None, description="Channels of the hidden states that stay.")
    mlp: Number | None = Field(None, description="Neurons of every MLP, or expert, that stay.")
    heads: Number | None = Field(
        None, description="Query heads that stay; the same number for every group of keys."
    )
    kv_heads: Number | None = Field(None, description="Key and value heads (groups) that stay.")
    experts: Number | None = Field(
        None, description="Routed experts of every layer that stay: at least those a token passes."
    )
    parameters: Budget | None = Field(
        None, description="Budget instead of sizes: a share such as 60%, or 80M, 1.5B."
    )
    memory: Budget | None = Field(
        None, description="Budget instead of sizes: bytes of the weights in bfloat16, 4GiB or 50%."
    )
    axes: Annotated[tuple[Axis, ...], Flag(metavar="AXIS")] = Field(
        ("embed", "mlp"), min_length=1, strict=False, description="What shrinks for a budget."
    )
    by: Literal["influence", "loss", "range", "range_loss"] = Field(
        "range",
        description="How layers are chosen: lowest block influence, lowest rise of the loss, or "
        "the layers in a row that change the hidden states (range) or the loss (range_loss) least.",
    )

    def sizes(self) -> dict[str, int]:
        """The sizes that are given, by axis."""
        return {name: size for name in AXES if (size := getattr(self, name)) is not None}

    def budgets(self) -> dict[str, str]:
        """The budgets that are given, by name."""
        names = [name for name in BUDGETS if name in type(self).model_fields]
        return {name: text for name in names if (text := getattr(self, name)) is not None}

    def problems(self) -> Iterator[Problem]:
        """Rules: sizes, or one budget."""
        sizes, budgets = self.sizes(), self.budgets()
        if len(budgets) + bool(sizes) != 1:
            names = ", ".join(name for name in BUDGETS if name in type(self).model_fields)
            given = ", ".join([*sizes, *budgets]) or "nothing"
            rule = f"give sizes ({', '.join(AXES)}), or one budget ({names}); given: {given}"
            yield (), rule
        for name, text in budgets.items():
            if problem := budgets_in_words.problem(text, name):
                yield (name,), problem
        if not budgets and self.axes != type(self).model_fields["axes"].default:
            yield ("axes",), "has no effect without a budget: remove it"


class Prune(Sizes):
    """How a student is cut out of a model."""

    latency: Budget | None = Field(
        None,
        description="Budget instead of sizes: the time for a token of one row, measured here, 12ms "
        "or 60%.",
    )
    sparsity: Annotated[str, Flag(metavar="2:4|SHARE")] | None = Field(
        None,
        pattern=SPARSITY_PATTERN,
        description="Make weights 0, and leave sizes: 2:4, two of every four along the input "
        "dimension, or a share such as 50% of any; by |w|, or with scores by |w| |x| (Wanda).",
    )
    scope: Literal["output", "layer", "global"] = Field(
        "layer", description="Of sparsity: compare the weights of an output, a matrix, or all."
    )
    importance: Annotated[Path, Flag(metavar="FILE")] | None = Field(
        None, description="Scores that `jaxdistill importance` measured before, for any size."
    )
    dtype: Dtype | None = Field(None, description="Of the written weights; none: the model's.")

    def problems(self) -> Iterator[Problem]:
        """Rules: sizes, one budget, or sparsity; no setting without effect."""
        if self.sparsity is None:
            yield from super().problems()
            if self.scope != "layer":
                yield ("scope",), "has no effect without sparsity: remove it"
            return
        given = ", ".join([*self.sizes(), *self.budgets()])
        if given:
            yield ("sparsity",), f"leaves sizes as they are: prune them first, or remove {given}"
        if self.sparsity != "2:4" and not 0 < float(self.sparsity[:-1]) < 100:
            yield ("sparsity",), "must be 2:4, or a share above 0% and below 100%"
        for name in ("axes", "by"):
            if getattr(self, name) != type(self).model_fields[name].default:
                yield (name,), "has no effect with sparsity: remove it"
