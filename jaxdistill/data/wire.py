"""Records and documents as bytes, on their way to a process that tokenises and back."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.data import rules
from jaxdistill.data.conversations import Conversation
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
      counts: documents of each record, of which something can be learned.
      reasons: why a record has none, by its place.
      hashes: uint64 [records], what each says, see `record_hash`.
      arrays: of all documents, one after the other, by the names in `store`: `tokens` int32 [N],
        `loss` bool [N], or [0] where all of them count, `sizes` int64 [D]; and of a second view
        `groups`, `second_tokens`, `second_groups`, `second_sizes` and `shortened`.
      tally: what was counted meanwhile.
    """

    counts: list[int]
    reasons: dict[int, str]
    hashes: np.ndarray
    arrays: dict[str, np.ndarray]
    tally: Tally


def nothing() -> Made:
    """What becomes of no records."""
    return Made([], {}, np.zeros(0, np.uint64), {}, Tally())


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
    facts = {
        "counts": made.counts,
        "reasons": [[place, type(one).__name__, one] for place, one in made.reasons.items()],
        "arrays": {name: array.dtype.str for name, array in made.arrays.items()},
        "tally": made.tally.to_json(),
    }
    parts = (made.hashes, *made.arrays.values())
    return packed(facts, *(part.tobytes() for part in parts))


def made_of(message: bytes) -> Made:
    """What `of_made` was given."""
    facts, (hashes, *parts) = unpacked(message)
    arrays = {
        name: np.frombuffer(part, dtype)
        for (name, dtype), part in zip(facts["arrays"].items(), parts, strict=True)
    }
    reasons = {place: _REASONS.get(kind, str)(words) for place, kind, words in facts["reasons"]}
    tally = Tally.from_json(facts["tally"])
    return Made(facts["counts"], reasons, np.frombuffer(hashes, np.uint64), arrays, tally)
