"""Whether data hold tokens that a model does not know: counted, and refused with the numbers."""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from jaxdistill.data.dataset import Dataset
from jaxdistill.data.vocabularies import Pair, Vocabulary, named
from jaxdistill.errors import MismatchError

_BLOCK = 1 << 20  # tokens that are counted at a time


def occurrences(dataset: Dataset, ids: Collection[int], size: int) -> np.ndarray:
    """How often each of some tokens stands in the rows: int64 [size], 0 for other ids."""
    wanted = np.zeros(size, bool)
    wanted[list(ids)] = True
    counts = np.zeros(size, np.int64)
    tokens, segments = dataset.arrays["tokens"], np.asarray(dataset.arrays["segments"][:])
    starts = np.sort(segments[:, 0])
    ends = np.sort(segments.sum(axis=1))
    for first in range(0, len(tokens), _BLOCK):
        here = np.asarray(tokens[first : first + _BLOCK])
        # How many segments hold each token: those that begin at it or before, less those that end.
        places = np.arange(first, first + len(here))
        times = np.searchsorted(starts, places, "right") - np.searchsorted(ends, places, "right")
        counts += np.bincount(here, times, minlength=size)[:size].astype(np.int64)
    return np.where(wanted, counts, 0)


def errors(
    who: str,
    pair: Pair,
    ours: Vocabulary,
    ids: Collection[int],
    data: Mapping[str, Dataset],
    remedy: str,
) -> Iterator[MismatchError]:
    """What of the data a model cannot take for what it is.

    Args:
      who: the model, for the message.
      pair: of the run's vocabulary and the model's.
      ours: the run's.
      ids: the run's tokens that are none of the model's.
      data: what is trained on and measured on, cut by the run's tokenizer.
      remedy: what can be done.
    """
    if not ids:
        return
    for name, dataset in data.items():
        counts = occurrences(dataset, ids, ours.size)
        total = int(counts.sum())
        if total:
            most = tuple(int(i) for i in np.argsort(-counts, kind="stable") if counts[i])
            yield MismatchError(
                f"{who}: {total} of {dataset.num_tokens} tokens of data.{name} "
                f"({total / dataset.num_tokens:.2%}) are none of its vocabulary: "
                f"{named(ours, most)}. The vocabularies are {pair}. {remedy}"
            )
