"""Stretches of tokens that two data sets have in common, however their texts are cut into records.

    train       | a b c d e f g h |          the record as it was
    held-out    | a b c d | e f g h |        the same, cut in two

Records differ, and stretches of 32 learned tokens (of 128 bytes) do not. White space is left out
before, so that other line ends change nothing. No stretch goes over the end of a text or a turn:
many short answers, one after the other, are the same in any data of one task.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdistill.data.dataset import Dataset

LENGTH, BYTES = 32, 128  # tokens of words; of bytes, 32 are no more than six words
_BLOCK = 2**20  # tokens
_SAMPLED = 2**17  # of more held-out tokens one stretch in eight is compared
_ODD = 0x9E3779B97F4A7C15
# Space, line feed, carriage return and tab of byte-level tokenizers, the space of SentencePiece.
_BLANK = "\u0120\u010a\u010d\u0109\u2581 \n\r\t"
_BLANK_BYTES = ("<0x20>", "<0x0A>", "<0x0D>", "<0x09>")


def shared(train: Dataset, held_out: Dataset, tokenizer: Any) -> tuple[int, int]:
    """(how many stretches of the held-out data are trained on, how many there are).

    A stretch that comes more than once in the held-out data, such as a licence or the frame of a
    question, is none of a text's own and not counted.
    """
    numbers, ends = _numbers(tokenizer)
    size = length(tokenizer)
    bits = 3 if held_out.num_tokens > _SAMPLED else 0
    theirs = np.concatenate(
        [np.empty(0, np.uint64), *_stretches(held_out, size, numbers, ends, bits)]
    )
    distinct, counts = np.unique(theirs, return_counts=True)
    own = distinct[counts == 1]
    if not len(own):
        return 0, 0
    inside = np.zeros(len(own), bool)
    for block in _stretches(train, size, numbers, ends, bits):
        place = np.minimum(np.searchsorted(own, block), len(own) - 1)
        inside[place[own[place] == block]] = True
    return int(inside.sum()), len(own)


def length(tokenizer: Any) -> int:
    """Tokens of a stretch: more of a tokenizer whose tokens are bytes or letters."""
    return LENGTH if len(tokenizer) >= 1000 else BYTES


def _numbers(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """(by id a random number, one for all tokens that differ in white space, 0 for those that are
    left out; whether the token is a control token, which ends a text or a turn).
    """
    by_id = {id: text for text, id in tokenizer.get_vocab().items()}
    said = {id: text.strip(_BLANK) for id, text in by_id.items() if text not in _BLANK_BYTES}
    texts = sorted({text for text in said.values() if text})
    drawn = np.random.default_rng(0).integers(1, 2**63, len(texts), np.uint64)
    number = dict(zip(texts, drawn, strict=True))
    numbers = np.zeros(max(by_id) + 1, np.uint64)
    for id, text in said.items():
        numbers[id] = number.get(text, 0)
    ends = np.zeros(len(numbers), bool)
    ends[list(tokenizer.all_special_ids)] = True
    return np.where(ends, np.uint64(0), numbers), ends


def _stretches(
    data: Dataset, size: int, numbers: np.ndarray, ends: np.ndarray, bits: int
) -> Iterator[np.ndarray]:
    """Hashes of a data set's stretches: those that begin with `bits` zeros."""
    rest, rest_of, last = np.empty(0, np.uint64), np.empty(0, np.int64), 0
    for start in range(0, len(data.arrays["tokens"]), _BLOCK):
        here = slice(start, start + _BLOCK)
        ids = np.asarray(data.arrays["tokens"][here])
        learned = np.asarray(data.arrays["loss"][here], bool)
        of = last + np.cumsum(ends[ids] | ~learned)  # the text or turn that a token is of
        last = of[-1]
        kept = learned & (numbers[ids] > 0)
        line = np.concatenate([rest, numbers[ids][kept]])
        of = np.concatenate([rest_of, of[kept]])
        keep = max(len(line) - size + 1, 0)
        rest, rest_of = line[keep:], of[keep:]
        hashed, width = line, 1
        while width < size and len(hashed) > width:
            factor = np.uint64(pow(_ODD, width, 2**64))
            hashed, width = hashed[:-width] * factor + hashed[width:], 2 * width
        if width == size:
            hashed = hashed[of[: len(hashed)] == of[size - 1 :]]
            yield hashed if not bits else hashed[hashed >> np.uint64(64 - bits) == 0]
