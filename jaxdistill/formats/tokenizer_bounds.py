"""A tokenizer.json makes of a text, and of tokens, no more than a few times as much."""

import pathlib
from collections.abc import Iterator
from typing import Any

from jaxdistill.errors import ModelError

MAX_ID = 2**24  # no vocabulary has so many tokens
MAX_TOKEN = 10_000  # characters
MAX_CONTENT = 16  # characters that one piece of text is replaced by
MAX_ADDED = 64  # tokens around a text
MAX_PADDED = 2**20  # tokens that a text is filled up to
MAX_WORD = (
    1000  # characters of a word for WordPiece, whose time is their square; of Unigram's pieces
)


def check(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Refuses what would make gigabytes of a page.

    Args:
      path: of the file, for messages.
      content: of tokenizer.json; what is not as it should be is left to the tokenizers library.

    Raises:
      ModelError: naming the field.
    """
    try:
        _check(path, content)
    except RecursionError:
        raise ModelError(f"{path}: its parts are nested too deeply") from None


def _check(path: pathlib.Path, content: dict[str, Any]) -> None:
    for token, index in _tokens(content):
        if isinstance(index, int) and not 0 <= index < MAX_ID:
            raise ModelError(
                f"{path}: the token {str(token)[:40]!r} has the id {index}: ids must be from 0 to "
                f"{MAX_ID - 1}"
            )
        if isinstance(token, str) and len(token) > MAX_TOKEN:
            raise ModelError(
                f"{path}: the token {token[:40]!r}... has {len(token)} characters: at most "
                f"{MAX_TOKEN} are read"
            )
    growth = 1
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        for kind, replacement in _replacements(content.get(part)):
            growth *= max(1, len(replacement)) if kind == "Replace" else 1
            if len(replacement) > MAX_CONTENT or growth > MAX_CONTENT:
                raise ModelError(
                    f"{path}: {part}: {kind} makes up to {max(growth, len(replacement))} "
                    f"characters of one: at most {MAX_CONTENT} are allowed"
                )
    _check_template(path, content.get("post_processor"))
    _check_lengths(path, content)
    _check_model(path, _object(content.get("model")))


def _check_model(path: pathlib.Path, model: dict[str, Any]) -> None:
    """A word is cut up in little time, and each piece is looked up with little beside it."""
    longest = model.get("max_input_chars_per_word")
    if isinstance(longest, int) and longest > MAX_WORD:
        raise ModelError(
            f"{path}: model: max_input_chars_per_word is {str(longest)[:40]}: at most {MAX_WORD} "
            "are allowed"
        )
    # From every letter of a text Unigram goes on for as long as its longest piece.
    for row in _list(model.get("vocab")):
        if isinstance(row, list) and row and isinstance(row[0], str) and len(row[0]) > MAX_WORD:
            raise ModelError(
                f"{path}: model: the piece {row[0][:40]!r}... has {len(row[0])} characters: at "
                f"most {MAX_WORD} are allowed"
            )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        text = model.get(name)
        if isinstance(text, str) and len(text) > MAX_CONTENT:
            raise ModelError(
                f"{path}: model: {name} has {len(text)} characters: at most {MAX_CONTENT} are "
                "allowed"
            )


def _check_template(path: pathlib.Path, processor: Any) -> None:
    """What is put around a text is little, and the text stands there once."""
    added = 0
    for part in _processors(processor):
        known = _object(part.get("special_tokens"))
        most, times = 0, 1
        for template in (_list(part.get("single")), _list(part.get("pair"))):
            pieces = [_object(one) for one in template]
            texts = [str(_object(one["Sequence"]).get("id")) for one in pieces if "Sequence" in one]
            tokens = [one["SpecialToken"] for one in pieces if "SpecialToken" in one]
            ids = [
                _list(_object(known.get(str(_object(one).get("id")))).get("ids")) for one in tokens
            ]
            most = max(most, sum(max(1, len(own)) for own in ids))
            times = max([times, *(texts.count(one) for one in texts)])
        added += most
        if added > MAX_ADDED or times > 1:
            raise ModelError(
                f"{path}: post_processor: puts {added} tokens around a text that stands there "
                f"{times} times: at most {MAX_ADDED}, and once, are allowed"
            )


def _processors(processor: Any) -> Iterator[dict[str, Any]]:
    """The parts of a post-processor, however deep they lie."""
    if found := _object(processor):
        yield found
        for part in _list(found.get("processors")):
            yield from _processors(part)


def _check_lengths(path: pathlib.Path, content: dict[str, Any]) -> None:
    """What texts are filled up to, and how far the pieces of a cut text overlap."""
    padding, cut = _object(content.get("padding")), _object(content.get("truncation"))
    lengths = {
        "strategy": _object(padding.get("strategy")).get("Fixed"),
        "pad_to_multiple_of": padding.get("pad_to_multiple_of"),
    }
    for name, value in lengths.items():
        if isinstance(value, int) and value > MAX_PADDED:
            raise ModelError(
                f"{path}: padding: {name} fills every text up to {value} tokens: at most "
                f"{MAX_PADDED} are allowed"
            )
    length, stride = cut.get("max_length"), cut.get("stride")
    if isinstance(length, int) and isinstance(stride, int) and stride > length // 2:
        raise ModelError(
            f"{path}: truncation: pieces of {length} tokens overlap in {stride}: at most half of "
            "them may"
        )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _tokens(content: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(token, id) of the model's vocabulary and of the added tokens."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        yield from vocab.items()
    if isinstance(vocab, list):  # Unigram's: [token, score], by place
        yield from ((row[0], 0) for row in vocab if isinstance(row, list) and row)
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            yield token.get("content"), token.get("id")
    if padding := _object(content.get("padding")):
        yield padding.get("pad_token"), padding.get("pad_id")


def _replacements(node: Any) -> Iterator[tuple[str, str]]:
    """(type, content) of everything that puts other text in a text's place, wherever it stands."""
    if isinstance(node, list):
        for one in node:
            yield from _replacements(one)
    if not isinstance(node, dict):
        return
    kind = node.get("type")
    name = {"Replace": "content", "Prepend": "prepend"}.get(str(kind))
    if name is not None and isinstance(node.get(name), str):
        yield str(kind), node[name]
    for value in node.values():
        yield from _replacements(value)
