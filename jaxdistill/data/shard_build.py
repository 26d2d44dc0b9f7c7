"""Builds shards: read, check, tokenise, and write the documents of sources as they are."""

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data import progress, quarantine, store, wire
from jaxdistill.data.chat_template import check_stalled
from jaxdistill.data.records import TEACHER, Record, Rejected
from jaxdistill.data.sources import Source
from jaxdistill.data.tokenising import RecordBatch, Tokeniser, good
from jaxdistill.errors import DataError

_BATCH_RECORDS = 512
_BATCH_CHARACTERS = 1_000_000
_NOTE_SECONDS = 1.0  # of work that a kill may cost
_MOST_TEACHERS = 1000  # names of teachers that are told apart
_OTHERS = "(and others)"
_log = logging.getLogger(__name__)


class ShardBuild:
    """One shard that is written: a folder beside its place, which it takes when it is sealed.

    Args:
      folder: its place.
      identity: its fingerprint.
      sources: whose documents it holds.
      tokeniser: which is to make them.
      vocab: ids that the tokenizer has.
      two_views: whether documents have a second view.
      fail_fast: whether the first broken record is an error.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        sources: Sequence[Source],
        tokeniser: Tokeniser,
        *,
        vocab: int,
        two_views: bool,
        fail_fast: bool,
    ):
        self._place, self._identity, self._sources = folder, identity, sources
        self._tokeniser, self._fail_fast = tokeniser, fail_fast
        self._ids, self._two_views = store.ids(vocab), two_views
        self._noted = time.monotonic()

    def __enter__(self) -> "ShardBuild":
        """Begins, or goes on where a killed build of the same shard was.

        Raises:
          StorageError: if the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(store.new_folder(self._place, resumes=True))
            parts = {**store.TOKENS, **store.DOCUMENTS, "tokens": (self._ids, ())}
            if self._two_views:
                parts |= {**store.SECOND_TOKENS, **store.SECOND_DOCUMENTS}
            self.progress, self._files = progress.begin(self._folder, self._identity, parts)
            stack.callback(self._files.close)
            self._stack = stack.pop_all()
        for name in parts:
            if name.endswith("documents") and not len(self._files.arrays[name]):
                self._files.append(name, np.zeros(1, np.int64))
        at = self.progress
        self._teachers = {name: number for number, name in enumerate(at.teachers, start=1)}
        if at.records:
            _log.info("%s: %s records are done by a killed build", self._place, at.records)
        return self

    def __exit__(self, *error: Any) -> None:
        """Closes the files; the folder goes, where it was not sealed, but for Ctrl-C."""
        self._stack.__exit__(*error)

    def batches(self) -> Iterator[tuple[int, RecordBatch]]:
        """(number of the source, batch) of what is not done yet; the records are met."""
        at = self.progress
        if at.kind is not None:
            self._tokeniser.meet(at.kind, self._sources[at.first[0]].name, at.first[1])
        first, done = max(len(at.begun) - 1, 0), at.items
        for index, source in enumerate(self._sources[first:], start=first):
            for batch in batched(source, done if index == first else 0):
                for record in good(batch):
                    self._tokeniser.meet(record.kind, source.name, record.line)
                yield index, batch

    def where(self, index: int, batch: RecordBatch) -> str:
        """A batch in words."""
        return f"{self._sources[index].name}:{batch[0].line} to {batch[-1].line}"

    def take(self, index: int, batch: RecordBatch, made: wire.Made) -> None:
        """Writes what became of a batch of a source.

        Raises:
          DataError: at the first broken record, where that is an error.
          ModelError: if the chat template did not end for several conversations.
        """
        at = self.progress
        self._begin(index)
        at.tally.add(made.tally)
        check_stalled(at.tally.stalled)
        self._write(made.arrays)
        table, place = [], 0
        for item in batch:
            if isinstance(item, Rejected):
                self._reject(index, item.line, item.reason)
                continue
            if at.kind is None:
                at.kind, at.first = item.kind, (index, item.line)
            reason = made.reasons.get(place)
            if reason is not None:
                self._reject(index, item.line, reason)
            else:
                table.append((place, item.line, made.counts[place], self._named(item)))
            place += 1
        rows = np.asarray(table, np.int64).reshape(-1, 4)
        rows[:, 0] = made.hashes.view(np.int64)[rows[:, 0]]
        self._files.append("records", rows)
        at.records += len(batch)
        at.items += len(batch)
        if time.monotonic() - self._noted >= _NOTE_SECONDS:
            self._note()

    def _write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds documents to the files."""
        if not arrays:
            return
        ids = arrays["tokens"]
        assert not len(ids) or int(ids.max()) <= np.iinfo(self._ids).max, "the tokenizer has these"
        for view in ("", "second_") if self._two_views and "groups" in arrays else ("",):
            ends = len(self._files.arrays[f"{view}tokens"]) + np.cumsum(arrays[f"{view}sizes"])
            self._files.append(f"{view}documents", ends)
        self._files.append("tokens", ids.astype(self._ids))
        if not self._tokeniser.all_count:
            loss = arrays["loss"]
            self._files.append("loss", loss if len(loss) else np.ones(len(ids), bool))
        for name in (*store.SECOND_TOKENS, "shortened"):
            if name in arrays:
                self._files.append(name, arrays[name])

    def _begin(self, index: int) -> None:
        """Begins sources up to this one."""
        at, sizes = self.progress, {name: len(one) for name, one in self._files.arrays.items()}
        while len(at.begun) <= index:
            at.begun.append((sizes["records"], sizes["documents"] - 1, sizes["tokens"]))
            at.items = 0

    def _named(self, record: Record) -> int:
        """The number of the name that a record has for one of several teachers; 0: it has none."""
        name = record.notes.get(TEACHER)
        if name is None:
            return 0
        if name not in self._teachers:
            if len(self._teachers) >= _MOST_TEACHERS:
                name = _OTHERS  # none of these is a teacher of the run: the first is refused
            if name not in self._teachers:
                self._teachers[name] = len(self._teachers) + 1
                self.progress.teachers.append(name)
        return self._teachers[name]

    def _reject(self, source: int, line: int, reason: str) -> None:
        entry = quarantine.entry(self._sources[source].name, line, reason)
        if self._fail_fast:
            quarantine.stop_at(entry)
        self.progress.left_out[quarantine.why(reason)] += 1
        entry = {"source": source} | {name: entry[name] for name in ("line", "reason", "broken")}
        self._files.quarantine.append((json.dumps(entry) + "\n").encode())

    def _note(self) -> None:
        """Notes how far this build is, should it be killed."""
        self._gather_unread()
        progress.write(self._folder, self._identity, self.progress, self._files)
        self._noted = time.monotonic()

    def _gather_unread(self) -> None:
        at = self.progress
        at.unread = at.unread.union(*(source.unread for source in self._sources))

    def seal(self) -> None:
        """Completes the shard, which then takes its place."""
        at = self.progress
        self._begin(len(self._sources) - 1)
        self._gather_unread()
        self._files.finish()
        facts = {
            "fingerprint": self._identity,
            store.IDS: self._ids.name,
            "kind": at.kind,
            "first": at.first,
            "begun": at.begun,
            "records": at.records,
            "left_out": at.left_out,
            "tally": at.tally.to_json(),
            "unread": sorted(at.unread),
            "teachers": at.teachers,
        }
        store.seal(self._folder, facts)


def batched(source: Source, done: int = 0) -> Iterator[RecordBatch]:
    """The source behind what is `done`, in lists of a bounded number of records and characters."""
    batch: RecordBatch = []
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
