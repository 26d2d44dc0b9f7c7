"""Segments: the pieces of text that a teacher sees as wholes, and the key that each is found by."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxdistill.data.alignment import places
from jaxdistill.data.dataset import Dataset

KEY_BYTES = 16
SegmentKey = bytes


class Segment(NamedTuple):
    """A document, or a window of one, in a row of a data set.

    Attributes:
      number: of the segment in the data set.
      place: its first position in the row.
      tokens: int32 [N].
      mask: bool [N], True where the prediction counts; the last position predicts nothing. Of a
        teacher's own tokens, see `second_view.second_rows`: where it is read, `alignment.places`.
    """

    number: int
    place: int
    tokens: np.ndarray
    mask: np.ndarray

    @property
    def key(self) -> SegmentKey:
        """The hash of what decides the teacher's answer: tokens and positions, here from 0."""
        return key_of(self.tokens, np.arange(len(self.tokens)))


def key_of(tokens: np.ndarray, positions: np.ndarray) -> SegmentKey:
    """BLAKE2b, 16 bytes, over tokens and positions."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(tokens, "<i4").tobytes())
    digest.update(np.ascontiguousarray(positions, "<i4").tobytes())
    return digest.digest()


def of_row(dataset: Dataset, row: int) -> Iterator[Segment]:
    """The segments of a row, as they lie in it."""
    arrays = dataset.arrays
    first, last = arrays["rows"][row : row + 2]
    place = 0
    for number in range(int(first), int(last)):
        start, length = map(int, arrays["segments"][number : number + 1][0])
        if "aligned" in arrays:
            mask = places(arrays["aligned"][start : start + length])
        else:
            mask = np.zeros(length, bool)
            mask[:-1] = arrays["loss"][start + 1 : start + length]
        yield Segment(number, place, np.asarray(arrays["tokens"][start : start + length]), mask)
        place += length


def of(dataset: Dataset) -> Iterator[tuple[int, Segment]]:
    """(row, segment) of every segment, in order."""
    for row in range(dataset.num_rows):
        for segment in of_row(dataset, row):
            yield row, segment
