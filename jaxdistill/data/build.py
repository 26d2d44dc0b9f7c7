"""Builds the tokenised data of a set of sources: stream, check, encode, quarantine, pack, seal."""

import array
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxdistill.data import chat, encode, packing, store
from jaxdistill.data.records import Record, Rejected, printable
from jaxdistill.data.sources import Source
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.types import ORIGINS

LOSS_ON = {"all": ("text", "completion", "messages"), "completion": ("completion",),
           "assistant": ("messages",)}  # fmt: skip
ON_BAD_RECORD = ("quarantine", "fail")
LONG_DOCUMENTS = ("auto", "split", "truncate", "reject")

# Part of every fingerprint: raise it when the same input would give other tokens, masks or rows.
_VERSION = 1
_BATCH_RECORDS = 512
_BATCH_CHARACTERS = 1_000_000
_SHOWN_REASONS = 3

Encoder = Callable[[Sequence[Record]], list[encode.Document | str]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides, together with the sources and the tokenizer, which rows come out."""

    seq_len: int
    packing: str
    loss_on: str
    long_documents: str
    chat_template: str | None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          ConfigError: naming the field, the value and the choices.
        """
        if isinstance(self.seq_len, bool) or self.seq_len < 2:
            raise ConfigError(f"data.seq_len: {self.seq_len}: must be a whole number of at least 2")
        check_choice("packing", self.packing, packing.PACKINGS)
        check_choice("loss_on", self.loss_on, tuple(LOSS_ON))
        check_choice("long_documents", self.long_documents, LONG_DOCUMENTS)


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError unless the value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"data.{field}: {value!r}: must be one of {', '.join(choices)}")


def fingerprint(sources: Sequence[Source], codec: encode.Codec, settings: Settings) -> str:
    """A hash over every byte of the sources, the tokenizer, the template and the settings."""
    content = {
        "version": _VERSION,
        "sources": [_identity(source) for source in sources],
        "tokenizer": encode.fingerprint(codec.tokenizer),
        "prefix": codec.prefix,
        "template": chat.template_of(codec.tokenizer, settings.chat_template),
        "settings": dataclasses.asdict(settings),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _identity(source: Source) -> dict[str, str]:
    # Who wrote it joins where it matters, so that other data sets keep their fingerprints.
    whose = {} if source.origin == "data" else {"origin": source.origin}
    return {"format": source.format, "sha256": _digest(source), **whose}


def _digest(source: Source) -> str:
    try:
        return source.digest()
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror or error}") from error


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
    """Builds and seals one folder.

    Raises:
      DataError: if no record is usable, records of several kinds are mixed, `loss_on` does not suit
        their kind, or, with fail_fast, at the first bad record.
      StorageError: if the folder cannot be written.
    """
    with store.new_folder(folder) as temporary:
        work = _Build(temporary, sources, codec, settings, fail_fast, name)
        try:
            work.run()
            counts = work.finish()
        finally:
            work.close()
        facts = {
            "fingerprint": identity,
            "kind": work.kind,
            "seq_len": settings.seq_len,
            "pad": codec.pad,
            "counts": counts,
            "notices": work.notices(),
            "origins": work.origins,
        }
        if not counts["num_documents"]:
            names = [source.name for source in sources]
            export_quarantine(temporary, names, quarantine_path)
            raise DataError(_nothing_usable(name, counts, first_reasons(temporary, names)))
        store.seal(temporary, facts)


def _nothing_usable(name: str, counts: dict[str, int], reasons: list[str]) -> str:
    if not counts["records"]:
        return f"data.{name}: the data set is empty: its files hold no record"
    return (
        f"data.{name}: none of the {counts['records']} records can be used, there is nothing to "
        f"learn from: {'; '.join(reasons)}"
    )


class _Build:
    """One pass over the sources into the files of a folder, and the counts that go with it."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        codec: encode.Codec,
        settings: Settings,
        fail_fast: bool,
        name: str,
    ):
        self.kind: str | None = None
        self.origins: list[tuple[int, int]] = []  # (first token, who wrote it) of every source
        self._folder, self._sources, self._codec = folder, sources, codec
        self._settings, self._fail_fast, self._name = settings, fail_fast, name
        self._encoder: Encoder | None = None
        self._chat: chat.ChatEncoder | None = None
        self._kind_from = ""
        self._records = self._quarantined = self._truncated = self._tokens = self._counted = 0
        self._offsets = array.array("q", [0])
        self._arrays = {
            part: store.ArrayWriter(
                folder / f"{part}.npy", dtype, (2,) if part == "segments" else ()
            )
            for part, dtype in store.ARRAYS.items()
        }
        with store.writing(folder):
            self._quarantine: TextIO = (folder / store.QUARANTINE).open("w", encoding="utf-8")

    def run(self) -> None:
        """Reads, encodes and writes every record of every source."""
        for index, source in enumerate(self._sources):
            self.origins.append((self._tokens, ORIGINS.index(source.origin)))
            for batch in _batched(source):
                good = [item for item in batch if isinstance(item, Record)]
                documents = iter(self._encode(source, good))
                for item in batch:
                    self._records += 1
                    document = next(documents) if isinstance(item, Record) else item.reason
                    reason = document if isinstance(document, str) else self._add(document)
                    if reason is not None:
                        self._reject(index, item.line, reason)

    def finish(self) -> dict[str, int]:
        """Packs, completes the files, and returns the counts."""
        offsets = np.asarray(self._offsets, np.int64)
        pieces = packing.windows(offsets, self._settings.seq_len)
        segments, rows = packing.plan(pieces, self._settings.seq_len, self._settings.packing)
        self._arrays["documents"].append(offsets)
        self._arrays["segments"].append(segments.astype(np.int64))
        self._arrays["rows"].append(rows.astype(np.int64))
        for writer in self._arrays.values():
            writer.finish()
        with store.writing(self._folder):
            self._quarantine.close()
        return {
            "num_rows": len(rows) - 1,
            "num_tokens": self._tokens,
            "num_loss_tokens": self._counted,
            "num_documents": len(offsets) - 1,
            "records": self._records,
            "used": self._records - self._quarantined,
            "quarantined": self._quarantined,
            "truncated": self._truncated,
        }

    def close(self) -> None:
        """Closes the files, finished or not."""
        for writer in self._arrays.values():
            writer.close()
        self._quarantine.close()

    def notices(self) -> list[str]:
        """What the user should know about the result."""
        found = []
        if self._codec.end is None:
            found.append("the tokenizer has no end-of-text token: documents end without one")
        if self._truncated:
            found.append(
                f"{self._truncated} of {len(self._offsets) - 1} documents were longer than seq_len "
                f"{self._settings.seq_len} and were cut there: raise seq_len to keep them whole"
            )
        if self._chat and not self._chat.ends_turns:
            found.append(
                "the chat template's {% generation %} block leaves out the token that ends a turn: "
                "the student is not taught when to stop"
            )
        return found

    def _encode(self, source: Source, records: list[Record]) -> list[encode.Document | str]:
        if not records:
            return []
        if self._encoder is None:
            self._encoder = self._choose(source, records[0])
        if records[0].kind != self.kind:
            raise DataError(
                f"data.{self._name}: mixed kinds of records: {self._kind_from} holds "
                f"{self.kind!r}, {source.name} holds {records[0].kind!r}: a data set has one kind"
            )
        return self._encoder(records)

    def _choose(self, source: Source, record: Record) -> Encoder:
        """The encoder of the first record's kind, which is then the kind of the data set."""
        self.kind, self._kind_from = record.kind, source.name
        loss_on = self._settings.loss_on
        if record.kind not in LOSS_ON[loss_on]:
            fitting = [choice for choice, kinds in LOSS_ON.items() if record.kind in kinds]
            raise DataError(
                f"data.loss_on: {loss_on!r} needs records of kind {' or '.join(LOSS_ON[loss_on])}, "
                f"but {source.name} holds {record.kind!r}: use {' or '.join(fitting)}"
            )
        if record.kind == "text":
            return lambda records: encode.encode_texts(self._codec, records)
        if record.kind == "completion":
            return lambda records: encode.encode_completions(self._codec, records, loss_on)
        template = chat.template_of(self._codec.tokenizer, self._settings.chat_template)
        self._chat = chat.ChatEncoder(self._codec, template, loss_on)
        return self._chat.encode

    def _add(self, document: encode.Document) -> str | None:
        """Writes one document; or the reason why it teaches nothing."""
        seq_len, policy = self._settings.seq_len, self._settings.long_documents
        if policy == "auto":
            policy = "split" if self.kind == "text" else "truncate"
        ids, loss = document.ids, document.loss
        too_long = len(ids) > seq_len
        if too_long and policy == "reject":
            return f"too long: {len(ids)} tokens, seq_len is {seq_len}"
        if too_long and policy == "truncate":
            ids, loss = ids[:seq_len], loss[:seq_len]
        # The first token of a document, or of a window of one, is no position's target.
        counted = int(loss.sum() - loss[::seq_len].sum())
        if not counted:
            cut = f" within the first {seq_len} tokens (seq_len)" if too_long else ""
            return f"no token counts in the loss{cut}"
        self._truncated += too_long and policy == "truncate"
        self._arrays["tokens"].append(ids)
        self._arrays["loss"].append(loss)
        self._tokens += len(ids)
        self._counted += counted
        self._offsets.append(self._tokens)
        return None

    def _reject(self, source: int, line: int, reason: str) -> None:
        # Reasons quote the data, which must not steer the terminal that shows them.
        reason = printable(reason).replace("\n", "\\n")
        if self._fail_fast:
            raise DataError(
                f"{self._sources[source].name}:{line}: {reason} (data.on_bad_record is 'fail': "
                "repair the record, or use 'quarantine' to leave it out)"
            )
        self._quarantined += 1
        entry = {"source": source, "line": line, "reason": reason}
        with store.writing(self._folder):
            self._quarantine.write(json.dumps(entry) + "\n")


def _batched(source: Source) -> Iterator[list[Record | Rejected]]:
    """The source in lists that bound both the number of records and the characters in memory."""
    batch: list[Record | Rejected] = []
    characters = 0
    try:
        for item in source:
            batch.append(item)
            characters += sum(map(len, item.texts)) if isinstance(item, Record) else 0
            if len(batch) >= _BATCH_RECORDS or characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror or error}") from error
    if batch:
        yield batch


def first_reasons(folder: Path, names: Sequence[str]) -> list[str]:
    """The first few quarantined records as `file:line: reason`."""
    reasons = []
    for entry in _quarantined(folder, names):
        reasons.append(f"{entry['file']}:{entry['line']}: {entry['reason']}")
        if len(reasons) == _SHOWN_REASONS:
            break
    return reasons


def export_quarantine(folder: Path, names: Sequence[str], path: Path | None) -> None:
    """Writes the quarantined records of a folder for the user: file, line, reason, as JSONL.

    Args:
      folder: of the data set.
      names: of its sources, in order.
      path: the file; nothing is written for None, or where no record was left out.
    """
    if path is None or not (folder / store.QUARANTINE).stat().st_size:
        return
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with store.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for entry in _quarantined(folder, names):
                file.write(json.dumps(entry) + "\n")
        os.replace(temporary, path)


def _quarantined(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    with (folder / store.QUARANTINE).open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            # The folder knows sources by number: the same content may lie elsewhere by now.
            yield {
                "file": names[entry["source"]],
                "line": entry["line"],
                "reason": entry["reason"],
            }
