"""The options of the models: teacher, student, random shapes, tokenizer."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from jaxdistill.config.section import Dtype, Path, Problem, Section, Size


class RandomModel(Section):
    """A model with random weights: of a given shape, or shaped like another model."""

    like: Path | None = Field(
        None,
        description="Model whose shape is taken where no number is given: teacher (for a student), "
        "or a path. Without it the model is a Llama and layers, embed, mlp and heads are required.",
    )
    layers: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="Layers.")
    embed: Size | None = Field(None, description="Width of the hidden states (numbers).")
    mlp: Size | None = Field(None, description="Width inside the gated MLP (numbers).")
    heads: Size | None = Field(None, description="Query heads.")
    kv_heads: Size | None = Field(
        None, description="Key and value heads; must divide heads. Null: that of `like`, or heads."
    )
    head_dim: Size | None = Field(
        None, description="Width of one head (numbers). Null: that of `like`, or embed / heads."
    )
    vocab_size: Size | None = Field(
        None, description="Vocabulary (tokens). Null: that of `like`, or of the tokenizer."
    )
    tied_head: bool | None = Field(
        None, description="Output head shares the embedding. Null: that of `like`, or true."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: a shape is complete or borrowed; heads divide."""
        if self.like is None:
            for name in ("layers", "embed", "mlp", "heads"):
                if getattr(self, name) is None:
                    yield (name,), "required unless `like` names a model to take the shape from"
            if self.embed and self.heads and not self.head_dim and self.embed % self.heads:
                rule = f"must be a multiple of heads ({self.heads}) unless head_dim is given"
                yield ("embed",), rule
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            yield ("kv_heads",), f"must divide heads ({self.heads})"


class Teacher(Section):
    """The model that is learned from; it never changes."""

    source: Path | None = Field(
        None,
        description="A model folder (config.json and safetensors), a .gguf file, package:NAME/FILE "
        "(a file inside an installed Python package), a Hub name such as hf:org/name, or a run: "
        "RUN_DIR@best.",
    )
    random: RandomModel | None = Field(None, description="Random weights, for trying things out.")
    dtype: Dtype = Field("bfloat16", description="Type its weights are held and computed in.")

    def problems(self) -> Iterator[Problem]:
        """Rules: one origin."""
        yield from _one_of(self, ("source", "random"))
        if self.random and self.random.like == "teacher":
            yield ("random", "like"), "a teacher cannot be shaped like itself: give a path"


class Student(Section):
    """The model that is trained: from a folder, cut out of the teacher, or random."""

    source: Path | None = Field(
        None, description="Where to load it from; the same forms as teacher.source."
    )
    from_: Literal["teacher"] | None = Field(
        None,
        alias="from",
        description="teacher: a copy of the teacher, with all its layers or those that `layers` or "
        "`every` keeps.",
    )
    layers: tuple[Annotated[int, Field(ge=0, le=999)], ...] | None = Field(
        None,
        min_length=1,
        strict=False,
        description="Teacher layers that are kept, counted from 0, in rising order.",
    )
    every: Annotated[int, Field(ge=2, le=999)] | None = Field(
        None, description="Keep the teacher layers 0, n, 2n, ... (layers)."
    )
    random: RandomModel | None = Field(None, description="Random weights.")
    param_dtype: Dtype = Field(
        "float32", description="Type its weights and optimizer state are held in."
    )
    compute_dtype: Dtype = Field("bfloat16", description="Type its layers compute in.")
    remat: Literal["none", "dots", "full"] = Field(
        "none",
        description="What the backward pass computes again instead of keeping: nothing, all but "
        "matrix products, or whole layers (least memory, about a third more time).",
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: one origin; kept layers rise; no setting without effect."""
        yield from _one_of(self, ("source", "from", "random"))
        for name in ("layers", "every"):
            if getattr(self, name) is not None and self.from_ is None:
                yield (name,), "has no effect without `from: teacher`: add it or remove this"
        if self.layers is not None:
            if self.every is not None:
                yield ("every",), "give either layers or every, not both"
            if list(self.layers) != sorted(set(self.layers)):
                yield ("layers",), "must rise, each layer once"


class Tokenizer(Section):
    """What turns text into tokens, for teacher and student alike."""

    from_: Path = Field(
        "teacher",
        alias="from",
        description="teacher, student, bytes (one token per byte, for trying things out) or a path "
        "to a model folder.",
    )


def _one_of(section: Section, names: tuple[str, ...]) -> Iterator[Problem]:
    """Exactly one of the origins of a model is given."""
    given = [name for name in names if getattr(section, "from_" if name == "from" else name)]
    if not given:
        yield (), f"needs one of {', '.join(names)}"
    for name in given[1:]:
        yield (name,), f"give only one of {', '.join(names)}; {given[0]} is given too"
