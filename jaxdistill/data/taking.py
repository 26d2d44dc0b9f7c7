"""What a data set takes of a shard: documents cut for its rows, copied by weight, and routed."""

import collections
import dataclasses
import heapq
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxdistill.data import arrays, cutting, packing, quarantine, store
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.records import PAIRS, TEACHER
from jaxdistill.data.routes import TeacherRoutes
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.settings import Settings
from jaxdistill.data.shards import Shard
from jaxdistill.data.tally import Tally
from jaxdistill.safe import manifest

_LINE, _COUNT, _NAMED = 1, 2, 3  # columns of a shard's records
LeftOut = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Taken:
    """What is taken of a shard.

    Attributes:
      shard: which.
      facts: of its folder.
      sizes: its tokens in each view, taken or not.
      ends: int64 [D + 1], where its documents begin, taken or not.
      pieces: int64 [P, 2 * views], start in the shard and length of what stays together.
      routes: int32 [P], the teacher of each from 1, where there are several.
      hashes: uint64 [K], of the records that are used.
      counts: of documents, tokens, loss_tokens and truncated documents, each copy counted.
      left: int64 [left out here, 4]: source in the shard, line, why, and size.
      unread: names of fields that are not read.
    """

    shard: Shard
    facts: Mapping[str, Any]
    sizes: tuple[int, ...]
    ends: np.ndarray
    pieces: np.ndarray
    routes: np.ndarray
    hashes: np.ndarray
    counts: Mapping[str, int]
    left: np.ndarray
    unread: frozenset[str]

    @property
    def tally(self) -> Tally:
        """What was counted while it was tokenised."""
        return Tally.from_json(self.facts["tally"])

    def left_out(self, seq_len: int) -> collections.Counter[str]:
        """How many records are left out, by reason: when it was tokenised, and here."""
        left_out = collections.Counter(self.facts["left_out"])
        for why, count in zip(*np.unique(self.left[:, 2], return_counts=True), strict=True):
            left_out[quarantine.why(cutting.reason(int(why), 0, seq_len))] += int(count)
        return left_out

    def entries(self, seq_len: int) -> Iterator[LeftOut]:
        """The records that are left out, in order, their sources counted in the data set."""
        place = lambda entry: (entry["source"], entry["line"])
        return heapq.merge(self._before(), self._here(seq_len), key=place)

    def _before(self) -> Iterator[LeftOut]:
        with (self.shard.folder / store.QUARANTINE).open(encoding="utf-8") as file:
            for line in file:
                one = json.loads(line)
                yield one | {"source": one["source"] + self.shard.first}

    def _here(self, seq_len: int) -> Iterator[LeftOut]:
        for source, line, why, size in self.left.tolist():
            entry = quarantine.entry("", line, cutting.reason(why, size, seq_len))
            told = {name: entry[name] for name in ("line", "reason", "broken")}
            yield {"source": source + self.shard.first} | told


def take(
    shard: Shard,
    settings: Settings,
    second: SecondView | PrivilegedView | None,
    routing: TeacherRoutes | None,
) -> Taken:
    """What a data set takes of a shard.

    Raises:
      DataError: for a record that is for no teacher of several.
      DamagedError: if the shard is not as it was written.
    """
    facts = manifest.read(shard.folder)
    specs = store.DOCUMENTS | {"loss": store.TOKENS["loss"]}
    more = {} if second is None else store.SECOND_DOCUMENTS
    columns = arrays.joined([shard.folder], specs | more, specs)
    ends, table = columns["documents"][:], columns["records"][:]
    if facts["kind"] is None:
        return _nothing(shard, facts, second)
    policy, whole = settings.policy(facts["kind"]), facts["kind"] in PAIRS
    cut = cutting.cut(ends, columns["loss"], policy, settings.seq_len)
    source_R = _sources_of(facts["begun"], len(table))
    left_R, left = _judged(cut, ends, table, source_R, whole, settings.seq_len)
    used_R = ~left_R
    times_R = _times(used_R, source_R, [source.weight for source in shard.sources])
    documents = _copied(cut, table, used_R, times_R)
    own_R = np.repeat(np.arange(len(table)), table[:, _COUNT])
    step = 2 if whole else 1  # documents that stay together
    start, length = ends[documents], cut.kept[documents]
    length_P = length.reshape(-1, step).sum(1)
    pieces, of_P = packing.windows(start[::step], length_P, settings.seq_len)
    sizes = [int(ends[-1])]
    shortened = cut.kept < np.diff(ends)
    if second is not None:  # every document is in one piece in both views
        others = columns["second_documents"][:]
        begins, lengths = others[documents], np.diff(others)[documents]
        pieces = np.concatenate([pieces, np.stack([begins, lengths], axis=1)], axis=1)
        sizes.append(int(others[-1]))
        shortened |= columns["shortened"][:]
    route_R = _routed(shard, facts["teachers"], table, used_R, source_R, routing)
    named = bool((table[used_R, _NAMED] > 0).any())
    return Taken(
        shard=shard,
        facts=facts,
        sizes=tuple(sizes),
        ends=ends,
        pieces=pieces,
        routes=route_R[own_R[documents[::step][of_P]]],
        hashes=table[used_R, 0].view(np.uint64),
        counts={
            "documents": len(documents),
            "tokens": int(length.sum()),
            "loss_tokens": int(cut.counted[documents].sum()),
            "truncated": int(shortened[documents].sum()),
        },
        left=left,
        unread=frozenset({*facts["unread"], *([TEACHER] if named and routing is None else [])}),
    )


def _nothing(shard: Shard, facts: Mapping[str, Any], second: Any) -> Taken:
    """What is taken of a shard without a good record."""
    views = 1 if second is None else 2
    return Taken(
        shard=shard,
        facts=facts,
        sizes=(0,) * views,
        ends=np.zeros(1, np.int64),
        pieces=np.zeros((0, 2 * views), np.int64),
        routes=np.zeros(0, np.int32),
        hashes=np.zeros(0, np.uint64),
        counts=dict.fromkeys(("documents", "tokens", "loss_tokens", "truncated"), 0),
        left=np.zeros((0, 4), np.int64),
        unread=frozenset(facts["unread"]),
    )


def _sources_of(begun: list[list[int]], records: int) -> np.ndarray:
    """int64 [R], the source of each record, by how many records were there before each source."""
    edges = [before[0] for before in begun] + [records]
    return np.repeat(np.arange(len(begun)), np.diff(edges))


def _judged(
    cut: cutting.Cut,
    ends: np.ndarray,
    table: np.ndarray,
    source_R: np.ndarray,
    whole: bool,
    seq_len: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(bool [R], which records are left out; `Taken.left`).

    One is left out where nothing of it can be used; of a pair, where one of the two cannot, or both
    do not fit into a row.
    """
    count_R = table[:, _COUNT]
    first_R = np.cumsum(count_R) - count_R
    bad_D, size_D = cut.why != cutting.WHOLE, np.diff(ends)
    bads_R = np.bincount(
        np.repeat(np.arange(len(table)), count_R), bad_D, minlength=len(table)
    ).astype(np.int64)
    # The document whose reason is told: the first, or of a pair the one that cannot be used.
    told_R = np.where(bad_D[first_R] | (not whole), first_R, first_R + 1)
    why_R, size_R = cut.why[told_R].astype(np.int64), size_D[told_R]
    left_R = bads_R > 0 if whole else bads_R == count_R
    if whole:
        both_R = size_D[first_R] + size_D[first_R + 1]
        long_R = ~left_R & (both_R > seq_len)
        why_R, size_R = np.where(long_R, cutting.LONG_PAIR, why_R), np.where(long_R, both_R, size_R)
        left_R |= long_R
    columns = source_R, table[:, _LINE], why_R, size_R
    return left_R, np.stack(columns, axis=1)[left_R].astype(np.int64)


def _times(used_R: np.ndarray, source_R: np.ndarray, weights: list[float]) -> np.ndarray:
    """int64 [R], how often each record is read in an epoch.

    Of n records with weight w, floor(w n) copies: an exact share, by order.
    """
    times_R = np.zeros(len(used_R), np.int64)
    for source, weight in enumerate(weights):
        own = np.flatnonzero(used_R & (source_R == source))
        edges = np.floor(weight * np.arange(len(own) + 1)).astype(np.int64)
        times_R[own] = np.diff(edges)
    return times_R


def _copied(
    cut: cutting.Cut, table: np.ndarray, used_R: np.ndarray, times_R: np.ndarray
) -> np.ndarray:
    """int64, the documents that are taken, record by record, each record as often as it is read."""
    own_D = np.repeat(np.arange(len(table)), table[:, _COUNT])
    taken = np.flatnonzero((cut.why == cutting.WHOLE) & used_R[own_D])
    count_R = np.bincount(own_D[taken], minlength=len(table))
    first_R = np.cumsum(count_R) - count_R
    records = np.repeat(np.arange(len(table)), times_R)
    several = count_R[records]
    within = np.arange(int(several.sum())) - np.repeat(np.cumsum(several) - several, several)
    return taken[np.repeat(first_R[records], several) + within]


def _routed(
    shard: Shard,
    names: list[str],
    table: np.ndarray,
    used_R: np.ndarray,
    source_R: np.ndarray,
    routing: TeacherRoutes | None,
) -> np.ndarray:
    """int32 [R], which of several teachers each record that is used is for; else 0.

    Raises:
      DataError: naming the first record that is for none.
    """
    route_R = np.zeros(len(table), np.int32)
    if routing is None:
        return route_R
    both_R = source_R * (len(names) + 1) + table[:, _NAMED]
    used = np.flatnonzero(used_R)
    _, first, inverse = np.unique(both_R[used], return_index=True, return_inverse=True)
    found = np.zeros(len(first), np.int32)
    for place in np.argsort(first):
        record = used[first[place]]
        source, named = shard.sources[source_R[record]], int(table[record, _NAMED])
        name = names[named - 1] if named else None
        found[place] = routing.chosen(name, source, int(table[record, _LINE]))
    route_R[used] = found[inverse]
    return route_R
