"""What decides which rows come out of a set of sources, and the fingerprint of all of it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.data import encode, packing, rendering
from jaxdistill.data.records import PAIRS
from jaxdistill.data.sources import Source
from jaxdistill.errors import ConfigError, DataError

LOSS_ON = {"all": ("text", "completion", "messages", "dialogue"),
           "completion": ("completion", "dialogue", "pairs", "dialogue_pairs"),
           "assistant": ("messages", "dialogue")}  # fmt: skip
ON_BAD_RECORD = ("quarantine", "fail")
LONG_DOCUMENTS = ("auto", "split", "truncate", "reject")
TURNS = ("whole", "each")
SPECIAL_TOKENS = ("text", "parse")

# Part of every fingerprint: raise it when the same input would give other tokens, masks, rows or
# facts of the folder: one of before is not opened then.
_VERSION = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides, together with the sources and the tokenizer, which rows come out."""

    seq_len: int
    packing: str
    loss_on: str
    long_documents: str
    chat_template: str | None
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    turns: str = "whole"
    special_tokens: str = "text"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          ConfigError: naming the field, the value and the choices.
        """
        if isinstance(self.seq_len, bool) or self.seq_len < 2:
            raise ConfigError(f"data.seq_len: {self.seq_len}: must be a whole number of at least 2")
        check_choice("packing", self.packing, packing.PACKINGS)
        check_choice("loss_on", self.loss_on, tuple(LOSS_ON))
        check_choice("long_documents", self.long_documents, LONG_DOCUMENTS)
        check_choice("turns", self.turns, TURNS)
        check_choice("special_tokens", self.special_tokens, SPECIAL_TOKENS)
        if self.turns == "each" and self.loss_on == "all":
            raise ConfigError("data.turns: 'each' learns single turns: use loss_on: assistant")

    def policy(self, kind: str) -> str:
        """What becomes of long documents of a kind: split, truncate or reject."""
        if self.long_documents == "auto":
            if kind in PAIRS:
                return "reject"
            return "split" if kind == "text" else "truncate"
        return self.long_documents


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError unless the value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"data.{field}: {value!r}: must be one of {', '.join(choices)}")


def fingerprint(
    sources: Sequence[Source],
    codec: encode.Codec,
    settings: Settings,
    second: Mapping[str, Any] | None = None,
    routing: Mapping[str, Any] | None = None,
) -> str:
    """A hash over every byte of the sources, the tokenizer, the template and the settings.

    `second` is the identity of a second view, `routing` of several teachers; they join where there
    are such.
    """
    content: dict[str, Any] = {
        "version": _VERSION,
        "sources": [_identity(source) for source in sources],
        "tokenizer": encode.fingerprint(codec.tokenizer),
        "prefix": codec.prefix,
        "template": rendering.template_of(codec.tokenizer, settings.chat_template),
        "settings": dataclasses.asdict(settings),
    }
    content |= {} if second is None else {"second": second}
    if routing is not None:
        content["routing"] = {**routing, "of_sources": [one.teacher for one in sources]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _identity(source: Source) -> dict[str, Any]:
    # Who wrote it joins where it matters, so that other data sets keep their fingerprints.
    whose = {} if source.origin == "data" else {"origin": source.origin}
    often = {} if source.weight == 1.0 else {"weight": source.weight}
    return {"format": source.format, "sha256": _digest(source), **whose, **often}


def _digest(source: Source) -> str:
    try:
        return source.digest()
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror or error}") from error
