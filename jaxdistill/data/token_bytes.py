"""The bytes that each token of a tokenizer stands for: what two tokenizers have in common."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdistill.errors import MismatchError

_HEX = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_SPACE = "\u2581"  # how SentencePiece writes a space


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of every token.

    Attributes:
      table: id -> bytes; an id without a token is missing.
      special: ids of special tokens, which stand for no text.
      dummy_prefix: whether the tokenizer puts a space before a text that has none.
    """

    table: dict[int, bytes]
    special: frozenset[int]
    dummy_prefix: bool

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token; those of special tokens are empty."""
        return [b"" if i in self.special else self.table.get(int(i), b"") for i in ids]

    def spell(self, ids: Sequence[int], text: str | bytes) -> list[bytes]:
        """The bytes of the tokens of a text; those of special tokens are empty.

        Args:
          ids: of the text, with or without special tokens around it.
          text: what was encoded.

        Raises:
          MismatchError: if the tokens do not spell the text byte for byte, with the first
            difference: the tokenizer changes what it reads (lower case, other normal forms).
        """
        spelled = self.pieces(ids)
        wanted = text.encode() if isinstance(text, str) else text
        got = b"".join(spelled)
        if got != wanted and self.dummy_prefix and got.startswith(b" "):
            first = next(i for i, piece in enumerate(spelled) if piece)
            spelled[first] = spelled[first][1:]
            got = got[1:]
        if got != wanted:
            raise MismatchError(
                f"tokens do not spell their text: "
                f"{difference(wanted, 'the text has', got, 'the tokens')}: this tokenizer changes "
                "what it reads and cannot be aligned by bytes"
            )
        return spelled

    def opening(self) -> list[int]:
        """The tokens that can follow the end of a word: white space at their front, or special.

        Returns:
          Their ids, rising.
        """
        found = (i for i, piece in self.table.items() if piece[:1] in (b" ", b"\t", b"\n", b"\r"))
        return sorted(self.special.union(found))


def difference(one: bytes, this: str, other: bytes, that: str) -> str:
    """Where two texts begin to differ, and what each has there, in the words given for them."""
    pairs = enumerate(zip(one, other, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    near = slice(max(0, at - 8), at + 8)
    return f"from byte {at} on {this} {one[near]!r}, {that} {other[near]!r}"


def token_bytes(tokenizer: Any) -> TokenBytes:
    """The bytes of the tokens of a byte-level or SentencePiece-like tokenizer.

    Args:
      tokenizer: a transformers PreTrainedTokenizerFast.

    Raises:
      MismatchError: for tokenizers whose tokens stand for no fixed bytes (WordPiece and others).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MismatchError("a tokenizer without tokenizer.json cannot be aligned by bytes")
    described = json.loads(backend.to_str())
    kinds = _kinds(described.get("decoder"))
    spell = speller(described)
    if spell is None:
        found = ", ".join(sorted(kinds)) or "no decoder"
        raise MismatchError(
            f"tokenizer ({described['model'].get('type')}, {found}): its tokens stand for no fixed "
            "bytes: byte-level and SentencePiece-like tokenizers can be aligned"
        )
    added = {one["id"]: one for one in described["added_tokens"]}
    table = {
        index: token.encode() if index in added and not is_byte(token) else spell(token)
        for token, index in tokenizer.get_vocab().items()
    }
    special = frozenset(i for i, one in added.items() if one["special"])
    return TokenBytes(table, special, "ByteLevel" not in kinds and _has_dummy_prefix(described))


def speller(described: Mapping[str, Any]) -> Callable[[str], bytes] | None:
    """Token -> its bytes, by the decoder of a tokenizer.json; None where they are not fixed."""
    kinds = _kinds(described.get("decoder"))
    if "ByteLevel" in kinds:
        return _byte_level
    return _sentence_piece if kinds & {"Metaspace", "Replace", "ByteFallback"} else None


def is_byte(token: str) -> bool:
    """Whether a token is SentencePiece's spelling of a single byte, such as <0x0A>."""
    return bool(_HEX.match(token))


def _kinds(part: Any) -> set[str]:
    """The types of a decoder, normalizer or pre-tokenizer and of what it is made of."""
    if not isinstance(part, dict):
        return set()
    inner = part.get("decoders") or part.get("normalizers") or part.get("pretokenizers") or []
    return {part["type"]}.union(*map(_kinds, inner))


def _has_dummy_prefix(described: dict[str, Any]) -> bool:
    """Whether a space is put before the text: by a normalizer, or by Metaspace."""
    if "Prepend" in _kinds(described.get("normalizer")):
        return True
    parts = described.get("pre_tokenizer")
    inner = [parts, *(parts or {}).get("pretokenizers", [])]
    return any(
        part and part["type"] == "Metaspace" and part.get("prepend_scheme") != "never"
        for part in inner
    )


@functools.cache
def _alphabet() -> dict[str, int]:
    """The letter by which byte-level tokenizers write each byte: printable ones stand for
    themselves, the others follow from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    alphabet = _alphabet()
    if all(letter in alphabet for letter in token):
        return bytes(alphabet[letter] for letter in token)
    return token.encode()


def _sentence_piece(token: str) -> bytes:
    byte = _HEX.match(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
