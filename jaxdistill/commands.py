"""What commands take: each set of options once, read by the command line, workflows and Python."""

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from jaxdistill import budgets as budgets_in_words
from jaxdistill.drawing import Drawing, Temperature
from jaxdistill.section import Budget, Count, Dtype, Flag, Path, Problem, Section, Size

Paths = Annotated[
    tuple[Path, ...],
    Field(min_length=1, max_length=1000, strict=False),
    Flag(metavar="PATH", repeat=True),
]
Rows = Annotated[Size, Flag(metavar="ROWS")]
Number = Annotated[Size, Flag(metavar="N")]
Scheme = Literal["int8", "int4", "int8_dynamic", "float8", "float8_dynamic"]
# The form of compressed-tensors that holds a scheme: a folder has one.
FORMS = {
    "int8": "pack-quantized",
    "int4": "pack-quantized",
    "int8_dynamic": "int-quantized",
    "float8": "float-quantized",
    "float8_dynamic": "float-quantized",
}
SCHEME = (
    "int8, int4 and float8 (e4m3) round the weights of the layers; with _dynamic their inputs too."
)
Exceptions = Annotated[
    tuple[Annotated[str, Field(max_length=200)], ...],
    Field(max_length=100, strict=False),
    Flag(metavar="PATTERN=SCHEME"),
]
EXCEPTIONS = (
    "Projections that have another scheme, or none, in every layer, such as mlp.down=none or "
    "attention.*=int8: a pattern as of file names; the first that matches holds."
)
Format = Literal[
    "auto", "text", "messages", "completion", "sharegpt", "alpaca", "alpaca_prompt", "pairs",
    "plain", "paragraphs",
]  # fmt: skip
Axis = Literal["layers", "embed", "mlp", "heads", "kv_heads", "experts"]
SpecialTokens = Literal["refuse", "parse", "text"]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Files(Section):
    """The text that a model is measured on."""

    data: Paths = Field(
        description="Files, or names such as python:docs?split=held_out; several are joined."
    )
    format: Format = Field("auto", description="What a record holds, as data.format in a run.")
    batch_size: Rows = Field(8, description="Rows at a time, over all devices.")
    max_bad_fraction: Annotated[float, Field(ge=0, le=1), Flag(metavar="SHARE")] = Field(
        0.001, description="Stop when more than this fraction of records is broken."
    )
    cache_dir: Annotated[Path, Flag(metavar="DIR")] = Field(
        "runs/.cache", description="Folder of tokenised rows, used again."
    )


class Text(Files):
    """The text that a model is measured on, as rows of tokens."""

    seq_len: Annotated[int, Field(ge=2, le=2**20), Flag(metavar="TOKENS")] = Field(
        1024, description="Tokens in a row."
    )


class Importance(Text):
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


AXES: tuple[str, ...] = get_args(Axis)
BUDGETS = ("parameters", "memory", "latency")
SPARSITY_PATTERN = r"^(2:4|[0-9]{1,2}(\.[0-9]+)?%)$"


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


class Quantized(Section):
    """Which kernels of the layers are held in numbers of few bits, and which scheme each has."""

    scheme: Scheme = Field(description=SCHEME)
    exceptions: Exceptions = Field((), description=EXCEPTIONS)

    def problems(self) -> Iterator[Problem]:
        """Rules: exceptions can be read, and fit into one folder."""
        yield from exception_problems(self.exceptions, (self.scheme,))


def exception_problems(exceptions: tuple[str, ...], schemes: tuple[str, ...]) -> Iterator[Problem]:
    """What is wrong with exceptions to schemes."""
    names = (*get_args(Scheme), "none")
    for text in exceptions:
        pattern, _, scheme = text.rpartition("=")
        if not pattern or scheme not in names:
            rule = f"{text!r} must be a pattern, = and one of {', '.join(names)}: mlp.down=none"
            yield ("exceptions",), rule
            return
    for scheme in schemes:
        for text in exceptions:
            other = text.rpartition("=")[2]
            if {scheme, other} <= FORMS.keys() and FORMS[scheme] != FORMS[other]:
                rule = f"{text}: no folder holds {other} beside {scheme}: int4 and int8 go together"
                yield ("exceptions",), f"{rule}, float8 and float8_dynamic, and none with all"
                return


class Quantize(Section):
    """How a model is written in numbers of few bits."""

    scheme: Scheme | None = Field(
        None,
        description=f"{SCHEME} Default: what a run's student was trained for, else int8.",
    )
    exceptions: Exceptions = Field((), description=EXCEPTIONS)
    dtype: Dtype | None = Field(None, description="Of everything else; none: as trained.")

    def problems(self) -> Iterator[Problem]:
        """Rules: exceptions belong to a scheme, can be read, and fit into one folder."""
        if self.exceptions and self.scheme is None:
            yield ("exceptions",), "are exceptions to a scheme: give scheme too"
        else:
            yield from exception_problems(self.exceptions, (self.scheme or "int8",))


class Export(Section):
    """How a model is written."""

    dtype: Dtype | None = Field(None, description="Of the written weights; none: as trained.")
    format: Literal["folder", "gguf"] = Field(
        "folder", description="A folder that transformers opens, or one file for llama.cpp."
    )
    gguf_type: Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"] = Field(
        "F16", description="Of the matrices in a GGUF file."
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: options of the format that is written."""
        if self.format == "gguf" and self.dtype:
            yield ("dtype",), "a GGUF file's weights have gguf_type: leave dtype out"
        if self.format == "folder" and self.gguf_type != "F16":
            yield ("gguf_type",), "is of GGUF files: set format to gguf"


class Evaluate(Files):
    """What `eval` measures on."""

    teacher: Annotated[Path, Flag(metavar="MODEL")] | None = Field(
        None, description="Measure KL and agreement against this model."
    )
    seq_len: Annotated[int, Field(ge=2, le=2**20), Flag(metavar="TOKENS")] | None = Field(
        None, description="Tokens in a row; none: as a run's own, 1024 of other models."
    )
    loss_on: Literal["all", "completion", "assistant"] | None = Field(
        None, description="Which tokens count; none: those of the run, all of other models."
    )
    max_rows: Annotated[Count, Flag(metavar="ROWS")] | None = Field(
        None, description="Use only so many rows; none: all."
    )
    dtype: Dtype = Field("float32", description="Of weights and computation.")


class Compare(Text):
    """What models are compared on."""

    teacher: Annotated[Path, Flag(metavar="MODEL")] | None = Field(
        None, description="Measure KL, agreement and acceptance against this model."
    )
    max_rows: Annotated[Count, Flag(metavar="ROWS")] | None = Field(
        None, description="Use only so many rows; none: all."
    )
    questions: Annotated[Path, Flag(metavar="FILE")] | None = Field(
        None, description="Multiple choice: a JSONL file, or `texts`: made out of the data."
    )
    max_questions: Annotated[Count, Flag(metavar="N")] = Field(
        200, description="At most so many questions."
    )
    prompts: Annotated[tuple[str, ...], Flag("-p", "TEXT", "--prompt", repeat=True)] = Field(
        (), strict=False, description="Texts that every model continues."
    )
    speed: bool = Field(True, description="Measure latencies.")
    repeats: Annotated[Count, Flag(metavar="N")] = Field(10, description="Timings of each kind.")
    prompt_tokens: Annotated[Size, Flag(metavar="TOKENS")] = Field(
        128, description="Read in a timed row."
    )
    new_tokens: Annotated[Size, Flag(metavar="TOKENS")] = Field(
        32, description="Written in a timed row."
    )
    dtype: Dtype = Field(
        "float32", description="Of weights and computation, where a model is not quantised."
    )


class Tasks(Section):
    """How questions with a right answer are put to a model."""

    style: Literal["plain", "zero_shot", "few_shot", "preamble", "predict", "chat"] = Field(
        "plain",
        description="plain: Q and A; zero_shot: a published trigger, and a second question for the "
        "answer; few_shot: worked examples; preamble: a text in front; predict: the label task of "
        "Distilling Step-by-Step; chat: the user's turn.",
    )
    exemplars: Annotated[Path, Flag(metavar="FILE")] | None = Field(
        None, description="Worked examples for few_shot, or the text for preamble."
    )
    trigger: Annotated[int, Field(ge=1, le=14), Flag(metavar="N")] = Field(
        1, description="Number of the zero-shot trigger."
    )
    self_consistency: Annotated[int, Field(ge=0, le=10**6), Flag(metavar="K")] = Field(
        0, description="Answers that vote, besides the greedy one."
    )
    temperature: Temperature = Field(0.7, description="Of the answers that vote.")
    max_new_tokens: Number = Field(128, description="Longest answer (tokens).")
    limit: Annotated[Count, Flag(metavar="N")] | None = Field(
        None, description="Questions of each task; none: all."
    )
    seed: Annotated[Seed, Flag(metavar="N")] = Field(0, description="Of the answers that vote.")

    def problems(self) -> Iterator[Problem]:
        """Rules: a file where one is used, and only there; votes that differ."""
        if (self.exemplars is not None) != (self.style in ("few_shot", "preamble")):
            yield ("exemplars",), "a file belongs to few_shot and preamble, and only there"
        if self.self_consistency and self.temperature == 0:
            rule = f"{self.self_consistency} answers at temperature 0 would all be equal"
            yield ("self_consistency",), rule


class Harness(Section):
    """How lm-eval's tasks are run."""

    limit: Annotated[Count, Flag(metavar="N")] | None = Field(
        None, description="Documents of each task; none: all."
    )
    num_fewshot: Annotated[int, Field(ge=0, le=10**4), Flag(metavar="N")] | None = Field(
        None, description="Examples before each question; none: as the task says."
    )
    batch_size: Rows = Field(8, description="Rows at a time.")
    chat: bool = Field(
        False,
        description="Ask in turns of the tokenizer's chat template, examples as turns before.",
    )


class Sampling(Drawing):
    """How an answer is drawn."""

    temperature: Temperature = Field(0.0, description="0 is greedy.")
    max_new_tokens: Annotated[int, Field(ge=1, le=10**6), Flag(metavar="N")] = Field(
        128, description="Longest answer (tokens)."
    )
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=100)], ...],
        Flag(metavar="TEXT", repeat=True),
    ] = Field((), max_length=16, strict=False, description="Strings that end an answer.")
    seed: Annotated[Seed, Flag(metavar="N")] = Field(0, description="Of the draws.")


class Serve(Section):
    """How a model is served."""

    host: Annotated[str, Flag(metavar="ADDRESS")] = Field(
        "127.0.0.1", description="Where to listen; 127.0.0.1 is this machine only."
    )
    port: Annotated[int, Field(ge=0, le=65535), Flag(metavar="N")] = Field(
        8000, description="0 takes a free one."
    )
    slots: Annotated[int, Field(ge=1, le=4096), Flag(metavar="ROWS")] = Field(
        32, description="Answers that are written at a time."
    )
    length: Annotated[Size, Flag(metavar="TOKENS")] | None = Field(
        None, description="Prompt and answer together; none: at most 2048 of the model's context."
    )
    special_tokens: SpecialTokens = Field(
        "refuse",
        description="What a special token's string in a plain prompt is, such as <|im_start|>: "
        "refused, parsed to the token, or kept as text. In messages it is always text.",
    )
    dtype: Dtype = Field("bfloat16", description="Of weights, computation and cache.")


class Align(Section):
    """A text, and the two models that cut it into tokens."""

    text: Annotated[str, Flag(positional=True, metavar="TEXT")] = Field(
        description="The text itself; - reads it from standard input."
    )
    student: Annotated[Path, Flag(metavar="S")] = Field(
        description="A model folder, a .gguf file, a run, or bytes, for one token per byte."
    )
    teacher: Annotated[Path, Flag(metavar="T")] = Field(description="The same of the teacher.")
    allow_network: bool = Field(False, description="Download what is named and not here.")


class TeacherCache(Section):
    """What is stored of a teacher, and where."""

    output: Annotated[Path, Flag("-o", "DIR")] | None = Field(
        None, description="A folder, or gs://... or s3://...; none: teacher.cache of the file."
    )
    teacher: Annotated[str, Flag(metavar="NAME")] | None = Field(
        None, description="Which of several teachers is asked, about its own records alone."
    )
    format: Literal["hidden", "topk", "sampled"] = Field(
        "hidden",
        description="hidden: last hidden states, exact for every method of logits; topk: the k "
        "likeliest tokens; sampled: tokens drawn, unbiased.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="Of the stored numbers; auto: bfloat16 of hidden, else float16."
    )
    k: Annotated[Size, Flag(metavar="K")] | None = Field(
        None, description="Tokens of a position: 64 of topk, 50 draws of sampled."
    )
    temperatures: Annotated[
        tuple[Annotated[float, Field(ge=0.01, le=1000)], ...], Flag(metavar="T")
    ] = Field(
        (), max_length=16, strict=False, description="Of topk, besides 1: which T losses use."
    )
    draws: Annotated[int, Field(ge=1, le=1000), Flag(metavar="N")] | None = Field(
        None, description="Of sampled: independent draws, one for each epoch in turn."
    )
    seed: Annotated[Seed, Flag(metavar="N")] | None = Field(
        None, description="Of sampled: of the draws; none: 0."
    )
    shard: Annotated[
        str, Field(pattern=r"^[1-9][0-9]{0,5}/[1-9][0-9]{0,5}$"), Flag(metavar="I/N")
    ] = Field("1/1", description="Ask only for every N-th part, from the I-th on.")
    dry_run: bool = Field(False, description="Only say how large it is; nobody is asked.")

    def share(self) -> tuple[int, int]:
        """(I, N) of the shard."""
        number, count = self.shard.split("/")
        return int(number), int(count)

    def problems(self) -> Iterator[Problem]:
        """Rules: a shard of those there are."""
        number, count = self.share()
        if number > count:
            yield ("shard",), f"{self.shard}: I must be from 1 to N"


class TeacherVerify(Section):
    """Who is asked again, and about how much."""

    teacher: Annotated[Path, Flag(metavar="MODEL")] = Field(
        description="The teacher, as teacher.source names it."
    )
    segments: Annotated[Count, Flag("-n", "N")] = Field(
        100, description="Segments, spread over all that are stored."
    )


class Plan(Section):
    """What a run is planned for."""

    target: Annotated[str, Flag(metavar="TARGET")] = Field(
        description="What to compile for: tpu:v5p:2x2x4 or tpu:v5e:4x4x2 (chips of a slice, then "
        "slices; needs the package libtpu), gpu:h100:8 or gpu:h100:4x8 (hosts x GPUs; needs JAX's "
        "CUDA plugin, no GPU), or cpu:8."
    )
    tries: Annotated[int, Field(ge=0, le=10**4), Flag(metavar="N")] = Field(
        8,
        description="Changes to compile, at most: until it fits, or for faster settings where it "
        "does; 0 for none.",
    )
    minutes: Annotated[float, Field(gt=0), Flag(metavar="M")] = Field(
        10.0, description="No change that may be faster is begun after so many."
    )
