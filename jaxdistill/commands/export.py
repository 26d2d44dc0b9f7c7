"""How a model is written: in which format, and in how few bits."""

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from jaxdistill.section import Dtype, Flag, Problem, Section

SchemeName = Literal["int8", "int4", "int8_dynamic", "float8", "float8_dynamic"]
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


class Quantized(Section):
    """Which kernels of the layers are held in numbers of few bits, and which scheme each has."""

    scheme: SchemeName = Field(description=SCHEME)
    exceptions: Exceptions = Field((), description=EXCEPTIONS)

    def problems(self) -> Iterator[Problem]:
        """Rules: exceptions can be read, and fit into one folder."""
        yield from exception_problems(self.exceptions, (self.scheme,))


def exception_problems(exceptions: tuple[str, ...], schemes: tuple[str, ...]) -> Iterator[Problem]:
    """What is wrong with exceptions to schemes."""
    names = (*get_args(SchemeName), "none")
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

    scheme: SchemeName | None = Field(
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
