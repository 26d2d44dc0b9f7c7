"""The options of the models: teacher, student, random shapes, tokenizer."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from jaxdistill.commands import Sizes
from jaxdistill.config.ahead import TeacherMesh
from jaxdistill.config.oneself import Oneself
from jaxdistill.config.quantize import Rounded, RoundedBase, RoundedStudent
from jaxdistill.config.server import Api
from jaxdistill.config.sparsity import TARGETS, Projection, Sparsity
from jaxdistill.section import Dtype, Path, Problem, Section, Size, StepOrFraction


class RandomModel(Section):
    """A model with random weights: of a given shape, or shaped like another model."""

    like: Path | None = Field(
        None,
        description="Model whose shape is taken where no number is given: teacher (for a student), "
        "or a path. Without it layers, embed, mlp and heads are required.",
    )
    family: Literal["llama", "mistral", "qwen2", "qwen3"] | None = Field(
        None, description="Kind of model. Null: that of `like`, or llama."
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
    initializer_range: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Standard deviation of the weights. Null: that of `like`, or 0.02, which is "
        "for wide models: with embed below 200, 1 / sqrt(embed) learns sooner.",
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
        elif self.family is not None:
            yield ("family",), "is that of the model under `like`: remove one of the two"
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            yield ("kv_heads",), f"must divide heads ({self.heads})"


AttentionName = Literal["auto", "xla", "cudnn", "splash"]
ATTENTION = (
    "What computes its attention: xla on any device (in blocks where rows have more than 512 "
    "tokens), cudnn on a GPU, splash (Pallas) on a TPU; auto is the kernel of the device where it "
    "can compute this model, else xla. A named one that cannot run is an error."
)


_OF_STUDENT = {"dtype": "compute_dtype", "attention": "attention", "quantize": "quantize"}


class Teacher(Section):
    """The model that is learned from; it never changes."""

    source: Path | None = Field(
        None,
        description="A model folder (config.json and safetensors), a .gguf file, package:NAME/FILE "
        "(a file inside an installed Python package), a Hub name such as hf:org/name, or a run: "
        "RUN_DIR@best.",
    )
    random: RandomModel | None = Field(None, description="Random weights, for trying things out.")
    api: Api | None = Field(
        None,
        description="A server: `jaxdistill teacher cache` asks it about given text, and a run "
        "learns from cache; with rollout and method sampled_kl a run asks it itself.",
    )
    cache: Path | None = Field(
        None,
        description="What `jaxdistill teacher cache` asked it before: a folder, or gs://..., "
        "s3://...; its weights take no part in training then, and need not be named.",
    )
    self_: Oneself | None = Field(
        None,
        alias="self",
        description="The student itself, behind a prompt that says more (self-distillation): its "
        "first, averaged or present weights.",
    )
    dtype: Dtype = Field("bfloat16", description="Type its weights are held and computed in.")
    attention: AttentionName = Field("auto", description=ATTENTION)
    quantize: Rounded | None = Field(
        None,
        description="Hold the kernels of its layers in few bits, rounded as they are read "
        "(extra quant): int8, int4, float8, with _dynamic activations too; or {scheme: int8, "
        "exceptions: [mlp.down=none]}. All else stays in dtype.",
    )
    offload: bool = Field(
        False,
        description="Keep its layers in host memory, where the device can address it, and bring "
        "them one at a time in every micro-batch: less device memory, more time. It completes no "
        "samples then.",
    )

    sharding: Literal["fsdp", "all", "whole"] = Field(
        "fsdp",
        description="How its parameters lie on the mesh, beside tensor and expert: fsdp, as the "
        "student's; all: over data too, less memory for more traffic; whole: all of them on every "
        "device, so that none crosses the mesh.",
    )
    mesh: TeacherMesh | None = Field(
        None,
        description="Devices of its own, {fsdp: 2, tensor: 2}: the last of the run. It reads each "
        "batch before the step, and its final hidden states are sent. Null: the student's.",
    )
    from_: StepOrFraction | None = Field(
        None,
        alias="from",
        description="Ask it from this step on, as until; the steps before learn from the data "
        "alone, by cross-entropy. Null: from the first.",
    )
    until: StepOrFraction | None = Field(
        None,
        description="End its forward pass after so many steps, a whole number, or a fraction of "
        "train.steps below 1; the steps after learn from the data alone. Null: to the last.",
    )

    @property
    def served(self) -> bool:
        """Whether a run asks a server itself, in place of a model or of what was stored."""
        return self.api is not None and self.cache is None

    def problems(self) -> Iterator[Problem]:
        """Rules: one origin, or none where it was asked before; no setting without effect."""
        if self.cache is None or self.source or self.random or self.api or self.self_:
            yield from _one_of(self, ("source", "random", "api", "self"))
        if self.sharding != "fsdp" and self.offload:
            yield (
                ("sharding",),
                "layers that wait in host memory lie as fsdp divides them: use fsdp",
            )
        if self.sharding != "fsdp" and (self.cache or not (self.source or self.random)):
            yield (
                ("sharding",),
                "has no effect: no parameters of a teacher are in the step: remove it",
            )
        if self.self_ is not None:
            if self.cache is not None:
                yield ("cache",), "stores what another model said: remove it, or self"
            for name, usual in (("dtype", "bfloat16"), ("attention", "auto"), ("quantize", None)):
                if getattr(self, name) != usual:
                    yield (name,), f"is the student's (student.{_OF_STUDENT[name]}): remove it"
            if self.offload:
                yield ("offload",), "is of a teacher of its own: remove it"
            for name, moment in (("from", self.from_), ("until", self.until)):
                if moment is not None:
                    yield (name,), "the student itself teaches in every step: remove it"
        if self.offload and self.self_ is None and (self.cache or not (self.source or self.random)):
            yield ("offload",), "no layers of it are in the step: remove it"
        if self.random and self.random.like == "teacher":
            yield ("random", "like"), "a teacher cannot be shaped like itself: give a path"


class PrunedTeacher(Sizes):
    """Sizes or a budget that the teacher is pruned to, by the importance of its units."""

    importance: Path = Field(
        description="File with the scores of the teacher's units; `jaxdistill importance` measures "
        "them once for any size."
    )


class Adapters(Section):
    """Low-rank adapters: all of the student that is trained; the rest of it is frozen."""

    rank: Annotated[int, Field(ge=1, le=4096)] = Field(8, description="Inner width of an adapter.")
    alpha: Annotated[float, Field(gt=0, le=1e6)] = Field(
        16.0, description="An adapter's product is multiplied by alpha / rank."
    )
    targets: tuple[Projection, ...] = Field(
        TARGETS,
        min_length=1,
        strict=False,
        description="Projections of every layer that have one; those a model lacks are an error.",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of each adapter's inputs that a training step leaves out at random."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: each target once."""
        if len(set(self.targets)) != len(self.targets):
            yield ("targets",), "name each projection once"


class Student(Section):
    """The model that is trained: from a folder, cut out of the teacher, or random."""

    source: Path | None = Field(
        None, description="Where to load it from; the same forms as teacher.source."
    )
    from_: Literal["teacher"] | None = Field(
        None,
        alias="from",
        description="teacher: a copy of the teacher, with all its layers, those that `layers` or "
        "`every` keeps, or what `prune` leaves.",
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
    prune: PrunedTeacher | None = Field(
        None, description="Prune the teacher in width and depth by measured importance."
    )
    tokenizer: Path | None = Field(
        None,
        description="Of a student cut out of the teacher: a model folder whose tokenizer it gets "
        "in place of the teacher's, or bytes. tokenizer.from must then be student.",
    )
    embeddings: Literal["mean", "random"] = Field(
        "mean",
        description="Rows of the tokens of `tokenizer`: mean of the teacher's rows that spell the "
        "token, which leaves those that both have as they are, or random.",
    )
    random: RandomModel | None = Field(None, description="Random weights.")
    param_dtype: Dtype = Field(
        "float32",
        description="Type its weights are held in; the optimizer's moments, and sums of gradients "
        "over micro-batches, are float32 in any case. bfloat16 weights are rounded at random, up "
        "or down in proportion, so that small updates count on the mean.",
    )
    compute_dtype: Dtype = Field("bfloat16", description="Type its layers compute in.")
    quantize: RoundedStudent | None = Field(
        None,
        description="Quantisation-aware: the student computes as it will after `jaxdistill "
        "quantize` by this scheme: int8, int4, float8, with _dynamic activations rounded too; or "
        "{scheme: int8, then: [{at: 300, scheme: int4}], exceptions: [mlp.down=none]}.",
    )
    lora: Adapters | None = Field(
        None, description="Train low-rank adapters alone; `jaxdistill export` merges them."
    )
    base: RoundedBase | None = Field(
        None,
        description="Hold the frozen kernels beside lora in whole numbers (QLoRA: load_in_4bit, "
        "load_in_8bit), rounded as they are read; int8, int4 or {scheme: int4, "
        "exceptions: [mlp.down=int8]}; all else is in param_dtype. "
        "`jaxdistill export` merges adapters into the rounded kernels.",
    )
    sparsity: Sparsity | None = Field(
        None, description="Make weights of the projections 0 by a schedule, and keep them 0."
    )
    router_aux_loss_coef: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0,
        description="Weight of the load-balancing loss of routed experts, beside the method's: 0 "
        "leaves how tokens are spread to what the teacher says of them; 0.001 to 0.02 is usual.",
    )
    attention: AttentionName = Field("auto", description=ATTENTION)
    remat: Literal["none", "dots", "full"] = Field(
        "none",
        description="What the backward pass computes again instead of keeping: nothing, all but "
        "matrix products, or whole layers (least memory, about a third more time).",
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: one origin; kept layers rise; no setting without effect."""
        yield from _one_of(self, ("source", "from", "random"))
        for name in ("layers", "every", "prune", "tokenizer"):
            if getattr(self, name) is not None and self.from_ is None:
                yield (name,), "has no effect without `from: teacher`: add it or remove this"
        if self.embeddings != "mean" and self.tokenizer is None:
            yield ("embeddings",), "has no effect without tokenizer: add it or remove this"
        if self.prune is not None and (self.layers is not None or self.every is not None):
            yield ("prune",), "give layers, every or prune, not several of them"
        if self.lora is not None and self.quantize is not None:
            yield ("lora",), "does not go together with quantize: remove one of them"
        if self.base is not None and self.lora is None:
            yield ("base",), "nothing would be trained: add lora, or leave it out"
        if self.lora is not None and self.sparsity is not None:
            rule = "adapters would fill what masks make 0: remove lora, or prune the merged model"
            yield ("sparsity",), rule
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
    rows: Size | None = Field(
        None,
        description="Rows of both heads that the loss takes for tokens. Null: as many as the "
        "tokenizer has; more than that is for planning a model whose tokenizer is not at hand.",
    )


def _one_of(section: Section, names: tuple[str, ...]) -> Iterator[Problem]:
    """Exactly one of the origins of a model is given."""
    attribute = lambda name: f"{name}_" if name in ("from", "self") else name
    given = [name for name in names if getattr(section, attribute(name))]
    if not given:
        yield (), f"needs one of {', '.join(names)}"
    for name in given[1:]:
        yield (name,), f"give only one of {', '.join(names)}; {given[0]} is given too"
