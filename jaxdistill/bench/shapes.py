"""The shapes that are measured: vocabularies and widths of models that people distil."""

from typing import Any, NamedTuple

from jaxdistill.errors import ConfigError


class Shape(NamedTuple):
    """One problem.

    Attributes:
      name: of the vocabulary's model.
      tokens: N.
      vocab: V.
      student: width of the student.
      teacher: width of the teacher.
      dtype: of logits, or of hidden states and heads.
    """

    name: str
    tokens: int
    vocab: int
    student: int
    teacher: int
    dtype: str


LISTS = {
    "full": (
        Shape("llama-3", 8192, 128_256, 2048, 4096, "bfloat16"),
        Shape("llama-3", 8192, 128_256, 2048, 4096, "float32"),
        Shape("llama-3", 2048, 128_256, 2048, 4096, "bfloat16"),
        Shape("qwen", 8192, 151_936, 2560, 5120, "bfloat16"),
        Shape("gemma", 4096, 262_144, 1152, 3840, "bfloat16"),
        Shape("gpt-2", 8192, 50_257, 768, 1600, "bfloat16"),
    ),
    "quick": (
        Shape("llama-2", 512, 32_000, 256, 512, "float32"),
        Shape("smollm2", 256, 49_152, 576, 960, "float32"),
        Shape("gpt-2", 256, 50_257, 256, 512, "float32"),
        Shape("llama-3", 128, 128_256, 256, 512, "bfloat16"),
    ),
}
_FIELDS = {"N": "tokens", "V": "vocab", "S": "student", "T": "teacher", "dtype": "dtype"}


def label(shape: Shape) -> str:
    """A shape in one word."""
    return f"{shape.name}[{shape.tokens}x{shape.vocab}]{shape.dtype}"


def parse(text: str, platform: str) -> tuple[Shape, ...]:
    """A list by name ("quick", "full", "auto"), or one shape: "N=8192,V=128256,S=2048,T=4096".

    Raises:
      ConfigError: for anything else.
    """
    if text == "auto":
        return LISTS["quick" if platform == "cpu" else "full"]
    if text in LISTS:
        return LISTS[text]
    base = LISTS["quick" if platform == "cpu" else "full"][0]._replace(name="custom")
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in _FIELDS or not value or (key != "dtype" and not value.isdigit()):
            raise ConfigError(
                f"shapes = {text!r}: must be auto, {', '.join(LISTS)}, or like "
                "N=8192,V=128256,S=2048,T=4096,dtype=bfloat16 (S and T: widths of the models)"
            )
        changed: Any = {_FIELDS[key]: value if key == "dtype" else int(value)}
        base = base._replace(**changed)
    if base.dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype = {base.dtype!r}: must be float32, bfloat16 or float16")
    return (base,)
