"""Held-out records: chosen by their content, and compared with what is trained on."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxdistill.data import stretches
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.record_hash import fingerprint_of, seen
from jaxdistill.data.records import Record
from jaxdistill.data.sources import RecordStream, Source
from jaxdistill.errors import DataError

_log = logging.getLogger(__name__)

# More held-out records than this share in the training data too, and the numbers mean nothing.
MAX_SHARED = 0.1
# Of the held-out text, the shares that may be trained on unsaid (two halves of the documentation of
# Python share 3 %), and at all.
QUOTED, MAX_SHARED_TEXT = 0.05, 0.5


def split(sources: Sequence[Source], fraction: float) -> tuple[list[Source], list[Source]]:
    """(what is trained on, what is held out) of sources.

    Raises:
      DataError: if one of the two would hold no record.
    """
    _check_fraction(sources, fraction)
    return (
        [part(source, fraction, held_out=False) for source in sources],
        [part(source, fraction, held_out=True) for source in sources],
    )


def part(source: Source, fraction: float, held_out: bool) -> Source:
    """The records of a source that are held out, or the others.

    The hash of a record alone decides: it stays on its side when other files are added.

    Args:
      source: the whole.
      fraction: about how many are held out.
      held_out: which of the two.
    """
    limit = int(fraction * 2**64)

    def read() -> RecordStream:
        for item in source:
            # What cannot be read counts once, on the side of the training data.
            theirs = isinstance(item, Record) and fingerprint_of(item) < limit
            if theirs is held_out:
                yield item

    def digest() -> str:
        side = "held out" if held_out else "trained on"
        return hashlib.sha256(f"{source.digest()} {fraction!r} {side}".encode()).hexdigest()

    parts = tuple(part(one, fraction, held_out) for one in source.parts)
    return dataclasses.replace(source, read=read, digest=digest, parts=parts, weight=(
        1.0 if held_out else source.weight))  # fmt: skip


def _check_fraction(sources: Sequence[Source], fraction: float) -> None:
    """Refuses a fraction that leaves one side without a record.

    Raises:
      DataError: with the numbers.
    """
    total = held = 0
    limit = int(fraction * 2**64)
    for source in sources:
        for item in source:
            if isinstance(item, Record):
                total += 1
                held += fingerprint_of(item) < limit
            if 0 < held < total:
                return
    side = "none" if not held else "all"
    if total:
        raise DataError(
            f"data.eval.fraction: {fraction:g} holds out {side} of the {total} records: "
            f"{'raise' if not held else 'lower'} it, or name files under data.eval"
        )


def check(train: Dataset, held_out: Dataset) -> None:
    """Compares the records of the two; warns of those that are in both.

    Raises:
      DataError: if more than MAX_SHARED of the held-out records are trained on.
    """
    theirs = held_out.arrays["records"][:]
    shared = int(np.isin(theirs, train.arrays["records"][:]).sum())
    _judge(shared, len(theirs), "records", "data.train")


def check_stretches(
    train: Dataset, held_out: Dataset, tokenizer: Any, refuses: bool = True
) -> None:
    """Compares what the two say, however it is cut into records; warns of what is in both.

    Args:
      train: what is trained on.
      held_out: what is not.
      tokenizer: of both.
      refuses: whether too much of it is an error, and no warning.

    Raises:
      DataError: if more than MAX_SHARED_TEXT of the held-out stretches of tokens are trained on.
    """
    shared, total = stretches.shared(train, held_out, tokenizer)
    if shared <= QUOTED * total:
        return
    told = (
        f"data.eval: {shared / total:.0%} of its text is in data.train too, cut into other records "
        f"({shared} of {total} stretches of {stretches.length(tokenizer)} learned tokens)"
    )
    if refuses and shared > MAX_SHARED_TEXT * total:
        raise DataError(
            f"{told}: held-out data must not be trained on: take it out of one of the two, or let "
            "data.eval: {fraction: 0.01} choose"
        )
    _log.warning("%s", told)


def check_prompts(
    prompts: Iterable[Source], held_out: Iterable[Source], name: str = "data.eval"
) -> None:
    """Compares what is asked in the two; warns of questions that are in both.

    Args:
      prompts: that are trained on.
      held_out: that are not.
      name: the key of the latter.

    Raises:
      DataError: if more than MAX_SHARED of the held-out questions are among the prompts.
    """
    asked = {_asked(record) for source in prompts for record in _good(source)}
    theirs = [_asked(record) for source in held_out for record in _good(source)]
    theirs = [one for one in theirs if one is not None]
    _judge(sum(one in asked for one in theirs), len(theirs), "questions", "data.prompts", name)


def _good(source: Source) -> Iterator[Record]:
    return (item for item in source if isinstance(item, Record))


def _asked(record: Record) -> bytes | None:
    """A hash of what stands before the answer; None of a text, which asks nothing."""
    count = len(record.roles)
    while count and record.roles[count - 1] == "assistant":
        count -= 1
    if not record.roles:
        count = 0 if record.kind == "text" else 1
    said = seen("".join(record.texts[:count]))
    return hashlib.blake2b(said.encode(), digest_size=8).digest() if said else None


def _judge(shared: int, total: int, what: str, where: str, name: str = "data.eval") -> None:
    """Refuses or tells what is in both.

    Raises:
      DataError: if it is more than MAX_SHARED of the total.
    """
    if not shared:
        return
    told = (
        f"{name}: {shared} of {total} {what} are in {where} too (blanks, line ends "
        "and the shape of a record do not count)"
    )
    if shared > MAX_SHARED * total:
        choose = ", or let data.eval: {fraction: 0.01} choose" if where == "data.train" else ""
        raise DataError(
            f"{told}: held-out data must not be trained on: take them out of one of the two{choose}"
        )
    _log.warning("%s", told)
