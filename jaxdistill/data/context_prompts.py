"""The teacher's prompts beside the student's, where the student answers: told by the record."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from jaxdistill.data import chat, rendering
from jaxdistill.data.chat_template import RenderError
from jaxdistill.data.codec import Codec
from jaxdistill.data.context_names import SIBLING
from jaxdistill.data.privileged import PrivilegedView, text_prompt
from jaxdistill.data.records import Record
from jaxdistill.data.tally import Tally


class ContextPrompts:
    """Makes the teacher's prompts of records that the student is to answer.

    Args:
      view: of the teacher.
      codec: of the tokenizer.
      longest: tokens of the longest prompt that leaves room for an answer.

    Attributes:
      of_siblings: whether the view asks for a right answer, see `PrivilegedView`.
      missing: the same view's.
      tally: what there is to say of the contexts.
    """

    def __init__(self, view: PrivilegedView, codec: Codec, longest: int):
        self._view, self._codec, self._longest = view, codec, longest
        self.of_siblings, self.missing = view.of_siblings, view.missing
        self.tally = Tally()

    def __call__(
        self, record: Record, ours: Sequence[int], parse: bool, sibling: str | None = None
    ) -> np.ndarray | str:
        """The tokens of the teacher's prompt, or why there are none.

        Args:
          record: a prompt.
          ours: the tokens of the student's.
          parse: whether special tokens that are written in texts are special.
          sibling: a right answer to it; None where none is asked for.
        """
        view = self._view
        if reason := view.missing(record):
            return reason
        make = functools.partial(self._made, record, parse)
        notes = record.notes if sibling is None else {**record.notes, SIBLING: sibling}
        ids, cut = view.fitted(make, notes, self._longest)
        if isinstance(ids, str):
            return ids
        if reason := view.apart(ours, ids, bool(record.roles)):
            return reason
        self.tally.contexts["cut"] += cut
        answer = record.notes.get("answer", "")
        self.tally.contexts["answers"] += sibling is None and view.says_no_more(record, answer)
        return np.asarray(ids, np.int32)

    @functools.cached_property
    def _chat(self) -> chat.ChatEncoder:
        view = self._view
        view.check_turns()
        kwargs = {**view.template_kwargs, **view.own_kwargs}
        source = rendering.template_of(view.tokenizer, view.chat_template)
        return chat.ChatEncoder(self._codec, source, "all", kwargs)

    def _made(self, record: Record, parse: bool, values: Mapping[str, str]) -> list[int] | str:
        if not record.roles:
            return text_prompt(self._view.filled(record.texts[0], values), self._codec, parse)
        try:
            return self._chat.encode_prompt(self._view.turned(record, values))
        except RenderError as error:
            return str(error)
