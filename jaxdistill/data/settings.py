"""The settings that decide, beside sources and tokenizer, which rows come out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdistill.data import packing
from jaxdistill.data.records import PAIRS
from jaxdistill.errors import ConfigError

LOSS_ON = {"all": ("text", "completion", "messages", "dialogue"),
           "completion": ("completion", "dialogue", "pairs", "dialogue_pairs"),
           "assistant": ("messages", "dialogue")}  # fmt: skip
ON_BAD_RECORD = ("quarantine", "fail")
LONG_DOCUMENTS = ("auto", "split", "truncate", "reject")
TURNS = ("whole", "each")
SPECIAL_TOKENS = ("text", "parse")


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
