"""One training record: its kinds, and the rules that make it usable."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdistill.data import rules
from jaxdistill.data.conversations import Conversation, parse_turns
from jaxdistill.data.converters import CONVERTERS
from jaxdistill.data.rules import Empty, Unlearned, Unusable, checked_text

# The fields that make a record of each kind. The last three are converted into the others.
KINDS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "alpaca_prompt": ("instruction", "output"),
}
# What `auto` looks for: alpaca_prompt is a choice that a record cannot show.
SHOWN_KINDS = ("text", "messages", "completion", "sharegpt", "alpaca")
_ALWAYS = (*rules.MARKS, *rules.REFUSED)
_BESIDE = ("tools", "system", "chat_template_kwargs")
# What a record may have besides the fields of its kind. Of what else it has the names are listed.
READ: Mapping[str, frozenset[str]] = {
    "text": frozenset({"text", *_ALWAYS}),
    "messages": frozenset({"messages", *_BESIDE, *_ALWAYS}),
    "completion": frozenset({"prompt", "completion", *_BESIDE, *_ALWAYS}),
    "sharegpt": frozenset({"conversations", *_BESIDE, *_ALWAYS}),
    "alpaca": frozenset({"instruction", "input", "output", "history", *_BESIDE, *_ALWAYS}),
    "alpaca_prompt": frozenset({"instruction", "input", "output", *_ALWAYS}),
}


@dataclasses.dataclass(frozen=True)
class Record:
    """A usable record.

    Attributes:
      kind: text, messages, completion, or dialogue: prompt and completion of a conversation.
      texts: one text; or prompt and completion; or the contents of the messages.
      line: where it stands in its file, from 1 (a line, a row of a table, a document).
      roles: the roles of the messages, else empty.
      opens: False for the later pieces of one long text: no beginning-of-text token.
      closes: False for all but the last piece of one long text: no end-of-text token.
      conversation: what messages hold besides roles and texts; None: nothing.
    """

    kind: str
    texts: tuple[str, ...]
    line: int
    roles: tuple[str, ...] = ()
    opens: bool = True
    closes: bool = True
    conversation: Conversation | None = None


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that is left out.

    Attributes:
      line: where it stands in its file, from 1.
      reason: why, in words for the person who repairs the file; one of the classes of `rules`
        where the record is not broken.
    """

    line: int
    reason: str


def kinds_of(value: Mapping[str, Any]) -> list[str]:
    """The kinds whose fields an object has, all of them."""
    return [kind for kind in SHOWN_KINDS if all(field in value for field in KINDS[kind])]


def parse(
    value: Any, kind: str, line: int, unread: set[str] | None = None, table: bool = False
) -> Record | Rejected:
    """Checks one decoded object against the rules of its kind.

    Args:
      value: what the file holds, of any type.
      kind: a key of KINDS.
      line: where it stands in its file.
      unread: gets the names of fields that are not read and do not change the meaning.
      table: whether it is the row of a table, in which a field that is missing is a null.

    Returns:
      A Record, or Rejected with the reason.
    """
    try:
        if not isinstance(value, Mapping):
            raise Unusable(f"not an object: got {type(value).__name__}")
        for field in KINDS[kind]:
            if field not in value:
                empty = table and not any(name in value for name in KINDS[kind])
                reason = f"missing field `{field}`: found {rules.names_of(value)}"
                raise Unusable(Empty(f"empty: field `{field}` is null") if empty else reason)
        return _parsed(value, kind, line, set() if unread is None else unread)
    except Unusable as unusable:
        return Rejected(line, unusable.args[0])


def _parsed(value: Mapping[str, Any], kind: str, line: int, unread: set[str]) -> Record:
    if len(value) > len(KINDS[kind]):
        unread.update(name for name in value if name not in READ[kind])
        rules.check_refused(value, "the record")
        if rules.mark_of(value, "the record") is False:
            raise Unusable(Unlearned("the record is marked as not learned"))
    if kind in CONVERTERS:
        kind, convert = CONVERTERS[kind]
        value = convert(value)
    if kind == "messages" or (kind == "completion" and isinstance(value["completion"], list)):
        turns = parse_turns(value, unread)
        named = "messages" if kind == "messages" else "dialogue"
        return Record(named, turns.texts, line, turns.roles, conversation=turns.conversation)
    for name in _BESIDE:
        if kind == "completion" and value.get(name):
            raise Unusable(f"field `{name}` belongs to a conversation, not to plain text")
    texts = tuple(
        "" if value[field] is None else checked_text(value[field], f"field `{field}`")
        for field in KINDS[kind]
    )
    if not texts[-1].strip():
        raise Unusable(Empty(f"empty: field `{KINDS[kind][-1]}` has no text"))
    return Record(kind, texts, line)
