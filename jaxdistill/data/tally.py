"""What is counted of records while they become documents, for what a user is told in the end."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass
class Tally:
    """Counts of records, which several encoders may keep apart and add up.

    Attributes:
      rendered: plain records that hold special tokens as text.
      shown_control: one of these.
      ends_turns: False once a turn of the assistant was seen that ends without a special token.
      said: characters of the assistant's messages.
      dropped: those that the template leaves out.
      shortened: conversations in which it leaves some out.
      altered: conversations in which it changes some, who knows how.
      unprinted: names of fields that it was given, does not print, and that hardly matter.
      stalled: conversations for which it did not end.
      contexts: of `privileged`, records by what there is to say of their contexts.
    """

    rendered: int = 0
    shown_control: str | None = None
    ends_turns: bool = True
    said: int = 0
    dropped: int = 0
    shortened: int = 0
    altered: int = 0
    unprinted: set[str] = dataclasses.field(default_factory=set)
    stalled: int = 0
    contexts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, later: "Tally") -> None:
        """Adds what was counted of records that follow."""
        for name in ("rendered", "said", "dropped", "shortened", "altered", "stalled"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.shown_control = self.shown_control or later.shown_control
        self.ends_turns &= later.ends_turns
        self.unprinted |= later.unprinted
        self.contexts += later.contexts

    def taken(self) -> "Tally":
        """What was counted so far; counting begins anew."""
        taken = dataclasses.replace(self)
        vars(self).update(vars(Tally()))
        return taken

    def to_json(self) -> dict[str, Any]:
        """As JSON, for `from_json`."""
        return vars(self) | {"unprinted": sorted(self.unprinted)}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Tally":
        """What `to_json` described."""
        made = cls()
        vars(made).update(facts)
        made.unprinted, made.contexts = set(made.unprinted), collections.Counter(made.contexts)
        return made

    def of_texts(self) -> Iterator[str]:
        """What the user should know about the plain records."""
        if self.rendered:
            yield (
                f"{self.rendered} records hold special tokens as text, such as "
                f"{self.shown_control!r}: they stay text; data.special_tokens: parse reads them "
                "as special tokens, for text that is rendered already"
            )

    def of_contexts(self, used: int) -> Iterator[str]:
        """What the user should know about the contexts of so many records."""
        if self.contexts["cut"]:
            yield (
                f"the context of {self.contexts['cut']} of {used} records was cut to leave room "
                "for the answer"
            )
        if self.contexts["answers"]:
            yield (
                f"the context of {self.contexts['answers']} of {used} records is the answer, or "
                "a part of it: the teacher copies it, and the student learns what fine-tuning on "
                "the answers teaches"
            )

    def of_conversations(self) -> Iterator[str]:
        """What the user should know about the conversations."""
        if not self.ends_turns:
            yield (
                "some turns of the assistant end without a special token in the chat template "
                "({% generation %} may leave it out): the student is not taught when to stop there"
            )
        if self.dropped:
            yield (
                f"the chat template leaves out {self.dropped} of {self.said} characters "
                f"({self.dropped / self.said:.2%}) of the assistant's text, in "
                f"{self.shortened} conversations, such as the thinking of earlier turns: "
                "data.turns: each learns every turn as the last one, as it is written when the "
                "model is asked; data.chat_template takes another template"
            )
        if self.altered:
            yield (
                f"the chat template changes the assistant's text in {self.altered} conversations: "
                "look at rows with `preview`"
            )
        if self.unprinted:
            names = ", ".join(f"`{name}`" for name in sorted(self.unprinted))
            yield f"the chat template does not print the fields {names} of tools' messages"
