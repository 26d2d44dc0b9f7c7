"""Prompts that a model is to answer: read, tokenised, and asked in an order of their own."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data import chat, encode, rendering, store
from jaxdistill.data.chat_template import RenderError
from jaxdistill.data.records import Record
from jaxdistill.data.rules import Empty, TooLong, Unlearned, printable
from jaxdistill.data.sources import Source
from jaxdistill.errors import DataError, ModelError

_log = logging.getLogger(__name__)
_NO_FAULT = (Empty, TooLong, Unlearned)
_VERSION = 1  # part of every fingerprint: raise it when the same input gives other tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt.

    Attributes:
      tokens: int32 [N], N at least 1.
      notes: what stands beside it in its record: answer, solution, teacher.
    """

    tokens: np.ndarray
    notes: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts by number, and their endless order.

    Attributes:
      prompts: those that can be asked.
      fingerprint: changes with any byte of the sources, the tokenizer, the template, the limit.
      records: records found = len(prompts) + quarantined + skipped + too_long.
      too_long: records whose prompt leaves no room for an answer.
      skipped: empty ones, and those that are marked as not learned.
      left_out: (file, line, reason) of every record that is not asked.
    """

    prompts: Sequence[Prompt]
    fingerprint: str
    records: int
    too_long: int
    skipped: int
    left_out: Sequence[tuple[str, int, str]]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def quarantined(self) -> int:
        """Broken records."""
        return self.records - len(self.prompts) - self.too_long - self.skipped

    @functools.cached_property
    def _orders(self) -> dict[int, Any]:
        return {}

    def at(self, place: int, seed: int) -> Prompt:
        """The prompt at a place of the stream of all epochs; each epoch has an order of its own.

        Args:
          place: counted from 0; one epoch holds every prompt once.
          seed: decides the orders; the answer depends on the two alone.
        """
        # Importing grain takes seconds, which reading prompts does not need.
        import grain

        if seed not in self._orders:
            numbers = grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()
            self._orders[seed] = numbers
        return self.prompts[int(self._orders[seed][place])]

    def write_left_out(self, path: Path) -> None:
        """Lists the records that are not asked, as JSONL of file, line and reason, if any.

        Raises:
          StorageError: if the file cannot be written.
        """
        if not self.left_out:
            return
        names = ("file", "line", "reason")
        lines = [json.dumps(dict(zip(names, one, strict=True))) + "\n" for one in self.left_out]
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        with store.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join(lines), encoding="utf-8")
            os.replace(temporary, path)


def read(
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    longest: int,
    on_bad_record: str = "quarantine",
    max_bad_fraction: float = 0.001,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    special_tokens: str = "text",
) -> Prompts:
    """Reads and tokenises prompts.

    A text is continued as it is; messages are rendered by the chat template up to where the
    assistant's turn begins.

    Args:
      sources: opened with the format `prompts`.
      tokenizer: a transformers PreTrainedTokenizerFast.
      longest: tokens of the longest prompt; longer ones are left out and counted.
      on_bad_record: `quarantine` leaves unusable records out, `fail` stops at one.
      max_bad_fraction: more unusable records than this share of all is an error.
      chat_template: Jinja text in place of the tokenizer's own.
      template_kwargs: what the template is given besides.
      special_tokens: `text`: special tokens written in a text stay text; `parse`: they become
        special tokens.

    Raises:
      DataError: if no prompt can be asked, or too many records are unusable.
      ModelError: if the tokenizer is not a fast one, or has no chat template and needs one.
    """
    assert longest >= 1, "checked before"
    codec = encode.prepare(tokenizer)
    template = rendering.template_of(tokenizer, chat_template)
    encoder = _Encoder(codec, template, template_kwargs or {}, special_tokens == "parse")
    found: list[Prompt] = []
    left_out: list[tuple[str, int, str]] = []
    skipped = too_long = broken = 0
    for name, line, made in _made(sources, encoder, longest):
        if isinstance(made, Prompt):
            found.append(made)
            continue
        too_long += isinstance(made, TooLong)
        skipped += isinstance(made, Empty | Unlearned)
        broken += not isinstance(made, _NO_FAULT)
        left_out.append((name, line, printable(made).replace("\n", "\\n")))
        if on_bad_record == "fail" and not isinstance(made, _NO_FAULT):
            raise DataError(
                f"{name}:{line}: {left_out[-1][2]} (data.on_bad_record is 'fail': repair the "
                "record, or use 'quarantine' to leave it out)"
            )
    records = len(found) + len(left_out)
    reasons = "; ".join(f"{name}:{line}: {reason}" for name, line, reason in left_out[:3])
    if not found:
        told = f"none of the {records} records can be asked: {reasons}"
        raise DataError(f"data.prompts: {told if records else 'the files hold no record'}")
    if broken > max_bad_fraction * records:
        raise DataError(
            f"data.prompts: {broken} of {records} records ({broken / records:.2%}) cannot be used, "
            f"more than max_bad_fraction {max_bad_fraction:g} allows: {reasons}"
        )
    for count, words in (
        (too_long, f"are longer than {longest} tokens, leave no room for an answer"),
        (skipped, "are empty or marked as not learned"),
    ):
        if count:
            _log.warning("data.prompts: %d of %d records %s: left out", count, records, words)
    content = {
        "version": _VERSION,
        "sources": [source.digest() for source in sources],
        "tokenizer": encode.fingerprint(tokenizer),
        "prefix": codec.prefix,
        "template": template,
        "settings": [longest, dict(template_kwargs or {}), special_tokens],
    }
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Prompts(found, fingerprint, records, too_long, skipped, left_out)


class _Encoder:
    """Makes tokens of the prompts of records."""

    def __init__(
        self, codec: encode.Codec, template: str | None, kwargs: Mapping[str, Any], parse: bool
    ):
        self._codec, self._template, self._kwargs, self._parse = codec, template, kwargs, parse

    @functools.cached_property
    def _chat(self) -> chat.ChatEncoder:
        if self._template is None:
            raise ModelError(
                "data.prompts: holds messages, and the tokenizer has no chat template: give "
                "data.chat_template, or texts as `prompt`"
            )
        return chat.ChatEncoder(self._codec, self._template, "all", self._kwargs)

    def tokens(self, record: Record) -> list[int] | str:
        """The tokens of a prompt, or the reason why there are none."""
        if record.roles:
            try:
                return self._chat.encode_prompt(record)
            except RenderError as error:
                return str(error)
        ids = encode.encode_text(self._codec, [record.texts[0]], self._parse)[0]
        if isinstance(ids, str):
            return ids
        return [*encode.prefix_of(self._codec, ids, self._parse), *ids]


def _made(
    sources: Sequence[Source], encoder: _Encoder, longest: int
) -> Iterator[tuple[str, int, Prompt | str]]:
    """(file, line, the prompt or the reason why there is none) of every record."""
    for whole in sources:
        for source in whole.parts or (whole,):
            try:
                for item in source:
                    if not isinstance(item, Record):
                        yield source.name, item.line, item.reason
                        continue
                    tokens = encoder.tokens(item)
                    yield source.name, item.line, _fitting(tokens, item, longest)
            except OSError as error:
                told = error.strerror or error
                raise DataError(f"{source.name}: cannot be read: {told}") from error


def _fitting(tokens: list[int] | str, record: Record, longest: int) -> Prompt | str:
    if isinstance(tokens, str):
        return tokens
    if not tokens:
        return Empty("empty: the prompt has no token")
    if len(tokens) > longest:
        return TooLong(f"too long: {len(tokens)} tokens, and {longest} leave room for an answer")
    return Prompt(np.asarray(tokens, np.int32), record.notes)
