"""Prompts that a model is to answer: read, tokenised, and asked in an order of their own."""

import collections
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data import chat, encode, quarantine, rendering
from jaxdistill.data.chat_template import RenderError
from jaxdistill.data.codec import Codec, prepare, tokenizer_fingerprint
from jaxdistill.data.context_prompts import ContextPrompts
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.records import TEACHER, Record, Rejected
from jaxdistill.data.routes import TeacherRoutes
from jaxdistill.data.rules import Empty, TooLong
from jaxdistill.data.second_answers import AnswerView, AnswerViews
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.shard_build import batched
from jaxdistill.data.sources import Source
from jaxdistill.errors import DataError, ModelError

_log = logging.getLogger(__name__)
_VERSION = 1  # part of every fingerprint: raise it when the same input gives other tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt.

    Attributes:
      tokens: int32 [N], N at least 1.
      notes: what stands beside it in its record: those of `records.NOTES`.
      context: int32 [M], the prompt of a teacher that is told more; None: there is none.
      with_sibling: a right answer to the prompt -> that prompt, or why there is none; None where
        the teacher is not told of such.
      view: gives answers in the tokens of a teacher with another tokenizer too; None where there
        is no such.
      learns_from: what answers to it are for: "reward", "teacher" or "both".
    """

    tokens: np.ndarray
    notes: Mapping[str, str]
    context: np.ndarray | None = None
    with_sibling: Callable[[str], np.ndarray | str] | None = None
    view: AnswerView | None = None
    learns_from: str = "both"

    @property
    def judged(self) -> bool:
        """Whether answers to it earn rewards."""
        return self.learns_from != "teacher"

    @property
    def taught(self) -> bool:
        """Whether a teacher, where there is one, teaches answers to it."""
        return self.learns_from != "reward"


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts by number, and their endless order.

    Attributes:
      prompts: those that can be asked.
      fingerprint: changes with any byte of the sources, the tokenizer, the template, the limit.
      counts: records that are not asked, by `quarantine.why`; too long is what leaves no room for
        an answer.
      left_out: `quarantine.entry` of each of them.
    """

    prompts: Sequence[Prompt]
    fingerprint: str
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    left_out: Sequence[Mapping[str, Any]] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def records(self) -> int:
        """Records that were found, those that are not asked among them."""
        return len(self) + sum(self.counts.values())

    def first(self, count: int) -> "Prompts":
        """The first of them alone; which these are is part of what they are."""
        if count >= len(self):
            return self
        digest = hashlib.sha256(f"{self.fingerprint} {count}".encode()).hexdigest()
        return dataclasses.replace(self, prompts=self.prompts[:count], fingerprint=digest)

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
        if self.left_out:
            quarantine.write(path, self.left_out)


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
    routing: TeacherRoutes | None = None,
    key: str = "data.prompts",
    context: PrivilegedView | None = None,
    context_longest: int = 0,
    second: SecondView | None = None,
    seq_len: int = 0,
    learns_from: Sequence[str] = (),
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
      routing: several teachers, of which every prompt is for one: its note `teacher` names it.
      key: of the configuration, that messages begin with.
      context: how the prompts of a teacher are made that is told more; None: there is none.
      context_longest: tokens of the longest of these.
      second: another model's tokens, in which answers are given too; None: there is none.
      seq_len: tokens in a row of the student's tokens beside it.
      learns_from: `Prompt.learns_from` of the prompts of each source; none: both.

    Raises:
      DataError: if no prompt can be asked, too many records are unusable, or one that can be asked
        is for no teacher of several; or for messages that a second model has no template for.
      MismatchError: if the tokens of a tokenizer of two stand for no fixed bytes.
      ModelError: if the tokenizer is not a fast one, or has no chat template and needs one.
    """
    assert longest >= 1, "checked before"
    codec = prepare(tokenizer)
    template = rendering.template_of(tokenizer, chat_template)
    kwargs = dict(template_kwargs or {})
    behind = None if context is None else ContextPrompts(context, codec, context_longest)
    views = None
    if second is not None:
        views = AnswerViews(second, codec, seq_len, chat_template, kwargs)
    encoder = _PromptEncoder(
        codec, template, kwargs, special_tokens == "parse", longest, behind, views
    )
    prompts: list[Prompt] = []
    left_out: list[dict[str, Any]] = []
    counts: collections.Counter[str] = collections.Counter()
    whence = learns_from or ["both"] * len(sources)
    parts = [
        (part, signal)
        for source, signal in zip(sources, whence, strict=True)
        for part in source.parts or (source,)
    ]
    for part, signal in parts:
        for batch in batched(part):
            for item, made in zip(batch, encoder.prompts(batch), strict=True):
                if isinstance(made, Prompt):
                    named = _routed(made, item, part, routing)
                    prompts.append(dataclasses.replace(named, learns_from=signal))
                    continue
                left_out.append(quarantine.entry(part.name, item.line, made))
                counts[quarantine.why(made)] += 1
                if on_bad_record == "fail":
                    quarantine.stop_at(left_out[-1])
    _check(key, counts, len(prompts), quarantine.shown(left_out), max_bad_fraction, longest)
    if behind is not None:
        for notice in behind.tally.of_contexts(len(prompts)):
            _log.warning("%s: %s", key, notice)
    of_sources = {"of_sources": [one.teacher for one in sources]}
    decides = {
        "sources": [source.digest() for source in sources],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "prefix": codec.prefix,
        "template": template,
        "settings": [longest, kwargs, special_tokens],
    }
    fingerprint = _fingerprint(
        decides,
        routing=None if routing is None else routing.identity() | of_sources,
        context=None if context is None else [context.identity(), context_longest],
        learns_from=list(whence) if set(whence) != {"both"} else None,
        second=None if second is None else [second.identity(), seq_len],
    )
    return Prompts(prompts, fingerprint, counts, left_out)


def _fingerprint(decides: Mapping[str, Any], **asked: Any) -> str:
    """Of all that decides prompts, and of what is asked of them; None is not asked."""
    asked = {name: one for name, one in asked.items() if one is not None}
    text = json.dumps({"version": _VERSION, **decides, **asked}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _routed(prompt: Prompt, record: Any, source: Source, routing: TeacherRoutes | None) -> Prompt:
    """The prompt with the name of its teacher among several, whoever says it."""
    if routing is None:
        return prompt
    name = routing.names[routing.of(record, source) - 1]
    return dataclasses.replace(prompt, notes={**prompt.notes, TEACHER: name})


def _check(
    key: str,
    counts: Mapping[str, int],
    found: int,
    reasons: Sequence[str],
    allowed: float,
    longest: int,
) -> None:
    """Says what is left out, and refuses where too little is left.

    Raises:
      DataError: as `read`.
    """
    records = found + sum(counts.values())
    if not found:
        told = f"none of the {records} records can be asked: {'; '.join(reasons)}"
        raise DataError(f"{key}: {told if records else 'the files hold no record'}")
    broken = counts[quarantine.BROKEN]
    quarantine.check_share(key, broken, records, allowed, reasons)
    for why, words in (
        ("too_long", f"are longer than {longest} tokens, leave no room for an answer"),
        ("empty", "are empty"),
        ("unlearned", "are marked as not learned"),
        ("without_context", "hold nothing for the teacher's prompt (teacher.self.context)"),
    ):
        if counts[why]:
            _log.warning("%s: %d of %d records %s: left out", key, counts[why], records, words)


class _PromptEncoder:
    """Makes prompts of records."""

    def __init__(
        self,
        codec: Codec,
        template: str | None,
        kwargs: Mapping[str, Any],
        parse: bool,
        longest: int,
        behind: ContextPrompts | None,
        views: AnswerViews | None,
    ):
        self._behind, self._views = behind, views
        self._codec, self._template, self._kwargs = codec, template, kwargs
        self._parse, self._longest = parse, longest

    def prompts(self, batch: Sequence[Record | Rejected]) -> list[Prompt | str]:
        """The prompt of each record, or why there is none; texts are encoded together."""
        plain = [one for one in batch if isinstance(one, Record) and not one.roles]
        texts = iter(encode.encode_text(self._codec, [one.texts[0] for one in plain], self._parse))
        made: list[Prompt | str] = []
        for item in batch:
            if isinstance(item, Rejected):
                made.append(item.reason)
                continue
            ids = self._of_chat(item) if item.roles else self._of_text(next(texts))
            made.append(self._fitting(ids, item))
        return made

    @functools.cached_property
    def _chat(self) -> chat.ChatEncoder:
        if self._template is None:
            raise ModelError(
                "data.prompts: holds messages, and the tokenizer has no chat template: give "
                "data.chat_template, or texts as `prompt`"
            )
        words = self._kwargs if self._views is None else self._views.words[0]
        return chat.ChatEncoder(self._codec, self._template, "all", words)

    def _of_chat(self, record: Record) -> list[int] | str:
        try:
            ours = record if self._views is None else self._views.sided(record)[0]
            return self._chat.encode_prompt(ours)
        except RenderError as error:
            return str(error)

    def _of_text(self, ids: list[int] | str) -> list[int] | str:
        if isinstance(ids, str):
            return ids
        return [*encode.prefix_of(self._codec, ids, self._parse), *ids]

    def _fitting(self, ids: list[int] | str, record: Record) -> Prompt | str:
        if isinstance(ids, str):
            return ids
        if not ids:
            return Empty("empty: the prompt has no token")
        if len(ids) > self._longest:
            return TooLong(
                f"too long: {len(ids)} tokens, and {self._longest} leave room for an answer"
            )
        tokens, behind = np.asarray(ids, np.int32), self._behind
        if self._views is not None:
            view = self._views.of(record, ids)
            return view if isinstance(view, str) else Prompt(tokens, record.notes, view=view)
        if behind is None:
            return Prompt(tokens, record.notes)
        if behind.of_siblings:
            if reason := behind.missing(record):
                return reason
            make = lambda sibling: behind(record, ids, self._parse, sibling)
            return Prompt(tokens, record.notes, with_sibling=make)
        context = behind(record, ids, self._parse)
        return context if isinstance(context, str) else Prompt(tokens, record.notes, context)
