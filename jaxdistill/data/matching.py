"""Groups of tokens by which two documents of one record spell the same, what a template adds apart.

student   [INST] hi [/INST] ▁un|believ|able|▁ </s>      a space before an answer, and one behind it
teacher   <user> hi <assistant> unbel|iev|able <end>    groups 1 1 2 3
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdistill.data import alignment
from jaxdistill.data.chat import ChatEncoder
from jaxdistill.data.codec import Codec
from jaxdistill.data.encode import Document
from jaxdistill.data.records import Record
from jaxdistill.data.token_bytes import TokenBytes, difference, token_bytes
from jaxdistill.errors import MismatchError

TokenRun = tuple[int, int]  # first token, and the one behind the last
# Part of fingerprints: raise it when the same documents would be matched otherwise.
VERSION = 2
_LETTER = b"x"  # an answer by which a template shows what it puts around answers


class Around(NamedTuple):
    """What a chat template puts around every answer, as part of what the assistant says.

    Attributes:
      lead: bytes before it, such as a space.
      tail: bytes behind it.
      end: the special token that ends it, or None.
    """

    lead: bytes = b""
    tail: bytes = b""
    end: int | None = None


def around(encoder: ChatEncoder, table: TokenBytes) -> Around | str:
    """What a template puts around an answer of one letter, or why it does not print one.

    Args:
      encoder: of the conversations, that learns what the assistant says.
      table: the bytes of the tokens.
    """
    counted = encoder.tally.taken()  # this conversation is none of the data's
    shown = Record("messages", ("a", _LETTER.decode()), 1, ("user", "assistant"))
    (document,) = encoder.encode([shown])
    encoder.tally.taken()
    encoder.tally.add(counted)
    if isinstance(document, str):
        return document
    ids = document.ids[document.loss].tolist()
    pieces = table.pieces(ids)
    lead, found, tail = b"".join(pieces).partition(_LETTER)
    end = _end(pieces)
    if not found:
        return "chat template: does not print an answer of one letter"
    return Around(lead, tail, None if end is None else ids[end])


def bytes_of(who: str, codec: Codec) -> TokenBytes:
    """The bytes of a tokenizer's tokens, all of its special ones without.

    Raises:
      MismatchError: naming whose they are, if they stand for no fixed bytes.
    """
    try:
        table = token_bytes(codec.tokenizer)
    except MismatchError as error:
        raise MismatchError(f"{who}: {error}") from None
    inert = np.flatnonzero(codec.inert).tolist()
    return dataclasses.replace(table, special=table.special.union(inert))


def matched(
    sides: tuple[Document, Document],
    tables: tuple[TokenBytes, ...],
    text: bytes | None,
    each: tuple[Around, ...] = (Around(), Around()),
) -> np.ndarray:
    """The groups of two documents of one record, those that end an answer among them.

    Args:
      sides: the student's document and the teacher's.
      tables: the bytes of their tokens.
      text: that both must spell; None where only what counts in the loss is compared.
      each: what the student's template, and the teacher's, puts around answers.

    Returns:
      int32 [groups, 4], as `alignment.align` gives them.

    Raises:
      MismatchError: with the first difference, where the two do not spell the same.
    """
    if text is None:
        runs = [_runs(side.loss) for side in sides]
    else:
        runs = [[(0, len(side.ids))] for side in sides]
    if len(runs[0]) != len(runs[1]):
        raise MismatchError(
            f"the student's template shows {len(runs[0])} answers, the teacher's {len(runs[1])}"
        )
    pairs = [np.zeros((0, 4), np.int32)]
    for both in zip(*runs, strict=True):
        ids = [side.ids[a:b].tolist() for side, (a, b) in zip(sides, both, strict=True)]
        ends = [_end(table.pieces(own)) for table, own in zip(tables, ids, strict=True)]
        spelled = _answers(ids, tables, each) if text is None else _texts(ids, tables, text)
        groups = alignment.align(*spelled)
        if None not in ends:
            groups = np.concatenate([groups, np.repeat(np.asarray([ends], np.int32), 2, axis=1)])
        pairs.append(groups + np.repeat([first for first, _ in both], 2).astype(np.int32))
    return np.concatenate(pairs)


def _runs(loss: np.ndarray) -> list[TokenRun]:
    """The stretches of tokens that count."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _texts(
    ids: Sequence[list[int]], tables: tuple[TokenBytes, ...], text: bytes
) -> list[list[bytes]]:
    """The bytes of both sides' tokens, once they spell the text."""
    spelled = []
    for who, table, own in zip(("student", "teacher"), tables, ids, strict=True):
        try:
            spelled.append(table.spell(own, text))
        except MismatchError as error:
            raise MismatchError(f"the {who}'s {error}") from None
    return spelled


def _answers(
    ids: Sequence[list[int]], tables: tuple[TokenBytes, ...], each: tuple[Around, ...]
) -> list[list[bytes]]:
    """The bytes of both sides' tokens of an answer, once it is the same on both."""
    pieces = [table.pieces(own) for table, own in zip(tables, ids, strict=True)]
    parts = [_bare(one, own) for one, own in zip(pieces, each, strict=True)]
    (ours, text), (theirs, other) = parts
    if tables[0].dummy_prefix and text == b" " + other:
        ours, text = _without(ours, 1), other
    elif tables[1].dummy_prefix and other == b" " + text:
        theirs, other = _without(theirs, 1), text
    if text != other:
        raise MismatchError(
            "the two templates print other answers: "
            + difference(text, "the student's has", other, "the teacher's")
        )
    return [ours, theirs]


def _bare(pieces: list[bytes], own: Around) -> tuple[list[bytes], bytes]:
    """(the bytes of an answer's tokens, the answer), without what its template put around it.

    Tokens keep what is put behind the answer: one that spells it ends where no other does.
    """
    whole = b"".join(pieces)
    first = len(own.lead) if whole.startswith(own.lead) else 0
    left = len(own.tail) if whole[first:].endswith(own.tail) else 0
    return _without(pieces, first), whole[first : len(whole) - left]


def _without(pieces: list[bytes], count: int) -> list[bytes]:
    """Tokens without the first bytes that they spell."""
    cut = []
    for piece in pieces:
        cut.append(piece[count:])
        count -= min(count, len(piece))
    return cut


def _end(pieces: list[bytes]) -> int | None:
    """The special token behind the last one that spells something; None where there is none."""
    behind = 1 + max((i for i, piece in enumerate(pieces) if piece), default=-1)
    return behind if behind < len(pieces) else None
