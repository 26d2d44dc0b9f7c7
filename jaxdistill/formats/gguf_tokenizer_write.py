"""What a GGUF file says of a tokenizer: the way back from `gguf_tokenizer`, where there is one."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxdistill.errors import ModelError
from jaxdistill.formats import gguf_tokenizer as read

_ELSE = "export a folder, and convert it with llama.cpp's convert_hf_to_gguf.py"
_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": read.SPACE}
_PREPENDED = {"type": "Prepend", "prepend": read.SPACE}


class Described(NamedTuple):
    """A tokenizer in the words of a GGUF file.

    Attributes:
      model: "gpt2", byte-level BPE; or "llama", SentencePiece's BPE with bytes to fall back on.
      tokens: by id, as many as the embedding has rows.
      kinds: of each.
      begins, ends: whether a text gets BOS before it, and EOS behind.
      pre: of "gpt2": how text is cut before merges.
      merges: of "gpt2", in order.
      scores: of "llama", by id: the token with the highest is made first.
      space: of "llama": a text gets a space before it.
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    begins: bool
    ends: bool
    pre: str = "default"
    merges: list[str] | None = None
    scores: list[float] | None = None
    space: bool | None = None


def described(tokenizer: Any, rows: int) -> Described:
    """What a GGUF file says of a tokenizer; ids that are no token are rows of padding.

    Raises:
      ModelError: for one that is neither byte-level BPE nor SentencePiece's, or cuts text as
        llama.cpp cannot.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ModelError(f"the tokenizer is {model['type']}, which is not written as GGUF: {_ELSE}")
    known = tokenizer.get_vocab()
    if max(known.values()) >= rows:
        raise ModelError(
            f"the tokenizer's ids reach {max(known.values())}: the model has {rows} rows"
        )
    tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [read.UNUSED] * rows
    for token, number in known.items():
        tokens[number], kinds[number] = token, read.NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        kinds[number] = read.CONTROL if added.special else read.USER_DEFINED
    merges = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one)
              for one in model["merges"]]  # fmt: skip
    ids = tokenizer("a")["input_ids"]
    begins = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    ends = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    if model.get("byte_fallback"):
        space = _space_of(state)
        _mark_bytes(tokens, kinds, tokenizer.unk_token_id)
        scores = _scores(tokens, kinds, merges)
        return Described("llama", tokens, kinds, begins, ends, scores=scores, space=space)
    pre = _pre_of(state, bool(merges))
    return Described("gpt2", tokens, kinds, begins, ends, pre, [" ".join(one) for one in merges])


def _mark_bytes(tokens: list[str], kinds: list[int], unknown: int | None) -> None:
    for number, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and kinds[number] == read.NORMAL:
            kinds[number] = read.BYTE
    if unknown is not None:
        kinds[unknown] = read.UNKNOWN


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores by which llama.cpp makes the same tokens first.

    It merges any two neighbours whose join is a token, the join with the highest score first. So
    every cut of a token must be a merge, and the merges of a token stand side by side.

    Raises:
      ModelError: where merges say more than an order of tokens.
    """
    made = list(dict.fromkeys(map("".join, merges)))
    place = {token: -float(number) for number, token in enumerate(made, 1)}
    scores = [place.get(token, -1e6) for token in tokens]
    joins = ["".join(one) for one in merges]
    runs = sum(a != b for a, b in zip(joins, joins[1:], strict=False)) + bool(joins)
    vocabulary = read.tokens_of(tokens, kinds)
    if runs != len(made) or set(read.joins_of(tokens, kinds, scores, vocabulary)) != set(merges):
        raise ModelError(
            "the tokenizer's merges are not SentencePiece's, an order of tokens with all their "
            f"cuts: {_ELSE}"
        )
    return scores


def _space_of(state: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before it, of a tokenizer that writes spaces as SentencePiece.

    Raises:
      ModelError: for any other.
    """
    normalizer, cut = state["normalizer"] or {}, state["pre_tokenizer"]
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    harmless = {"type": "Split", "pattern": {"String": " "}, "invert": False}
    if cut is None or {key: cut.get(key) for key in harmless} == harmless:
        if steps == [_PREPENDED, _REPLACED]:
            return True
        if steps == [_REPLACED]:
            return False
    # Metaspace puts no space before a text that begins with one, and llama.cpp does.
    elif cut["type"] == "Metaspace" and not steps and cut["prepend_scheme"] == "never":
        if not cut.get("split", True):
            return False
    raise ModelError(f"the tokenizer writes spaces in a way that llama.cpp has not: {_ELSE}")


def _pre_of(state: Mapping[str, Any], merges: bool) -> str:
    """llama.cpp's name of how a tokenizer cuts text; without merges every way is the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    if not merges:
        return "gpt-2"
    cut = _cut(state["pre_tokenizer"])
    for name, build in read.PRE.items():
        one = Tokenizer(models.BPE())
        one.pre_tokenizer = build(pre_tokenizers)
        normalizer = {"type": "NFC"} if name == "qwen2" else None
        same = _cut(json.loads(one.to_str())["pre_tokenizer"]) == cut
        if same and state["normalizer"] == normalizer:
            return "gpt-2" if name == "default" else name
    raise ModelError(
        f"the tokenizer cuts text in a way that is none of {', '.join(read.PRE)}: {_ELSE}"
    )


def _cut(state: Any) -> Any:
    """The settings of a pre-tokenizer that change its tokens; offsets do not."""
    if isinstance(state, Mapping):
        return {key: _cut(value) for key, value in state.items() if key != "trim_offsets"}
    return [_cut(one) for one in state] if isinstance(state, list) else state
