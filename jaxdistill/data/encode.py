"""From text to token ids, with text kept as text: no string in the data becomes a special token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdistill.data.codec import Codec
from jaxdistill.data.records import Record

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


# What becomes of a record: its documents, or the reason why there are none.
Documents = tuple[Document, ...] | str


def encode_batch(
    codec: Codec, texts: Sequence[str], *, split_special: bool, offsets: bool = False
) -> list[Any]:
    """Tokenises texts together; a text the tokenizer refuses comes back as the reason, a string.

    Args:
      codec: from `codec.prepare`.
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
        encodings = _backend(codec, split_special, offsets)(list(texts), add_special_tokens=False)
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
    return [(one.ids, one.offsets) if offsets else one.ids for one in encodings]


def _backend(codec: Codec, split_special: bool, offsets: bool) -> Any:
    """What tokenises a batch of texts whole: without offsets it is a sixth faster."""
    backend = codec.backend
    # Each of them is a state, which any use of the tokenizer leaves behind.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != split_special:
        backend.encode_special_tokens = split_special
    return backend.encode_batch if offsets else backend.encode_batch_fast


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
    return [ids if isinstance(ids, str) else ids.tolist() for ids in _ids(codec, texts, parse)]


def _ids(codec: Codec, texts: Sequence[str], parse: bool) -> list[np.ndarray | str]:
    """`encode_text` as int32 [N] each."""
    encoded = encode_batch(codec, texts, split_special=not parse)
    made = [
        ids if isinstance(ids, str) else np.fromiter(ids, np.int32, len(ids)) for ids in encoded
    ]
    for index, ids in enumerate(made):
        if not parse and not isinstance(ids, str) and codec.inert.take(ids).any():
            again = _encode_broken(codec, texts[index])
            made[index] = again if isinstance(again, str) else np.asarray(again, np.int32)
    return made


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
    encoded = _ids(codec, [record.texts[0] for record in records], parse)
    for record, ids in zip(records, encoded, strict=True):
        if isinstance(ids, str):
            documents.append(ids)
            continue
        before = prefix_of(codec, ids, parse) if record.opens else ()
        whole = _joined(before, ids, _end(codec, record.closes, ids if parse else ()))
        documents.append(Document(whole, np.ones(len(whole), bool)))
    return documents


def _joined(*parts: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def encode_completions(
    codec: Codec, records: Sequence[Record], loss_on: str, parse: bool = False
) -> list[Document | str]:
    """Documents of `completion` records: prefix, prompt, completion, end token.

    The completion is tokenised in the context of its prompt where that leaves the prompt's own
    tokens unchanged, and by itself otherwise: the boundary always lies between two tokens, and the
    prompt reads as it will when the model is asked.
    """
    prompts = _ids(codec, [record.texts[0] for record in records], parse)
    joined = _ids(codec, ["".join(record.texts) for record in records], parse)
    documents: list[Document | str] = []
    for record, prompt, both in zip(records, prompts, joined, strict=True):
        if not isinstance(prompt, str) and not _begins(both, prompt):
            alone = _ids(codec, [record.texts[1]], parse)[0]
            both = alone if isinstance(alone, str) else _joined(prompt, alone)
        if isinstance(prompt, str) or isinstance(both, str):
            documents.append(prompt if isinstance(prompt, str) else str(both))
            continue
        before = prefix_of(codec, both, parse)
        end = _end(codec, True, both if parse else ())
        ids = _joined(before, both, end)
        loss = np.ones(len(ids), bool)
        if loss_on == "completion":
            loss[: len(before) + len(prompt)] = False
        documents.append(Document(ids, loss))
    return documents


def _begins(ids: np.ndarray | str, start: np.ndarray) -> bool:
    """Whether a text's tokens begin with others; where there is a reason in place of them, not."""
    return not isinstance(ids, str) and np.array_equal(ids[: len(start)], start)


def prefix_of(codec: Codec, ids: Sequence[int] | np.ndarray, parse: bool) -> tuple[int, ...]:
    """What goes before a text: the tokenizer's prefix, unless a parsed text begins with it."""
    size = len(codec.prefix)
    return () if parse and tuple(ids[:size]) == codec.prefix else codec.prefix


def _end(codec: Codec, closes: bool, parsed: Sequence[int] | np.ndarray = ()) -> tuple[int, ...]:
    """The end token, unless a parsed text ends with a special one, white space left out."""
    if not closes or codec.end is None:
        return ()
    last = max((i for i, token in enumerate(parsed) if codec.inert[token]), default=None)
    if last is not None and not codec.tokenizer.decode(list(parsed[last + 1 :])).strip():
        return ()
    return (codec.end,)
