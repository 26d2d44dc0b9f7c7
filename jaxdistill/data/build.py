"""Builds the rows of a data set out of its shards: take, pack, list what is left out, seal."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data import packing, pairs, quarantine, store
from jaxdistill.data.codec import Codec
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.records import PAIRS
from jaxdistill.data.routes import TeacherRoutes
from jaxdistill.data.rules import printable
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.settings import Settings
from jaxdistill.data.shards import Shard
from jaxdistill.data.taking import Taken, take
from jaxdistill.data.tally import Tally
from jaxdistill.errors import DataError
from jaxdistill.types import ORIGINS

# Why records are left out, by the name of the count; what is said of those that are no fault.
LEFT_OUT = {
    quarantine.BROKEN: "",
    "empty": "are empty and were skipped",
    "too_long": "have nothing to learn within seq_len and were left out: raise seq_len",
    "unlearned": "are marked as not learned and were left out",
    "unaligned": "have no tokens behind the first that both tokenizers end together and were left "
    "out",
    "without_context": "hold nothing for the teacher's prompt (teacher.self.context) and were left "
    "out",
}


def build(
    folder: Path,
    shards: Sequence[Shard],
    codec: Codec,
    settings: Settings,
    identity: str,
    *,
    kind: str | None,
    fail_fast: bool,
    name: str,
    quarantine_path: Path | None,
    second: SecondView | PrivilegedView | None = None,
    routing: TeacherRoutes | None = None,
) -> None:
    """Builds and seals the folder of a data set whose shards are there.

    Raises:
      DataError: if no record is usable, one is for no teacher of several, or, with fail_fast, at
        the first broken one.
      StorageError: if the folder cannot be written.
    """
    taken = [take(shard, settings, second, routing) for shard in shards]
    names = [source.name for shard in shards for source in shard.sources]
    entries = lambda: itertools.chain(*(one.entries(settings.seq_len) for one in taken))
    if fail_fast:
        for entry in entries():
            quarantine.stop_at({"file": names[entry["source"]], **entry})
    with store.new_folder(folder, resumes=False) as temporary:
        with store.writing(temporary), (temporary / store.QUARANTINE).open("w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries())
        counts = _counts(taken, settings.seq_len)
        if not counts["num_documents"]:
            quarantine.export(temporary, names, quarantine_path)
            reasons = quarantine.first_reasons(temporary, names)
            raise DataError(_nothing_usable(name, counts, reasons))
        assert kind is not None, "there is a record"
        rows, teachers = _write(temporary, taken, settings, kind, second, routing)
        facts: dict[str, Any] = {
            "fingerprint": identity,
            "kind": kind,
            "seq_len": settings.seq_len,
            "pad": codec.pad,
            "shards": [shard.folder.name for shard in shards],
            "counts": {"num_rows": rows, **counts},
            "notices": _notices(taken, codec, settings, counts, second),
            "origins": _origins(taken),
        }
        if second is not None:
            facts["second"] = {"seq_len": second.seq_len, "pad": second.codec.pad}
        if routing is not None:
            facts["teachers"] = teachers
        store.seal(temporary, facts)


def _nothing_usable(name: str, counts: Mapping[str, int], reasons: list[str]) -> str:
    if not counts["records"]:
        return f"data.{name}: the data set is empty: its files hold no record"
    return (
        f"data.{name}: none of the {counts['records']} records can be used, there is nothing to "
        f"learn from: {'; '.join(reasons)}"
    )


def _counts(taken: Sequence[Taken], seq_len: int) -> dict[str, int]:
    """The counts of `Dataset`, but for its rows."""
    total = lambda name: sum(one.counts[name] for one in taken)
    left_out = sum((one.left_out(seq_len) for one in taken), Counter())
    records = sum(one.facts["records"] for one in taken)
    return {
        "num_tokens": total("tokens"),
        "num_loss_tokens": total("loss_tokens"),
        "num_documents": total("documents"),
        "records": records,
        "used": records - left_out.total(),
        **{why: left_out[why] for why in LEFT_OUT},
        "truncated": total("truncated"),
    }


def _bases(taken: Sequence[Taken]) -> Iterator[tuple[Taken, np.ndarray]]:
    """Each with int64 [views], the tokens of the shards before it."""
    base = np.zeros(len(taken[0].sizes), np.int64)
    for one in taken:
        yield one, base
        base = base + one.sizes


def _origins(taken: Sequence[Taken]) -> list[tuple[int, int]]:
    """(first token, who wrote it) of every source."""
    return [
        (int(base[0]) + before[2], ORIGINS.index(source.origin))
        for one, base in _bases(taken)
        for before, source in zip(one.facts["begun"], one.shard.sources, strict=True)
    ]


def _write(
    folder: Path,
    taken: Sequence[Taken],
    settings: Settings,
    kind: str,
    second: SecondView | PrivilegedView | None,
    routing: TeacherRoutes | None,
) -> tuple[int, list[tuple[str, int, int]]]:
    """Packs, writes the arrays, and returns how many rows there are, and of several teachers the
    (name, rows, tokens) of each.
    """
    placed = [
        one.pieces + np.stack([base, np.zeros_like(base)], axis=1).reshape(-1)
        for one, base in _bases(taken)
    ]
    pieces, routes = np.concatenate(placed), np.concatenate([one.routes for one in taken])
    capacity = [settings.seq_len] + ([] if second is None else [second.seq_len])
    segments, rows, of_rows, teachers = _packed(pieces, routes, capacity, settings, routing)
    if kind in PAIRS:
        segments, rows = pairs.apart(segments, rows, _firsts(taken))
    written = {
        "segments": segments[:, :2],
        "rows": rows,
        "records": np.concatenate([one.hashes for one in taken]),
    }
    written |= {} if second is None else {"second_segments": segments[:, 2:]}
    written |= {} if routing is None else {"row_routes": of_rows}
    specs = store.ROWS | store.SECOND_ROWS | store.ROUTES
    for name, values in written.items():
        store.write_array(folder, name, specs[name], values)
    return len(rows) - 1, teachers


def _firsts(taken: Sequence[Taken]) -> np.ndarray:
    """int64 [D + 1], where each document of all shards begins."""
    starts = [one.ends[:-1] + base[0] for one, base in _bases(taken)]
    return np.concatenate([*starts, [sum(one.sizes[0] for one in taken)]])


def _packed(
    pieces: np.ndarray,
    route_S: np.ndarray,
    capacity: list[int],
    settings: Settings,
    routing: TeacherRoutes | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[str, int, int]]]:
    """Segments and rows as `packing.plan`; of several teachers those of one behind the other.

    Returns:
      Segments, rows, and where there are several teachers int32 [R], the one of each row, and
      their (name, rows, tokens).
    """
    if routing is None:
        return *packing.plan(pieces, capacity, settings.packing), route_S[:0], []
    segments, rows, routes = [pieces[:0]], [np.zeros(1, np.int64)], []
    teachers = []
    for route, name in enumerate(routing.names, start=1):
        own, ends = pieces[route_S == route], np.zeros(1, np.int64)
        if len(own):
            own, ends = packing.plan(own, capacity, settings.packing)
        rows.append(ends[1:] + sum(map(len, segments)))
        segments.append(own)
        routes.append(np.full(len(ends) - 1, route, np.int32))
        teachers.append((name, len(ends) - 1, int(own[:, 1].sum())))
    return np.concatenate(segments), np.concatenate(rows), np.concatenate(routes), teachers


def _notices(
    taken: Sequence[Taken],
    codec: Codec,
    settings: Settings,
    counts: Mapping[str, int],
    second: SecondView | PrivilegedView | None,
) -> list[str]:
    """What the user should know about the result."""
    notes = []
    if codec.end is None:
        notes.append("the tokenizer has no end-of-text token: documents end without one")
    if counts["truncated"]:
        notes.append(
            f"{counts['truncated']} of {counts['num_documents']} documents were longer than "
            f"seq_len {settings.seq_len} and were cut there: raise seq_len to keep them whole"
        )
    for why, words in LEFT_OUT.items():
        if words and counts[why]:
            notes.append(f"{counts[why]} of {counts['records']} records {words}")
    tally = Tally()
    for one in taken:
        tally.add(one.tally)
    notes += tally.of_contexts(counts["used"])
    unread = sorted(
        frozenset().union(*(one.unread for one in taken)).difference(getattr(second, "fields", ()))
    )
    if unread:
        names = ", ".join(f"`{printable(name)[:40]}`" for name in unread[:8])
        more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
        notes.append(f"fields that are not read: {names}{more}")
    notes += tally.of_texts()
    notes += [note for one in taken for source in one.shard.sources for note in source.notes]
    return [*notes, *tally.of_conversations()]
