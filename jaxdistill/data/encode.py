"""From text to token ids, with text kept as text: no string in the data becomes a special token."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data.records import Record
from jaxdistill.errors import ModelError
from jaxdistill.models.vocabulary import made_steady

MAX_GROWTH = 4  # characters that a normaliser may make of one, on an average of the text
_SLICE = 1000  # characters


@dataclasses.dataclass(frozen=True, eq=False)
class Beside:
    """A document in the tokens of another model.

    Attributes:
      groups: int32 [N], of each token of the document the group, from 1, that spells what a group
        of the other tokens spells; 0 for none.
      ids: int32 [M], the other model's tokens.
      other_groups: int32 [M], their groups.
    """

    groups: np.ndarray
    ids: np.ndarray
    other_groups: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A tokenised document.

    Attributes:
      ids: int32 [N].
      loss: bool [N], True where the token, as a target, counts in the loss.
      beside: the same in the tokens of another model, or None.
      shortened: whether it is the beginning of a longer one.
    """

    ids: np.ndarray
    loss: np.ndarray
    beside: Beside | None = None
    shortened: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """A fast tokenizer, and what the pipeline needs to know about it.

    Attributes:
      tokenizer: a transformers PreTrainedTokenizerFast.
      prefix: the ids the tokenizer itself puts before a text (a beginning-of-text token, or none).
      end: the end-of-text id, or None.
      pad: the id that fills rows; it is masked everywhere.
      controls: the strings of the special tokens, id by string.
      inert: bool [V], True for the ids that text must never become.
    """

    tokenizer: Any
    prefix: tuple[int, ...]
    end: int | None
    pad: int
    controls: dict[str, int]
    inert: np.ndarray

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches the string of any special token, the longest first; nothing if there are none."""
        strings = sorted(filter(None, self.controls), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, strings)) or r"(?!)")

    @functools.cached_property
    def growing(self) -> Any:
        """The normaliser, if it may make several characters of one; None for most."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        if normalizer is None:
            return None
        state = json.loads(normalizer.__getstate__())
        parts = state["normalizers"] if state["type"] == "Sequence" else [state]
        return None if all(map(_keeps_size, parts)) else normalizer

    @functools.cached_property
    def newline(self) -> list[int]:
        """The ids of one line end."""
        return self.tokenizer("\n", add_special_tokens=False)["input_ids"]


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
    return Codec(tokenizer, _prefix(tokenizer), end, int(pad), special, inert)


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


def fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides how the tokenizer maps text to ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Both are set and unset by mere use of the tokenizer.
    state.pop("truncation", None)
    state.pop("padding", None)
    text = json.dumps([state, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def encode_batch(
    codec: Codec, texts: Sequence[str], *, split_special: bool, offsets: bool = False
) -> list[Any]:
    """Tokenises texts together; a text the tokenizer refuses comes back as the reason, a string.

    Args:
      codec: from `prepare`.
      texts: any number of texts.
      split_special: True keeps the strings of special tokens as text.
      offsets: also return where each token lies in its text.

    Returns:
      For every text the list of ids, or (ids, offsets), or a string.
    """
    if not texts:
        return []
    if any(found := [_unfit(codec, text) for text in texts]):
        return [
            reason or encode_batch(codec, [text], split_special=split_special, offsets=offsets)[0]
            for reason, text in zip(found, texts, strict=True)
        ]
    try:
        # verbose=False: longer than the model's window is normal here, rows are cut later.
        result = codec.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=split_special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # The backend raises bare exceptions for a text it cannot encode, and names none of them; a
        # search pattern that gives up is a panic, which Python sees as a BaseException.
        if len(texts) == 1:
            return [_refusal(error)]
        return [
            encode_batch(codec, [text], split_special=split_special, offsets=offsets)[0]
            for text in texts
        ]
    if offsets:
        return list(zip(result["input_ids"], result["offset_mapping"], strict=True))
    return result["input_ids"]


def _refusal(error: BaseException) -> str:
    return f"the tokenizer refuses the text: {str(error)[:200]}"


def _unfit(codec: Codec, text: str) -> str | None:
    """Why the normaliser cannot be given a text: it makes much more of it, or fails; or None.

    Most make no more, or not much. What is looked at costs a second normalisation, piece by piece:
    a rule for one letter is one for all.
    """
    normalizer = codec.growing
    if normalizer is None or len(text) < _SLICE:
        return None
    room = MAX_GROWTH * len(text)
    for start in range(0, len(text), _SLICE):
        try:
            room -= len(normalizer.normalize_str(text[start : start + _SLICE]))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic
            return _refusal(error)
        if room < 0:
            return (
                f"the tokenizer makes more than {MAX_GROWTH} times as many characters of the text"
            )
    return None


def encode_text(codec: Codec, texts: Sequence[str], parse: bool = False) -> list[list[int] | str]:
    """Tokenises raw text: a special token written in it stays text, or the reason comes back.

    With `parse` it becomes the special token, as in text that is rendered already.
    """
    if parse:
        return encode_batch(codec, texts, split_special=False)
    encoded = encode_batch(codec, texts, split_special=True)
    for index, ids in enumerate(encoded):
        if not isinstance(ids, str) and codec.inert[ids].any():
            encoded[index] = _encode_broken(codec, texts[index])
    return encoded


def _encode_broken(codec: Codec, text: str) -> list[int] | str:
    """For vocabularies with the special strings as words: cuts each after its first letter."""
    pieces, last = [], 0
    for match in codec.control_pattern.finditer(text):
        pieces += [text[last : match.start() + 1]]
        last = match.start() + 1
    pieces.append(text[last:])
    ids: list[int] = []
    for piece in encode_batch(codec, [piece for piece in pieces if piece], split_special=True):
        if isinstance(piece, str):
            return piece
        ids += piece
    if codec.inert[ids].any():
        token = codec.tokenizer.convert_ids_to_tokens(int(np.asarray(ids)[codec.inert[ids]][0]))
        return f"the tokenizer turns plain text into its special token {token!r}"
    return ids


def encode_middle(codec: Codec, text: str) -> list[int] | str:
    """Raw text from the middle of a document: without the space some tokenizers put at a start."""
    ids = encode_text(codec, ["\n" + text])[0]
    size = len(codec.newline)
    if not isinstance(ids, str) and ids[:size] == codec.newline:
        return ids[size:]
    return encode_text(codec, [text])[0]


def encode_texts(
    codec: Codec, records: Sequence[Record], parse: bool = False
) -> list[Document | str]:
    """Documents of `text` records: the tokenizer's prefix, the text, the end token; all count.

    With `parse` a prefix or an end that is written in the text is not added a second time.
    """
    documents: list[Document | str] = []
    encoded = encode_text(codec, [record.texts[0] for record in records], parse)
    for record, ids in zip(records, encoded, strict=True):
        if isinstance(ids, str):
            documents.append(ids)
            continue
        before = prefix_of(codec, ids, parse) if record.opens else ()
        whole = [*before, *ids, *_end(codec, record.closes, ids if parse else ())]
        documents.append(Document(np.asarray(whole, np.int32), np.ones(len(whole), bool)))
    return documents


def encode_completions(
    codec: Codec, records: Sequence[Record], loss_on: str, parse: bool = False
) -> list[Document | str]:
    """Documents of `completion` records: prefix, prompt, completion, end token.

    The completion is tokenised in the context of its prompt where that leaves the prompt's own
    tokens unchanged, and by itself otherwise: the boundary always lies between two tokens, and the
    prompt reads as it will when the model is asked.
    """
    prompts = encode_text(codec, [record.texts[0] for record in records], parse)
    joined = encode_text(codec, ["".join(record.texts) for record in records], parse)
    documents: list[Document | str] = []
    for record, prompt, both in zip(records, prompts, joined, strict=True):
        if not isinstance(prompt, str) and (isinstance(both, str) or both[: len(prompt)] != prompt):
            alone = encode_text(codec, [record.texts[1]], parse)[0]
            both = alone if isinstance(alone, str) else [*prompt, *alone]
        if isinstance(prompt, str) or isinstance(both, str):
            documents.append(prompt if isinstance(prompt, str) else str(both))
            continue
        before = prefix_of(codec, both, parse)
        end = _end(codec, True, both if parse else ())
        ids = np.asarray([*before, *both, *end], np.int32)
        loss = np.ones(len(ids), bool)
        if loss_on == "completion":
            loss[: len(before) + len(prompt)] = False
        documents.append(Document(ids, loss))
    return documents


def prefix_of(codec: Codec, ids: Sequence[int], parse: bool) -> tuple[int, ...]:
    """What goes before a text: the tokenizer's prefix, unless a parsed text begins with it."""
    size = len(codec.prefix)
    return () if parse and tuple(ids[:size]) == codec.prefix else codec.prefix


def _end(codec: Codec, closes: bool, parsed: Sequence[int] = ()) -> tuple[int, ...]:
    """The end token, unless a parsed text ends with a special one, white space left out."""
    if not closes or codec.end is None:
        return ()
    last = max((i for i, token in enumerate(parsed) if codec.inert[token]), default=None)
    if last is not None and not codec.tokenizer.decode(list(parsed[last + 1 :])).strip():
        return ()
    return (codec.end,)
