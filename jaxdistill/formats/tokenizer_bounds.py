"""A tokenizer.json makes of a text, and of tokens, no more than a few times as much."""

import pathlib
from collections.abc import Iterator
from typing import Any

from jaxdistill.errors import ModelError

MAX_ID = 2**24  # no vocabulary has so many tokens
MAX_TOKEN = 10_000  # characters
MAX_CONTENT = 16  # characters that one piece of text is replaced by


def check(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Refuses what would make gigabytes of a page.

    Args:
      path: of the file, for messages.
      content: of tokenizer.json; what is not as it should be is left to the tokenizers library.

    Raises:
      ModelError: naming the field.
    """
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
