"""Builds the tokenised data of a set of sources: stream, check, encode, quarantine, pack, seal."""

import array
import contextlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.data import encode, packing, pairs, progress, quarantine, store, tokenising, wire
from jaxdistill.data.chat_template import check_stalled
from jaxdistill.data.codec import Codec
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.records import PAIRS, TEACHER, Record, Rejected
from jaxdistill.data.routes import Routing
from jaxdistill.data.rules import TooLong, printable
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.settings import Settings
from jaxdistill.data.sources import Source
from jaxdistill.data.worker import Worker
from jaxdistill.errors import DataError
from jaxdistill.types import ORIGINS

_BATCH_RECORDS = 512
_BATCH_CHARACTERS = 1_000_000
_NOTE_SECONDS = 1.0  # of work that a kill may cost
_log = logging.getLogger(__name__)


def build(
    folder: Path,
    sources: Sequence[Source],
    codec: Codec,
    settings: Settings,
    identity: str,
    *,
    fail_fast: bool,
    name: str,
    quarantine_path: Path | None,
    second: SecondView | PrivilegedView | None = None,
    routing: Routing | None = None,
    workers: int = 1,
) -> None:
    """Builds and seals one folder; what a killed build of the same data has done is not done again.

    Raises:
      DataError: if no record is usable, records of several kinds are mixed, `loss_on` does not suit
        their kind, or, with fail_fast, at the first bad record.
      StorageError: if the folder cannot be written.
    """
    with store.new_folder(folder) as temporary:
        parts = temporary, sources, codec, settings, identity, fail_fast, name
        work = _Build(*parts, second, routing, workers)
        try:
            work.run()
            counts = work.finish()
        finally:
            work.close()
        facts: dict[str, Any] = {
            "fingerprint": identity,
            "kind": work.progress.kind,
            "seq_len": settings.seq_len,
            "pad": codec.pad,
            store.IDS: store.ids(len(codec.inert)).name,
            "counts": counts,
            "notices": work.notices(),
            "origins": work.progress.origins,
        }
        if second is not None:
            facts["second"] = {"seq_len": second.seq_len, "pad": second.codec.pad}
        if routing is not None:
            facts["teachers"] = work.taught
        if not counts["num_documents"]:
            names = [source.name for source in sources]
            quarantine.export(temporary, names, quarantine_path)
            raise DataError(
                _nothing_usable(name, counts, quarantine.first_reasons(temporary, names))
            )
        store.seal(temporary, facts)


def _nothing_usable(name: str, counts: dict[str, int], reasons: list[str]) -> str:
    if not counts["records"]:
        return f"data.{name}: the data set is empty: its files hold no record"
    return (
        f"data.{name}: none of the {counts['records']} records can be used, there is nothing to "
        f"learn from: {'; '.join(reasons)}"
    )


class _Cut(NamedTuple):
    """What is kept of a document.

    Attributes:
      kept: its first so many tokens.
      counted: how many of them are targets that count.
      reason: why it cannot be used, or None.
    """

    kept: int
    counted: int
    reason: str | None = None


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


class _Build:
    """One pass over the sources into the files of a folder, and the counts that go with it."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        codec: Codec,
        settings: Settings,
        identity: str,
        fail_fast: bool,
        name: str,
        second: SecondView | PrivilegedView | None,
        routing: Routing | None,
        workers: int,
    ):
        self._folder, self._sources, self._codec = folder, sources, codec
        self._settings, self._fail_fast, self._name = settings, fail_fast, name
        self._second, self._routing = second, routing
        self.taught: list[tuple[str, int, int]] = []  # name, rows, tokens of several teachers
        self._worker: Worker | None = None
        self._workers = workers
        self._identity, self._noted = identity, time.monotonic()
        self._ids = store.ids(len(codec.inert))
        parts = store.ARRAYS | {"tokens": self._ids}
        parts |= {} if second is None else store.SECOND_ARRAYS
        parts |= {} if routing is None else store.ROUTE_ARRAYS
        self.progress, self._files = progress.begin(folder, identity, parts)
        self._offsets = {name: self._ends(name) for name in parts if name.endswith("documents")}

    def _ends(self, name: str) -> array.array:
        """The ends of the documents so far, in the tokens of one view."""
        return array.array("q", self._files.written(name).tolist() or [0])

    def run(self) -> None:
        """Reads, encodes and writes every record of every source that is not done yet."""
        at = self.progress
        if at.records:
            _log.info("data.%s: %s records are done by a killed build", self._name, at.records)
        if at.kind is not None:
            self._worker = self._choose(at.kind, at.kind_from)
        made = tokenising.made(self._batches(), lambda: self._worker, self._workers, self._where)
        with contextlib.closing(made):
            for index, batch, documents in made:
                self._begin(index)
                self._take(index, batch, documents)
                at.items += len(batch)
                if time.monotonic() - self._noted >= _NOTE_SECONDS:
                    self._note()
        self._begin(len(self._sources) - 1)

    def _begin(self, index: int) -> None:
        """Begins sources up to this one."""
        at = self.progress
        while len(at.origins) <= index:
            at.origins.append((at.tokens, ORIGINS.index(self._sources[len(at.origins)].origin)))
            at.items = at.used = 0

    def _batches(self) -> Iterator[tuple[int, tokenising.Batch]]:
        """(source, batch) of what is not done yet; the first record's kind is that of all."""
        at, kind = self.progress, self.progress.kind
        first, done = max(len(at.origins) - 1, 0), at.items
        holder = at.kind_from
        for index, source in enumerate(self._sources[first:], start=first):
            for batch in batched(source, done if index == first else 0):
                for record in tokenising.good(batch):
                    if kind is None:
                        kind, holder = record.kind, index
                        self._worker = self._choose(kind, holder)
                    self._check_kind(record, index, kind, holder)
                yield index, batch

    def _check_kind(self, record: Record, index: int, kind: str, holder: int) -> None:
        if record.kind != kind:
            names = [source.name for source in self._sources]
            raise DataError(
                f"data.{self._name}: mixed kinds of records: {names[holder]} holds {kind!r}, "
                f"{names[index]}:{record.line} is {record.kind!r}: a data set has one kind"
            )

    def _where(self, index: int, batch: tokenising.Batch) -> str:
        first, last = batch[0].line, batch[-1].line
        return f"data.{self._name}: {self._sources[index].name}:{first} to {last}"

    def _take(self, index: int, batch: tokenising.Batch, made: wire.Made) -> None:
        """Writes what can be learned of a batch of a source's records."""
        at, source = self.progress, self._sources[index]
        if at.kind is None and made.documents:
            assert self._worker is not None, "it has made them"
            at.kind, at.kind_from = self._worker.kind, index
        at.tally.add(made.tally)
        check_stalled(at.tally.stalled)
        encoded = iter(zip(made.documents, made.hashes, strict=True))
        for item in batch:
            at.records += 1
            documents, said = (
                next(encoded) if isinstance(item, Record) else (item.reason, np.uint64(0))
            )
            cuts = () if isinstance(documents, str) else tuple(map(self._cut, documents))
            reason = documents if isinstance(documents, str) else self._problem(documents, cuts)
            if isinstance(item, Rejected) or isinstance(documents, str) or reason is not None:
                self._reject(index, item.line, reason or "")
                continue
            # Of n records with weight w, floor(w n) copies: an exact share, by order.
            times = int(source.weight * (at.used + 1)) - int(source.weight * at.used)
            at.used += 1
            self._files.append("records", said[None])
            route = self._route(item, source)
            for _ in range(times):
                self._add(documents, cuts, route)

    def _route(self, record: Record, source: Source) -> int | None:
        """Which of several teachers a record is for; where there are not, its field is not read."""
        if self._routing is not None:
            return self._routing.of(record, source)
        if TEACHER in record.notes:
            self.progress.unread.add(TEACHER)
        return None

    def _note(self) -> None:
        """Notes how far this build is, should it be killed."""
        at = self.progress
        at.unread = at.unread.union(*(source.unread for source in self._sources))
        self._write_offsets()
        progress.write(self._folder, self._identity, at, self._files)
        self._noted = time.monotonic()

    def _write_offsets(self) -> None:
        """Writes the ends of documents that are not written yet."""
        for name, ends in self._offsets.items():
            done = len(self._files.arrays[name])
            self._files.append(name, np.asarray(ends[done:], np.int64))

    def finish(self) -> dict[str, int]:
        """Packs, completes the files, and returns the counts."""
        at, settings = self.progress, self._settings
        offsets = np.asarray(self._offsets["documents"], np.int64)
        together = 2 if self._pairs else 1  # documents that share a row
        pieces = packing.windows(offsets[::together], settings.seq_len)
        capacity = [settings.seq_len]
        if self._second is not None:  # every document is in one piece in both views
            other = np.asarray(self._offsets["second_documents"], np.int64)
            pieces = np.concatenate([pieces, packing.windows(other, self._second.seq_len)], axis=1)
            capacity.append(self._second.seq_len)
        segments, rows = self._packed(pieces, capacity, offsets)
        if self._pairs:
            segments, rows = pairs.apart(segments, rows, offsets)
        self._write_offsets()
        self._files.append("segments", segments[:, :2].astype(np.int64))
        if self._second is not None:
            self._files.append("second_segments", segments[:, 2:].astype(np.int64))
        self._files.append("rows", rows.astype(np.int64))
        self._files.finish()
        return {
            "num_rows": len(rows) - 1,
            "num_tokens": at.tokens,
            "num_loss_tokens": at.counted,
            "num_documents": len(offsets) - 1,
            "records": at.records,
            "used": at.records - at.left_out.total(),
            **{why: at.left_out[why] for why in LEFT_OUT},
            "truncated": at.truncated,
        }

    def _packed(
        self, pieces: np.ndarray, capacity: list[int], offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Segments and rows as `packing.plan`; of several teachers one after the other."""
        packing_by = self._settings.packing
        if self._routing is None:
            return packing.plan(pieces, capacity, packing_by)
        route_D = self._files.written("routes")
        route_S = route_D[np.searchsorted(offsets, pieces[:, 0], "right") - 1]
        segments, rows, routes = [pieces[:0]], [np.zeros(1, np.int64)], []
        for route, name in enumerate(self._routing.names, start=1):
            own, ends = pieces[route_S == route], np.zeros(1, np.int64)
            if len(own):
                own, ends = packing.plan(own, capacity, packing_by)
            rows.append(ends[1:] + sum(map(len, segments)))
            segments.append(own)
            routes.append(np.full(len(ends) - 1, route, np.int32))
            self.taught.append((name, len(ends) - 1, int(own[:, 1].sum())))
        self._files.append("row_routes", np.concatenate(routes))
        return np.concatenate(segments), np.concatenate(rows)

    def close(self) -> None:
        """Closes the files, finished or not."""
        self._files.close()

    def notices(self) -> list[str]:
        """What the user should know about the result."""
        found, at = [], self.progress
        if self._codec.end is None:
            found.append("the tokenizer has no end-of-text token: documents end without one")
        if at.truncated:
            found.append(
                f"{at.truncated} of {len(self._offsets['documents']) - 1} documents were longer "
                f"than seq_len {self._settings.seq_len} and were cut there: raise seq_len to keep "
                "them whole"
            )
        for why, words in LEFT_OUT.items():
            if words and at.left_out[why]:
                found.append(f"{at.left_out[why]} of {at.records} records {words}")
        found += at.tally.of_contexts(at.records - at.left_out.total())
        unread = sorted(
            at.unread.union(*(source.unread for source in self._sources)).difference(
                getattr(self._second, "fields", ())
            )
        )
        if unread:
            names = ", ".join(f"`{printable(name)[:40]}`" for name in unread[:8])
            more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
            found.append(f"fields that are not read: {names}{more}")
        found += at.tally.of_texts()
        found += [note for source in self._sources for note in source.notes]
        return [*found, *at.tally.of_conversations()]

    def _choose(self, kind: str, holder: int) -> Worker:
        """What makes documents of records of a kind, which a source holds."""
        source = self._sources[holder].name
        return Worker(self._codec, self._settings, kind, source, self._second)

    @property
    def _pairs(self) -> bool:
        """Whether records are pairs, whose two documents stand side by side in a row."""
        return self.progress.kind in PAIRS

    @property
    def _all_count(self) -> bool:
        """Whether every token counts, so that no mask is kept: no mark takes one out."""
        return self._settings.loss_on == "all" and self.progress.kind in ("text", "completion")

    def _problem(self, documents: Sequence[encode.Document], cuts: Sequence["_Cut"]) -> str | None:
        """Why nothing of a record can be learned, or None."""
        if self._pairs:
            reason = next((cut.reason for cut in cuts if cut.reason is not None), None)
            return reason or pairs.problem(documents, self._settings.seq_len)
        if not cuts:
            return "no token counts in the loss: the assistant says nothing"
        return cuts[0].reason if all(cut.reason is not None for cut in cuts) else None

    def _cut(self, document: encode.Document) -> "_Cut":
        assert self.progress.kind is not None, "a record was encoded"
        seq_len = self._settings.seq_len
        policy = self._settings.policy(self.progress.kind)
        size = len(document.ids)
        too_long = size > seq_len
        if too_long and policy == "reject":
            return _Cut(0, 0, TooLong(f"too long: {size} tokens, seq_len is {seq_len}"))
        kept = seq_len if too_long and policy == "truncate" else size
        counted = _counted(document.loss[:kept], seq_len)
        if counted:
            return _Cut(kept, counted)
        if kept < size and _counted(document.loss, size):
            reason = f"no token counts in the loss within the first {seq_len} tokens (seq_len)"
            return _Cut(0, 0, TooLong(f"too long: {reason}"))
        return _Cut(0, 0, "no token counts in the loss")

    def _add(
        self,
        documents: Sequence[encode.Document],
        cuts: Sequence["_Cut"],
        route: int | None,
    ) -> None:
        """Writes the documents of one record, without those that teach nothing."""
        for document, cut in zip(documents, cuts, strict=True):
            if cut.reason is not None:
                continue
            at = self.progress
            at.truncated += document.shortened or cut.kept < len(document.ids)
            ids = document.ids[: cut.kept]
            assert int(ids.max()) <= np.iinfo(self._ids).max, "the tokenizer has these ids"
            self._files.append("tokens", ids.astype(self._ids))
            if not self._all_count:
                self._files.append("loss", document.loss[: cut.kept])
            at.tokens += cut.kept
            at.counted += cut.counted
            self._offsets["documents"].append(at.tokens)
            if route is not None:
                self._files.append("routes", np.asarray([route], np.int32))
            if document.beside is not None:
                self._add_beside(document.beside)

    def _add_beside(self, beside: encode.Beside) -> None:
        """Writes the second view of a document."""
        self._files.append("groups", beside.groups)
        self._files.append("second_tokens", beside.ids)
        self._files.append("second_groups", beside.other_groups)
        ends = self._offsets["second_documents"]
        ends.append(ends[-1] + len(beside.ids))

    def _reject(self, source: int, line: int, reason: str) -> None:
        entry = quarantine.entry(self._sources[source].name, line, reason)
        if self._fail_fast:
            quarantine.stop_at(entry)
        self.progress.left_out[quarantine.why(reason)] += 1
        entry = {"source": source} | {name: entry[name] for name in ("line", "reason", "broken")}
        self._files.quarantine.append((json.dumps(entry) + "\n").encode())


def _counted(loss: np.ndarray, seq_len: int) -> int:
    """The tokens that count: the first of a document, or of a window of one, is no target."""
    return int(loss.sum() - loss[::seq_len].sum())


def batched(source: Source, done: int = 0) -> Iterator[list[Record | Rejected]]:
    """The source behind what is `done`, in lists of a bounded number of records and characters."""
    batch: list[Record | Rejected] = []
    characters = 0
    try:
        for item in itertools.islice(source, done, None):
            batch.append(item)
            characters += sum(map(len, item.texts)) if isinstance(item, Record) else 0
            if len(batch) >= _BATCH_RECORDS or characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror or error}") from error
    if batch:
        yield batch
