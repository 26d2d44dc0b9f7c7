"""Records and documents as bytes, on their way to a process that tokenises and back."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.data import rules
from jaxdistill.data.conversations import Conversation
from jaxdistill.data.encode import Beside, Document
from jaxdistill.data.records import Record
from jaxdistill.data.tally import Tally

_BETWEEN = "\0"  # which no text of a record holds
_REASONS = {
    reason.__name__: reason
    for reason in (
        rules.Empty,
        rules.Unlearned,
        rules.TooLong,
        rules.Unaligned,
        rules.WithoutContext,
        str,
    )
}


class Made(NamedTuple):
    """What becomes of a batch of records.

    Attributes:
      documents: of each record, or the reason why there are none.
      hashes: uint64 [records], what each says, see `record_hash`.
      tally: what was counted meanwhile.
    """

    documents: list[tuple[Document, ...] | str]
    hashes: np.ndarray
    tally: Tally


def packed(header: Any, *parts: bytes) -> bytes:
    """JSON, and parts of bytes behind it."""
    text = json.dumps([header, [len(part) for part in parts]]).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def unpacked(message: bytes) -> tuple[Any, list[memoryview]]:
    """What `packed` was given."""
    start = 8 + int.from_bytes(message[:8], "little")
    header, sizes = json.loads(message[8:start])
    view, parts = memoryview(message), []
    for size in sizes:
        parts.append(view[start : start + size])
        start += size
    return header, parts


def of_records(records: Sequence[Record]) -> bytes:
    """Records as a message for `records_of`."""
    texts: list[str] = []
    facts = [_facts(record, texts) for record in records]
    return packed(facts, _BETWEEN.join(texts).encode())


def _facts(record: Record, texts: list[str]) -> dict[str, Any]:
    """What a record is beside its texts, as JSON without what is usual; its texts join the list."""
    texts += record.texts
    facts: dict[str, Any] = {"kind": record.kind, "line": record.line, "texts": len(record.texts)}
    if record.roles:
        facts["roles"] = record.roles
    if not (record.opens and record.closes):
        facts |= {"opens": record.opens, "closes": record.closes}
    if record.conversation is not None:
        facts["conversation"] = vars(record.conversation)
    if record.notes:
        facts["notes"] = dict(record.notes)
    if record.answers:
        facts["answers"] = [_facts(answer, texts) for answer in record.answers]
    return facts


def records_of(message: bytes) -> list[Record]:
    """The records of a message of `of_records`."""
    facts, (blob,) = unpacked(message)
    texts = iter(str(blob, "utf-8").split(_BETWEEN))
    return [_record(one, texts) for one in facts]


def _record(facts: dict[str, Any], texts: Iterator[str]) -> Record:
    own = tuple(next(texts) for _ in range(facts["texts"]))
    more = facts.get("conversation")
    if more is not None:
        fields, marks, tools = (tuple(more[name]) for name in ("fields", "marks", "tools"))
        more = Conversation(fields, marks, tools, more["variables"], more["prompt"])
    return Record(
        facts["kind"],
        own,
        facts["line"],
        tuple(facts.get("roles", ())),
        facts.get("opens", True),
        facts.get("closes", True),
        more,
        facts.get("notes", {}),
        tuple(_record(answer, texts) for answer in facts.get("answers", ())),
    )


def of_made(made: Made) -> bytes:
    """What became of records, as a message for `made_of`."""
    outcomes = [
        [type(one).__name__, one] if isinstance(one, str) else len(one) for one in made.documents
    ]
    flat = [document for one in made.documents if not isinstance(one, str) for document in one]
    facts = {
        "outcomes": outcomes,
        "sizes": [len(one.ids) for one in flat],
        "shortened": [place for place, one in enumerate(flat) if one.shortened],
        "tally": made.tally.to_json(),
    }
    loss = _all([one.loss for one in flat], bool)
    parts = [made.hashes, _all([one.ids for one in flat], np.int32)]
    parts.append(loss[:0] if loss.all() else loss)
    both = [one.beside for one in flat if one.beside is not None]
    if both:
        assert len(both) == len(flat), "all documents have a second view, or none"
        facts["others"] = [len(one.ids) for one in both]
        parts += [
            _all([getattr(one, name) for one in both], np.int32)
            for name in ("groups", "ids", "other_groups")
        ]
    return packed(facts, *(part.tobytes() for part in parts))


def _all(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)


def made_of(message: bytes) -> Made:
    """What `of_made` was given."""
    facts, (hashes, ids, loss, *both) = unpacked(message)
    sizes, others = facts["sizes"], facts.get("others")
    counted = np.frombuffer(loss, bool) if len(loss) else np.ones(sum(sizes), bool)
    cut = [_cut(np.frombuffer(ids, np.int32), sizes), _cut(counted, sizes)]
    flat = [Document(*one) for one in zip(*cut, strict=True)]
    for place in facts["shortened"]:
        flat[place] = dataclasses.replace(flat[place], shortened=True)
    if others is not None:
        parts = zip(both, (sizes, others, others), strict=True)
        views = zip(*(_cut(np.frombuffer(part, np.int32), own) for part, own in parts), strict=True)
        pairs = zip(flat, views, strict=True)
        flat = [dataclasses.replace(one, beside=Beside(*view)) for one, view in pairs]
    rest = iter(flat)
    documents: list[tuple[Document, ...] | str] = [
        tuple(next(rest) for _ in range(one))
        if isinstance(one, int)
        else _REASONS.get(one[0], str)(one[1])
        for one in facts["outcomes"]
    ]
    tally = Tally.from_json(facts["tally"])
    return Made(documents, np.frombuffer(hashes, np.uint64), tally)


def _cut(array: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """An array in pieces of such sizes."""
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    return [array[end - size : end] for end, size in zip(ends, sizes, strict=True)]
