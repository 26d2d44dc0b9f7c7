"""Builds the tokenised data of a set of sources: stream, check, encode, quarantine, pack, seal."""

import array
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdistill.data import chat, encode, packing, pairs, progress, quarantine, rendering, store
from jaxdistill.data.chat_template import RenderError
from jaxdistill.data.held_out import fingerprint_of
from jaxdistill.data.learned import each_turn
from jaxdistill.data.records import PAIRS, Record, Rejected
from jaxdistill.data.rules import Empty, TooLong, Unlearned, printable
from jaxdistill.data.settings import LOSS_ON, Settings
from jaxdistill.data.sources import Source
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.types import ORIGINS

_BATCH_RECORDS = 512
_BATCH_CHARACTERS = 1_000_000
_NOTE_SECONDS = 1.0  # of work that a kill may cost
_log = logging.getLogger(__name__)

# What becomes of each record: its documents, or the reason why there are none.
Documents = tuple[encode.Document, ...] | str
Encoder = Callable[[Sequence[Record]], list[Documents]]


def build(
    folder: Path,
    sources: Sequence[Source],
    codec: encode.Codec,
    settings: Settings,
    identity: str,
    *,
    fail_fast: bool,
    name: str,
    quarantine_path: Path | None,
) -> None:
    """Builds and seals one folder; what a killed build of the same data has done is not done again.

    Raises:
      DataError: if no record is usable, records of several kinds are mixed, `loss_on` does not suit
        their kind, or, with fail_fast, at the first bad record.
      StorageError: if the folder cannot be written.
    """
    with store.new_folder(folder) as temporary:
        work = _Build(temporary, sources, codec, settings, identity, fail_fast, name)
        try:
            work.run()
            counts = work.finish()
        finally:
            work.close()
        facts = {
            "fingerprint": identity,
            "kind": work.progress.kind,
            "seq_len": settings.seq_len,
            "pad": codec.pad,
            "counts": counts,
            "notices": work.notices(),
            "origins": work.progress.origins,
        }
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
    "quarantined": "",
    "empty": "are empty and were skipped",
    "too_long": "have nothing to learn within seq_len and were left out: raise seq_len",
    "unlearned": "are marked as not learned and were left out",
}
_NO_FAULT = {Empty: "empty", TooLong: "too_long", Unlearned: "unlearned"}


class _Build:
    """One pass over the sources into the files of a folder, and the counts that go with it."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        codec: encode.Codec,
        settings: Settings,
        identity: str,
        fail_fast: bool,
        name: str,
    ):
        self._folder, self._sources, self._codec = folder, sources, codec
        self._settings, self._fail_fast, self._name = settings, fail_fast, name
        self._encoder: Encoder | None = None
        self._chat: chat.ChatEncoder | None = None
        self._identity, self._noted = identity, time.monotonic()
        self.progress, self._files = progress.begin(folder, identity)
        self._offsets = array.array("q", self._files.written("documents").tolist() or [0])

    def run(self) -> None:
        """Reads, encodes and writes every record of every source that is not done yet."""
        at = self.progress
        if at.records:
            _log.info("data.%s: %s records are done by a killed build", self._name, at.records)
        if at.kind is not None:
            self._encoder = self._choose(at.kind)
        if self._chat is not None:
            self._chat.accounts = at.conversations
        for index, source in enumerate(self._sources):
            if index + 1 < len(at.origins):
                continue
            if index == len(at.origins):
                at.origins.append((at.tokens, ORIGINS.index(source.origin)))
                at.items = at.used = 0
            for batch in _batched(source, at.items):
                self._take(index, batch)
                at.items += len(batch)
                if time.monotonic() - self._noted >= _NOTE_SECONDS:
                    self._note()

    def _take(self, index: int, batch: list[Record | Rejected]) -> None:
        """Encodes a batch of a source's records and writes what can be learned of them."""
        at, source = self.progress, self._sources[index]
        good = [item for item in batch if isinstance(item, Record)]
        encoded = iter(self._encode(index, good))
        for item in batch:
            at.records += 1
            made = next(encoded) if isinstance(item, Record) else item.reason
            cuts = () if isinstance(made, str) else tuple(map(self._cut, made))
            reason = made if isinstance(made, str) else self._problem(made, cuts)
            if isinstance(item, Rejected) or isinstance(made, str) or reason is not None:
                self._reject(index, item.line, reason or "")
                continue
            # Of n records with weight w, floor(w n) copies: an exact share, by order.
            times = int(source.weight * (at.used + 1)) - int(source.weight * at.used)
            at.used += 1
            self._files.append("records", np.asarray([fingerprint_of(item)], np.uint64))
            for _ in range(times):
                self._add(made, cuts)

    def _note(self) -> None:
        """Notes how far this build is, should it be killed."""
        at = self.progress
        at.unread = at.unread.union(*(source.unread for source in self._sources))
        at.conversations = self._chat.accounts if self._chat else {}
        self._write_offsets()
        progress.write(self._folder, self._identity, at, self._files)
        self._noted = time.monotonic()

    def _write_offsets(self) -> None:
        """Writes the ends of documents that are not written yet."""
        done = len(self._files.arrays["documents"])
        self._files.append("documents", np.asarray(self._offsets[done:], np.int64))

    def finish(self) -> dict[str, int]:
        """Packs, completes the files, and returns the counts."""
        at, offsets = self.progress, np.asarray(self._offsets, np.int64)
        together = 2 if self._pairs else 1  # documents that share a row
        pieces = packing.windows(offsets[::together], self._settings.seq_len)
        segments, rows = packing.plan(pieces, self._settings.seq_len, self._settings.packing)
        if self._pairs:
            segments, rows = pairs.apart(segments, rows, offsets)
        self._write_offsets()
        self._files.append("segments", segments.astype(np.int64))
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
                f"{at.truncated} of {len(self._offsets) - 1} documents were longer than seq_len "
                f"{self._settings.seq_len} and were cut there: raise seq_len to keep them whole"
            )
        for why, words in LEFT_OUT.items():
            if words and at.left_out[why]:
                found.append(f"{at.left_out[why]} of {at.records} records {words}")
        unread = sorted(at.unread.union(*(source.unread for source in self._sources)))
        if unread:
            names = ", ".join(f"`{printable(name)[:40]}`" for name in unread[:8])
            more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
            found.append(f"fields that are not read: {names}{more}")
        if at.rendered:
            found.append(
                f"{at.rendered} records hold special tokens as text, such as "
                f"{at.shown_control!r}: they stay text; data.special_tokens: parse reads them "
                "as special tokens, for text that is rendered already"
            )
        found += [note for source in self._sources for note in source.notes]
        return found + (self._chat.notices() if self._chat else [])

    def _encode(self, index: int, records: list[Record]) -> list[Documents]:
        """What becomes of records; the first one's kind is then the kind of the data set."""
        if not records:
            return []
        at, names = self.progress, [source.name for source in self._sources]
        if self._encoder is None:
            at.kind, at.kind_from = records[0].kind, index
            self._encoder = self._choose(at.kind)
        for record in records:
            if record.kind != at.kind:
                raise DataError(
                    f"data.{self._name}: mixed kinds of records: {names[at.kind_from]} holds "
                    f"{at.kind!r}, {names[index]}:{record.line} is {record.kind!r}: a data set "
                    "has one kind"
                )
        return self._encoder(records)

    def _choose(self, kind: str) -> Encoder:
        """The encoder of a kind of records."""
        loss_on, settings = self._settings.loss_on, self._settings
        if kind not in LOSS_ON[loss_on]:
            fitting = [choice for choice, kinds in LOSS_ON.items() if kind in kinds]
            name = self._sources[self.progress.kind_from].name
            raise DataError(
                f"data.loss_on: {loss_on!r} needs records of kind {' or '.join(LOSS_ON[loss_on])}, "
                f"but {name} holds {kind!r}: use {' or '.join(fitting)}"
            )
        if self._pairs:
            pairs.check(settings)
        chats = PAIRS.get(kind, kind) in ("messages", "dialogue")
        for name, value, plain in (
            ("turns", settings.turns, "whole"),
            ("chat_template", settings.chat_template, None),
            ("template_kwargs", dict(settings.template_kwargs), {}),
        ):
            if not chats and value != plain:
                raise ConfigError(f"data.{name}: has no effect on {kind!r}: remove it")
        parse = settings.special_tokens == "parse"
        if chats and parse:
            raise ConfigError(
                "data.special_tokens: 'parse' is for text and completions: in a conversation the "
                "chat template writes the special tokens: remove it"
            )
        if not chats:
            plain = lambda records: self._plain(records, parse)
            return pairs.of_both(plain) if self._pairs else plain
        template = rendering.template_of(self._codec.tokenizer, settings.chat_template)
        self._chat = chat.ChatEncoder(self._codec, template, loss_on, settings.template_kwargs)
        if self._pairs:
            return pairs.of_both(self._whole)
        return self._each_turn if settings.turns == "each" else self._whole

    def _plain(self, records: Sequence[Record], parse: bool) -> list[Documents]:
        """Texts, or prompts and completions; those that look rendered are counted."""
        if self._codec.controls and not parse:
            for record in records:
                found = filter(None, map(self._codec.control_pattern.search, record.texts))
                for match in itertools.islice(found, 1):
                    self.progress.rendered += 1
                    self.progress.shown_control = self.progress.shown_control or match[0]
        if self.progress.kind == "text":
            made = encode.encode_texts(self._codec, records, parse)
        else:
            loss_on = self._settings.loss_on
            made = encode.encode_completions(self._codec, records, loss_on, parse)
        return [one if isinstance(one, str) else (one,) for one in made]

    def _whole(self, records: Sequence[Record]) -> list[Documents]:
        assert self._chat is not None
        made = self._chat.encode(records)
        return [one if isinstance(one, str) else (one,) for one in made]

    def _each_turn(self, records: Sequence[Record]) -> list[Documents]:
        """A document for every turn of the assistant; a reason of one is that of its record."""
        made: list[Documents] = []
        for record in records:
            try:
                parts = self._whole(each_turn(record, self._settings.loss_on))
            except RenderError as error:
                parts = [str(error)]
            reason = next((part for part in parts if isinstance(part, str)), None)
            made.append(reason or tuple(part[0] for part in parts if not isinstance(part, str)))
        return made

    @property
    def _pairs(self) -> bool:
        """Whether records are pairs, whose two documents stand side by side in a row."""
        return self.progress.kind in PAIRS

    def _problem(self, documents: Sequence[encode.Document], cuts: Sequence["_Cut"]) -> str | None:
        """Why nothing of a record can be learned, or None."""
        if self._pairs:
            reason = next((cut.reason for cut in cuts if cut.reason is not None), None)
            return reason or pairs.problem(documents, self._settings.seq_len)
        if not cuts:
            return "no token counts in the loss: the assistant says nothing"
        return cuts[0].reason if all(cut.reason is not None for cut in cuts) else None

    def _cut(self, document: encode.Document) -> "_Cut":
        seq_len, policy = self._settings.seq_len, self._policy
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

    @property
    def _policy(self) -> str:
        policy = self._settings.long_documents
        if policy == "auto":
            if self._pairs:
                return "reject"
            return "split" if self.progress.kind == "text" else "truncate"
        return policy

    def _add(self, documents: Sequence[encode.Document], cuts: Sequence["_Cut"]) -> None:
        """Writes the documents of one record, without those that teach nothing."""
        for document, cut in zip(documents, cuts, strict=True):
            if cut.reason is not None:
                continue
            at = self.progress
            at.truncated += cut.kept < len(document.ids)
            self._files.append("tokens", document.ids[: cut.kept])
            self._files.append("loss", document.loss[: cut.kept])
            at.tokens += cut.kept
            at.counted += cut.counted
            self._offsets.append(at.tokens)

    def _reject(self, source: int, line: int, reason: str) -> None:
        # Reasons quote the data, which must not steer the terminal that shows them.
        why = next((name for kind, name in _NO_FAULT.items() if isinstance(reason, kind)), "")
        reason = printable(reason).replace("\n", "\\n")
        if self._fail_fast and not why:
            raise DataError(
                f"{self._sources[source].name}:{line}: {reason} (data.on_bad_record is 'fail': "
                "repair the record, or use 'quarantine' to leave it out)"
            )
        self.progress.left_out[why or "quarantined"] += 1
        entry = {"source": source, "line": line, "reason": reason, "broken": not why}
        self._files.quarantine.append((json.dumps(entry) + "\n").encode())


def _counted(loss: np.ndarray, seq_len: int) -> int:
    """The tokens that count: the first of a document, or of a window of one, is no target."""
    return int(loss.sum() - loss[::seq_len].sum())


def _batched(source: Source, done: int) -> Iterator[list[Record | Rejected]]:
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
