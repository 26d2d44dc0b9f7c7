"""What the student writes, in the tokens of two models: its bytes, cut once more by the teacher's.

student   <user> hi <assistant> un|believ|able <end>      groups of tokens   1 1 2 3
teacher   [INST] hi [/INST] unbel|iev|able </s>                              1 1 2 3

Each model has the prompt as its own tokenizer or template has it; the answer alone is aligned. The
token that ended it is the teacher's that does. The result depends on the answer's tokens alone.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data import chat, encode, rendering
from jaxdistill.data.chat_template import RenderError
from jaxdistill.data.codec import Codec
from jaxdistill.data.encode import Document
from jaxdistill.data.matching import Around, around, bytes_of, matched
from jaxdistill.data.records import Record
from jaxdistill.data.rules import TooLong, Unaligned, text_problem
from jaxdistill.data.second_view import SecondView, cut, sided
from jaxdistill.errors import MismatchError, ModelError


class AnswerViews:
    """Prepares prompts, so that answers to them can be given in the tokens of two models.

    Args:
      view: of the teacher.
      codec: of the student's tokenizer.
      seq_len: tokens in a row of the student's view.
      chat_template: Jinja text in place of the student's own.
      template_kwargs: what the chat templates are given besides, each what it knows.

    Raises:
      MismatchError: for a tokenizer whose tokens stand for no fixed bytes.
    """

    def __init__(
        self,
        view: SecondView,
        codec: Codec,
        seq_len: int,
        chat_template: str | None,
        template_kwargs: Mapping[str, Any],
    ):
        self.codecs = codec, view.codec
        self.limits = seq_len, view.seq_len
        self.tables = bytes_of("student", codec), bytes_of("teacher", view.codec)
        self._made_of = view, chat_template, template_kwargs

    def of(self, record: Record, ours: Sequence[int]) -> "AnswerView | str":
        """What gives answers to a prompt in both models' tokens, or why nothing can.

        Args:
          record: the prompt.
          ours: its tokens, of the student.
        """
        if record.roles:
            return self._of_chat(record, ours)
        text = record.texts[0]
        theirs = encode.encode_text(self.codecs[1], [text])[0]
        if isinstance(theirs, str):
            return f"of the teacher's tokens: {theirs}"
        theirs = [*self.codecs[1].prefix, *theirs]
        for who, table, ids in zip(
            ("student", "teacher"), self.tables, (ours, theirs), strict=True
        ):
            try:
                table.spell(ids, text)
            except MismatchError as error:
                return f"the {who}'s {error}"
        return self._fitting(AnswerView(self, tuple(ours), tuple(theirs), text))

    def _of_chat(self, record: Record, ours: Sequence[int]) -> "AnswerView | str":
        try:
            theirs = self._chats[1].encode_prompt(self.sided(record)[1])
        except RenderError as error:
            return f"of the teacher's tokens: {error}"
        each = self._around
        if record.roles[-1] == "assistant":  # the answer goes on with what stands there
            each = tuple(one._replace(lead=b"") for one in each)
        return self._fitting(AnswerView(self, tuple(ours), tuple(theirs), None, each))

    def sided(self, record: Record) -> tuple[Record, ...]:
        """A conversation for the student's template, and for the teacher's."""
        return sided(record, self._templates)

    def _fitting(self, made: "AnswerView") -> "AnswerView | str":
        if len(made.theirs) >= self.limits[1]:
            return TooLong(
                f"too long: {len(made.theirs)} tokens of the teacher, which leave no room for an "
                f"answer in its rows of {self.limits[1]}"
            )
        return made

    @functools.cached_property
    def _chats(self) -> tuple[chat.ChatEncoder, ...]:
        sides = zip(self.codecs, self._templates, self.words, strict=True)
        return tuple(
            chat.ChatEncoder(codec, source, "assistant", known) for codec, source, known in sides
        )

    @functools.cached_property
    def _templates(self) -> tuple[str | None, str]:
        view, own, _ = self._made_of
        return view.templates(self.codecs[0], own)

    @functools.cached_property
    def words(self) -> list[dict[str, Any]]:
        """What the chat template of either model is given besides.

        Raises:
          DataError: if the teacher has none.
        """
        return rendering.divided(self._made_of[2], self._templates)

    @functools.cached_property
    def _around(self) -> tuple[Around, ...]:
        """What each template puts around an answer."""
        made = []
        for who, encoder, table in zip(
            ("student", "teacher"), self._chats, self.tables, strict=True
        ):
            affixes = around(encoder, table)
            if isinstance(affixes, str):
                raise ModelError(f"the {who}'s {affixes}")
            made.append(affixes)
        return tuple(made)


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerView:
    """A prompt in the tokens of two models, and what makes documents of answers to it.

    Attributes:
      of: what they have in common.
      ours, theirs: the prompt's tokens, of the student and of the teacher.
      text: the prompt; None of a conversation.
      each: of a conversation, what the student's template, and the teacher's, puts around answers.
    """

    of: AnswerViews
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    text: str | None
    each: tuple[Around, ...] = (Around(), Around())

    def document(self, answer: np.ndarray, ended: bool, counted: int) -> Document | str:
        """Prompt and answer in both models' tokens, or why they cannot be compared.

        Args:
          answer: int32 [N], the student's tokens, the one that ended it included.
          ended: whether one did.
          counted: so many tokens at its beginning are compared.
        """
        written = self._written(answer, ended)
        if isinstance(written, Unaligned):
            return written
        theirs = self._of_teacher(written, ended)
        if isinstance(theirs, str):
            return Unaligned(f"of the teacher's tokens: {theirs}")
        ids = np.concatenate([np.asarray(self.ours, np.int32), answer]).astype(np.int32)
        ours = Document(ids, np.arange(len(ids)) >= len(self.ours))
        whole = None if self.text is None else (self.text + written).encode()
        try:
            groups = matched((ours, theirs), self.of.tables, whole, self.each)
        except MismatchError as error:
            return Unaligned(str(error))
        loss = ours.loss & (np.arange(len(ids)) < len(self.ours) + counted)
        limited = dataclasses.replace(ours, loss=loss)
        pieces = cut((limited, theirs), groups, self.of.limits, "reject")
        if isinstance(pieces, str):
            return pieces
        nothing = Unaligned("nothing that both models predict ends at one place")
        return pieces[0] if pieces else nothing

    def _written(self, answer: np.ndarray, ended: bool) -> str:
        """What the student wrote; a reason, `Unaligned`, where it is no text."""
        tokens = answer[:-1] if ended else answer
        pieces = self.of.tables[0].pieces(tokens.tolist())
        if b"" in pieces:
            token = int(tokens[pieces.index(b"")])
            shown = self.of.codecs[0].tokenizer.convert_ids_to_tokens(token)
            return Unaligned(f"the student wrote the special token {shown!r} within its answer")
        spelled = b"".join(pieces).removeprefix(self.each[0].lead)
        if ended:
            spelled = spelled.removesuffix(self.each[0].tail)
        try:
            text = spelled.decode()
        except UnicodeDecodeError as error:
            return Unaligned(
                f"what the student wrote is no UTF-8 from byte {error.start} on, as where it ends "
                "inside a character"
            )
        return (
            Unaligned(f"what the student wrote {problem}")
            if (problem := text_problem(text))
            else text
        )

    def _of_teacher(self, written: str, ended: bool) -> Document | str:
        """Prompt and answer in the teacher's tokens, or why there are none."""
        codec = self.of.codecs[1]
        if self.text is not None:
            both = Record("completion", (self.text, written), 1)
            (made,) = encode.encode_completions(codec, [both], "completion")
            if isinstance(made, str) or ended or codec.end is None:
                return made
            return Document(made.ids[:-1], made.loss[:-1])
        lead, tail, end = self.each[1]
        # White space alone: a block of thoughts is not put before what may begin with one.
        text = ("" if lead.strip() else lead.decode()) + written
        text += tail.decode() if ended else ""
        ids = encode.encode_middle(codec, text) if text else []
        if isinstance(ids, str):
            return ids
        whole = [*self.theirs, *ids, *([end] if ended and end is not None else [])]
        loss = np.arange(len(whole)) >= len(self.theirs)
        return Document(np.asarray(whole, np.int32), loss)
