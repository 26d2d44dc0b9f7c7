"""What the data need to know of a fast tokenizer: looked at once, and told to other processes."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxdistill.errors import ModelError
from jaxdistill.steady_tokenizer import made_steady


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """A fast tokenizer, and what the pipeline needs to know about it.

    Attributes:
      backend: the `tokenizers.Tokenizer`, which makes ids of texts.
      opened: gives the transformers PreTrainedTokenizerFast around it.
      names: special tokens by what they are called, such as {"eos_token": "</s>"}.
      prefix: the ids the tokenizer itself puts before a text (a beginning-of-text token, or none).
      end: the end-of-text id, or None.
      pad: the id that fills rows; it is masked everywhere.
      controls: the strings of the special tokens, id by string.
      inert: bool [V], True for the ids that text must never become.
    """

    backend: Any
    opened: Callable[[], Any]
    names: Mapping[str, Any]
    prefix: tuple[int, ...]
    end: int | None
    pad: int
    controls: dict[str, int]
    inert: np.ndarray

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The transformers PreTrainedTokenizerFast; asked for only where the backend won't do."""
        return self.opened()

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `tokenizer_fingerprint`; of a large vocabulary it takes a moment."""
        return tokenizer_fingerprint(self.tokenizer)

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches the string of any special token, the longest first; nothing if there are none."""
        strings = sorted(filter(None, self.controls), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, strings)) or r"(?!)")

    @functools.cached_property
    def growing(self) -> Any:
        """The normaliser, if it may make several characters of one; None for most."""
        normalizer = self.backend.normalizer
        if normalizer is None:
            return None
        state = json.loads(normalizer.__getstate__())
        parts = state["normalizers"] if state["type"] == "Sequence" else [state]
        return None if all(map(_keeps_size, parts)) else normalizer

    @functools.cached_property
    def newline(self) -> list[int]:
        """The ids of one line end."""
        return self.backend.encode("\n", add_special_tokens=False).ids


def _keeps_size(part: Mapping[str, Any]) -> bool:
    """Whether a normaliser leaves a text about as long as it was."""
    if part["type"] == "Replace":
        return len(part["content"]) <= 1 and "String" in part["pattern"]
    return part["type"] in (
        "Lowercase",
        "Strip",
        "StripAccents",
        "NFC",
        "Prepend",
        "BertNormalizer",
    )


def prepare(tokenizer: Any) -> Codec:
    """Looks at a tokenizer once: what it adds to a text, and which ids are special.

    Args:
      tokenizer: a transformers PreTrainedTokenizerFast.

    Raises:
      ModelError: if it is not a fast tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer: {type(tokenizer).__name__} is not a fast tokenizer, which the data needs "
            "to map tokens to text: the model folder must hold a tokenizer.json"
        )
    made_steady(tokenizer)
    special = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    unknown = tokenizer.unk_token_id
    last = max([*tokenizer.get_vocab().values(), *special.values()], default=0)
    inert = np.zeros(last + 1, bool)
    inert[list(special.values())] = True
    # An unknown character honestly becomes the unknown token, unless that token also ends texts.
    if unknown is not None and unknown not in (end, tokenizer.bos_token_id):
        inert[unknown] = False
    if pad is None:
        pad = end if end is not None else 0
    names = json.loads(json.dumps(dict(tokenizer.special_tokens_map), default=str))
    backend, opened = tokenizer.backend_tokenizer, lambda: tokenizer
    return Codec(backend, opened, names, _prefix(tokenizer), end, int(pad), special, inert)


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text: seen from what it does, not from what it claims."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start])
    raise ModelError(
        f"tokenizer: adding special tokens to 'a' turns {plain} into {full}, which does not hold "
        "the text's own tokens: this tokenizer cannot be used"
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides how the tokenizer maps text to ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Both are set and unset by mere use of the tokenizer.
    state.pop("truncation", None)
    state.pop("padding", None)
    text = json.dumps([state, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def portable(codec: Codec) -> dict[str, Any]:
    """A codec as JSON, of which `ported` makes one in another process."""
    tokenizer = codec.tokenizer
    return {
        "backend": codec.backend.to_str(),
        "names": dict(codec.names),
        "chat_template": tokenizer.chat_template,
        "cleans": tokenizer.clean_up_tokenization_spaces,
        "prefix": list(codec.prefix),
        "end": codec.end,
        "pad": codec.pad,
        "controls": codec.controls,
        "inert": [len(codec.inert), *np.flatnonzero(codec.inert).tolist()],
    }


def ported(facts: Mapping[str, Any]) -> Codec:
    """The codec that `portable` described; transformers is imported once its part is asked for."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(facts["backend"])
    size, *places = facts["inert"]
    inert = np.zeros(size, bool)
    inert[places] = True

    def opened() -> Any:
        from jaxdistill.quiet_transformers import transformers

        tokenizer: Any = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=facts["cleans"],
            **facts["names"],
        )
        tokenizer.chat_template = facts["chat_template"]
        return tokenizer

    given = facts["prefix"], facts["end"], facts["pad"], facts["controls"]
    prefix, end, pad, controls = given
    return Codec(backend, opened, facts["names"], tuple(prefix), end, pad, controls, inert)
