"""Pairs of answers to one prompt: encoded one by one, whole or left out, side by side in a row."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdistill.data.encode import Document, Documents
from jaxdistill.data.records import Record
from jaxdistill.data.rules import TooLong
from jaxdistill.data.settings import Settings
from jaxdistill.errors import ConfigError

EncodeRecords = Callable[[Sequence[Record]], list[Any]]


def check(settings: Settings) -> None:
    """Refuses settings that would compare parts of answers.

    Raises:
      ConfigError: naming the setting.
    """
    if settings.long_documents in ("split", "truncate"):
        raise ConfigError(
            f"data.long_documents: {settings.long_documents!r} would compare parts of answers: "
            "pairs are whole or left out: use auto or reject"
        )
    if settings.turns == "each":
        raise ConfigError("data.turns: 'each' would compare single turns: remove it")


def of_both(encoder: EncodeRecords) -> EncodeRecords:
    """Encodes both answers of every pair; why one cannot be used is why the pair cannot."""

    def encode_pairs(records: Sequence[Record]) -> list[Documents]:
        made = encoder([answer for record in records for answer in record.answers])
        joined: list[Documents] = []
        for first, second in zip(made[::2], made[1::2], strict=True):
            reason = next((one for one in (first, second) if isinstance(one, str)), None)
            joined.append((*first, *second) if reason is None else reason)
        return joined

    return encode_pairs


def problem(documents: Sequence[Document], seq_len: int) -> str | None:
    """Why two documents cannot stand in one row, or None."""
    size = sum(len(one.ids) for one in documents)
    if size > seq_len:
        return TooLong(f"too long: the pair has {size} tokens, seq_len is {seq_len}")
    return None


def apart(
    pieces: np.ndarray, rows: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces that are two documents each, as two pieces side by side.

    Args:
      pieces: int64 [S, 2], start and length, from `packing.plan`.
      rows: int64 [R + 1], from `packing.plan`.
      offsets: int64 [D + 1] of the documents, D even; documents 2 n and 2 n + 1 are one piece.

    Returns:
      int64 [2 S, 2] and int64 [R + 1].
    """
    start_S, size_S = pieces.T
    middle_S = offsets[np.searchsorted(offsets, start_S) + 1]
    starts = np.stack([start_S, middle_S], axis=1)
    lengths = np.stack([middle_S - start_S, start_S + size_S - middle_S], axis=1)
    return np.stack([starts.ravel(), lengths.ravel()], axis=1), 2 * rows
