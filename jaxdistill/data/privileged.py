"""The same answers behind another prompt: what a teacher reads that is the student, told more.

student   <user> 17 + 25? <assistant> 42 <end>
teacher   <user> 17 + 25? Worked solution: ... <assistant> 42 <end>      groups of tokens 1, 2

Every token of the answer is a group of its own on both sides, so the two are compared place by
place. The answer is never cut: what does not fit is left out, or the context is cut at its end.
"""

import dataclasses
import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data import chat, encode, rendering
from jaxdistill.data.chat_template import RenderError
from jaxdistill.data.codec import Codec, prepare
from jaxdistill.data.context_names import PROMPT, SIBLING, places
from jaxdistill.data.documents import Encoder
from jaxdistill.data.encode import Beside, Document, Documents
from jaxdistill.data.records import Record
from jaxdistill.data.rules import Empty, TooLong, WithoutContext
from jaxdistill.data.settings import Settings
from jaxdistill.data.tally import Tally
from jaxdistill.errors import ConfigError, DataError

_KINDS = ("completion", "messages", "dialogue")


def phrases(template: str) -> tuple[str, ...]:
    """Pairs of neighbouring words of five or more letters: what gives the template away."""
    pieces = []
    for text in re.split(r"\{[a-z_]+\}", template):
        words = re.findall(r"[^\W\d_]+", text.lower())
        pairs = zip(words[:-1], words[1:], strict=True)
        pieces += [f"{a} {b}" for a, b in pairs if min(len(a), len(b)) >= 5]
    return tuple(dict.fromkeys(pieces))


def _within(text: str, other: str) -> bool:
    """Whether a text's words are words of another, side by side; case and marks around are none."""
    ours, theirs = (" ".join(one.casefold().split()) for one in (text, other))
    ours = ours.strip(string.punctuation + string.whitespace)
    return bool(ours) and re.search(rf"(?<!\w){re.escape(ours)}(?!\w)", theirs) is not None


@dataclasses.dataclass(frozen=True, eq=False)
class PrivilegedView:
    """How the teacher's prompt is made of a record, and what becomes of those that have no such.

    Attributes:
      tokenizer: of the run.
      seq_len: tokens in a row of that view.
      template: {prompt} stands for the prompt, in a conversation for the user's last message; other
        names in braces for fields of the record.
      without: what becomes of records without one of the fields: `refuse` counts them as broken,
        `mask` leaves them out.
      long: what becomes of prompts that leave no room for the answer: `leave_out`, or `cut`, which
        shortens the longest field at its end.
      skip_first: so many tokens at the beginning of each answer count nothing.
      chat_template: Jinja text in place of the tokenizer's own.
      template_kwargs: what the chat template is given for the student's prompts.
      own_kwargs: what it is given for the teacher's.
    """

    tokenizer: Any
    seq_len: int
    template: str
    without: str = "refuse"
    long: str = "leave_out"
    skip_first: int = 0
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def codec(self) -> Codec:
        """Of the tokenizer."""
        return prepare(self.tokenizer)

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields of a record that the template asks for."""
        names = (one for one in places(self.template) if one not in (PROMPT, SIBLING))
        return tuple(dict.fromkeys(names))

    @property
    def of_siblings(self) -> bool:
        """Whether it asks for an answer of the same group, which is known once it is judged."""
        return SIBLING in places(self.template)

    def identity(self) -> dict[str, Any]:
        """What decides its tokens, as JSON."""
        names = ("seq_len", "template", "without", "long", "skip_first")
        return {
            **{name: getattr(self, name) for name in names},
            "own_kwargs": dict(self.own_kwargs),
        }

    def missing(self, record: Record) -> str | None:
        """The reason where a record lacks a field that the template asks for."""
        lacking = [name for name in self.fields if not record.notes.get(name, "").strip()]
        if not lacking:
            return None
        told = f"no `{lacking[0]}`, which teacher.self.context asks for"
        return WithoutContext(told) if self.without == "mask" else told

    def says_no_more(self, record: Record, answer: str) -> bool:
        """Whether all that a record adds is the answer, or stands in it word by word."""
        fields = [record.notes[name] for name in self.fields]
        return bool(fields) and all(_within(one, answer) for one in fields)

    def filled(self, prompt: str, values: Mapping[str, str]) -> str:
        """The template with a prompt and the fields of a record in place of their names."""
        known = {**values, PROMPT: prompt}
        put = lambda match: known.get(match[1], match[0])
        return re.sub(r"\{([a-z_]+)\}", put, self.template)

    def turned(self, record: Record, values: Mapping[str, str]) -> Record:
        """A conversation whose user says more in the last message.

        Raises:
          RenderError: if there is no user.
        """
        users = [place for place, role in enumerate(record.roles) if role == "user"]
        if not users:
            raise RenderError("there is no message of a user for teacher.self.context to stand in")
        texts = list(record.texts)
        texts[users[-1]] = self.filled(texts[users[-1]], values)
        return dataclasses.replace(record, texts=tuple(texts))

    def fitted(
        self,
        make: Callable[[Mapping[str, str]], list[int] | str],
        notes: Mapping[str, str],
        most: int,
    ) -> tuple[list[int] | str, bool]:
        """(tokens of a prompt, or why there are none; whether its context was cut).

        Args:
          make: values of the fields -> the tokens.
          notes: the fields of the record, and SIBLING where it is asked for.
          most: tokens that leave room for the answer.
        """
        values = {name: notes[name] for name in (*self.fields, SIBLING) if name in notes}
        ids = make(values)
        if isinstance(ids, str) or len(ids) <= most:
            return ids, False
        reason = TooLong(
            f"too long: the teacher's prompt has {len(ids)} tokens, and {max(most, 0)} of its "
            f"{self.seq_len} (teacher.self.seq_len) are left by the answer"
        )
        longest = max(values, key=lambda name: len(values[name]), default=None)
        if self.long != "cut" or longest is None:
            return reason, False
        low, high, found = 1, len(values[longest]) - 1, None
        while low <= high:
            middle = (low + high) // 2
            tried = make({**values, longest: values[longest][:middle]})
            if isinstance(tried, str):
                return tried, False
            if len(tried) <= most:
                low, found = middle + 1, tried
            else:
                high = middle - 1
        return (reason, False) if found is None else (found, True)

    def apart(self, ours: Sequence[int], theirs: Sequence[int], chats: bool) -> str | None:
        """Why two prompts do not meet: the answer would begin elsewhere than the student's does.

        Conversations end in the chat template's own words, which `check_turns` compares once.
        With `skip_first` the first tokens are not compared.
        """
        if chats or self.skip_first or (ours and theirs and ours[-1] == theirs[-1]):
            return None
        shown = [self.tokenizer.decode(list(one)[-1:]) for one in (ours, theirs)]
        return (
            f"the student's prompt ends in {shown[0]!r}, the teacher's in {shown[1]!r}: end "
            "teacher.self.context with {prompt}, or say with teacher.self.skip_first how many "
            "tokens of an answer are not compared"
        )

    def check_turns(self) -> None:
        """The chat template begins an answer alike on both sides.

        Raises:
          ConfigError: with both beginnings, where it does not and no token is skipped.
        """
        source = rendering.template_of(self.tokenizer, self.chat_template)
        kwargs = {**self.template_kwargs, **self.own_kwargs}
        ours, theirs = (
            chat.opening(self.codec, source, one) for one in (self.template_kwargs, kwargs)
        )
        if ours != theirs and not self.skip_first:
            raise ConfigError(
                f"teacher.self.template_kwargs: the student's answers begin behind {ours!r}, the "
                f"teacher's behind {theirs!r}: give both the same mode (data.template_kwargs), or "
                "say with teacher.self.skip_first how many tokens of an answer are not compared"
            )

    def encoder(
        self, codec: Codec, settings: Settings, kind: str, tally: Tally, *, source: str
    ) -> "ContextEncoder":
        """What makes documents with this view of records of a kind."""
        return ContextEncoder(codec, settings, self, kind, tally, source=source)


class ContextEncoder:
    """Encodes records with an answer: documents that carry the same answer behind another prompt.

    Of a conversation with several answers the last one counts alone.

    Args:
      codec: of the tokenizer.
      settings: of the data set.
      view: of the teacher.
      kind: of the records.
      tally: as `documents.Encoder` takes them, which raises the same errors.
      source: likewise.

    Raises:
      ConfigError: for settings that would cut or divide answers, or sides that begin unlike turns.
      DataError: for records without a prompt and an answer.
    """

    def __init__(
        self,
        codec: Codec,
        settings: Settings,
        view: PrivilegedView,
        kind: str,
        tally: Tally,
        *,
        source: str,
    ):
        if kind not in _KINDS:
            raise DataError(
                f"teacher.self.context: {source} holds {kind!r}, which has no prompt and answer: "
                f"use records of {', '.join(_KINDS[:2])}"
            )
        for name, value, fitting in (
            ("loss_on", settings.loss_on, ("completion", "assistant")),
            ("turns", settings.turns, ("whole",)),
            ("long_documents", settings.long_documents, ("auto", "reject")),
        ):
            if value not in fitting:
                raise ConfigError(
                    f"data.{name} = {value}: teacher.self.context stands before one answer, which "
                    f"is compared whole: use {' or '.join(fitting)}"
                )
        self._settings, self._view, self._tally = settings, view, tally
        self._codec, self._kind = codec, kind
        self._ours = Encoder(codec, settings, kind, tally, source=source)
        self.chat = self._ours.chat
        self._theirs: Encoder | None = None
        if self.chat is not None:
            view.check_turns()
            kwargs = {**settings.template_kwargs, **view.own_kwargs}
            own = dataclasses.replace(settings, template_kwargs=kwargs)
            self._theirs = Encoder(codec, own, kind, Tally(), source=source)

    def __call__(self, records: Sequence[Record]) -> list[Documents]:
        """What becomes of each record."""
        both = zip(records, self._ours(records), strict=True)
        return [one if isinstance(one, str) else self._of(record, one[0]) for record, one in both]

    def _of(self, record: Record, document: Document) -> Documents:
        view, told = self._view, self._tally.contexts
        if reason := view.missing(record):
            return reason
        edges = np.flatnonzero(np.diff(np.concatenate([[0], document.loss.astype(np.int8), [0]])))
        if not len(edges):
            return (document,)  # nothing counts, which is said elsewhere
        first, end = int(edges[-2]), int(edges[-1])
        answer = document.ids[first:end]
        if len(document.ids) > self._settings.seq_len:
            return TooLong(
                f"too long: {len(document.ids)} tokens, seq_len is {self._settings.seq_len}, and "
                "an answer that is compared with a teacher's is not cut"
            )
        if len(answer) <= view.skip_first:
            return Empty(
                f"empty: an answer of {len(answer)} tokens, the first of which are skipped"
            )
        make = functools.partial(self._behind, record)
        prompt, cut = view.fitted(make, record.notes, view.seq_len - len(answer))
        if isinstance(prompt, str):
            return prompt
        ours = document.ids[:first].tolist()
        if not ours or not prompt:
            return "the prompt has no token"
        if reason := view.apart(ours, prompt, self.chat is not None):
            return reason
        told["cut"] += cut
        said = self._codec.tokenizer.decode(answer, skip_special_tokens=True)
        told["answers"] += view.says_no_more(record, said)
        loss = np.zeros(len(document.ids), bool)
        loss[first + view.skip_first : end] = True
        return (Document(document.ids, loss, beside(len(document.ids), first, answer, prompt)),)

    def _behind(self, record: Record, values: Mapping[str, str]) -> list[int] | str:
        """The tokens of the teacher's prompt, up to where the answer begins."""
        if self._theirs is None:
            parse = self._settings.special_tokens == "parse"
            return text_prompt(self._view.filled(record.texts[0], values), self._codec, parse)
        try:
            (made,) = self._theirs([self._view.turned(record, values)])
        except RenderError as error:
            return str(error)
        if isinstance(made, str):
            return made
        ids, loss = made[0].ids, made[0].loss
        last = int(np.flatnonzero(loss)[-1])
        return ids[: int(np.flatnonzero(~loss[: last + 1])[-1]) + 1].tolist()


def text_prompt(text: str, codec: Codec, parse: bool) -> list[int] | str:
    """The tokens of a prompt of plain text, or why there are none."""
    (ids,) = encode.encode_text(codec, [text], parse)
    return ids if isinstance(ids, str) else [*encode.prefix_of(codec, ids, parse), *ids]


def beside(length: int, first: int, answer: np.ndarray, prompt: Sequence[int]) -> Beside:
    """An answer behind the teacher's prompt, token by token beside the student's.

    Args:
      length: tokens of the student's document.
      first: where the answer begins in it.
      answer: its tokens.
      prompt: of the teacher.
    """
    numbers = np.arange(1, len(answer) + 1, dtype=np.int32)
    groups = np.zeros(length, np.int32)
    groups[first : first + len(answer)] = numbers
    ids = np.concatenate([np.asarray(prompt, np.int32), answer]).astype(np.int32)
    others = np.concatenate([np.zeros(len(prompt), np.int32), numbers])
    assert np.count_nonzero(groups) == np.count_nonzero(others), "each token on both sides"
    return Beside(groups, ids, others)
