"""Which texts are kept: lengths, language, and what was there before, exactly or nearly."""

import importlib
import re
import unicodedata
from typing import Any

from jaxdistill.errors import ConfigError

_PIECE = 5  # characters
_PERMUTATIONS = 128


class Sieve:
    """Takes texts one by one and says why one is dropped.

    Near duplicates are found by MinHash and locality-sensitive hashing, and compared exactly: two
    texts are one where their sets of 5-character pieces have a Jaccard similarity of `near`.

    Args:
      min_characters, max_characters: bounds on the length.
      language: the code of the only language that is kept; None: all.
      near: the similarity from which on two texts are one; None: only equal ones.

    Raises:
      ConfigError: if a library is missing.

    Reference: Broder 1997, On the resemblance and containment of documents.
    """

    def __init__(
        self,
        *,
        min_characters: int = 1,
        max_characters: int = 10**7,
        language: str | None = None,
        near: float | None = None,
    ):
        self._bounds, self._language, self._near = (min_characters, max_characters), language, near
        self._seen: set[str] = set()
        self._pieces: list[set[str]] = []
        self._classify = _library("py3langid.langid", "language").classify if language else None
        self._datasketch = _library("datasketch", "near") if near else None
        if self._datasketch is not None:
            # A lower threshold: what it misses would never be compared.
            threshold = max(0.1, (near or 0.0) - 0.2)
            self._index: Any = self._datasketch.MinHashLSH(threshold, num_perm=_PERMUTATIONS)

    def problem(self, text: str) -> str | None:
        """Why a text is not taken, or None."""
        size = len(text.strip())
        if not size:
            return "empty"
        if size < self._bounds[0]:
            return "too short"
        if size > self._bounds[1]:
            return "too long"
        if self._classify is not None and self._classify(text)[0] != self._language:
            return "another language"
        return None

    def add(self, text: str) -> str | None:
        """Remembers a text; why it is a duplicate, or None."""
        plain = _plain(text)
        if plain in self._seen:
            return "duplicate"
        pieces = {plain[i : i + _PIECE] for i in range(max(1, len(plain) - _PIECE + 1))}
        if self._datasketch is not None:
            made = self._datasketch.MinHash(num_perm=_PERMUTATIONS, seed=1)
            made.update_batch([piece.encode("utf-8") for piece in sorted(pieces)])
            for key in self._index.query(made):
                other = self._pieces[key]
                if len(pieces & other) >= (self._near or 1.0) * len(pieces | other):
                    return "near duplicate"
            self._index.insert(len(self._pieces), made)
            self._pieces.append(pieces)
        self._seen.add(plain)
        return None


def _plain(text: str) -> str:
    """A text without case, punctuation and the kind of its spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded


def _library(module: str, field: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise ConfigError(
            f"augment.{field}: needs {name}: pip install 'jaxdistill[augment]', or set "
            f"augment.{field}: null"
        ) from None
