"""One training record: its kinds, and the rules that make it usable."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdistill.data import meaning, rules
from jaxdistill.data.conversations import Conversation, parse_turns
from jaxdistill.data.converters import CONVERTERS
from jaxdistill.data.rules import Empty, Unlearned, Unusable, checked_text

# The fields that make a record of each kind. sharegpt and alpaca are converted into the others;
# of prompts one of two fields is needed.
KINDS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "alpaca_prompt": ("instruction", "output"),
    "pairs": ("chosen", "rejected"),
    "prompts": (),
}
# What `auto` looks for: alpaca_prompt and prompts are choices that a record cannot show.
SHOWN_KINDS = ("text", "messages", "completion", "sharegpt", "alpaca", "pairs")
# The kinds of records that are a pair of answers -> the kind of either answer with its prompt.
PAIRS: Mapping[str, str] = {"pairs": "completion", "dialogue_pairs": "dialogue"}
TEACHER = "teacher"  # the field that names one of several
_ALWAYS = (*rules.MARKS, *rules.REFUSED, TEACHER)
_BESIDE = ("tools", "system", "chat_template_kwargs")
# What would be missing in what the student reads, by kind: where it goes.
LOST: Mapping[str, Mapping[str, str]] = {
    "completion": dict.fromkeys(
        ("input", "context", "history", "system_prompt", "system_message"), "write it into `prompt`"
    )
    | {"suffix": "write what stands before the completion into `prompt`"},
    "prompts": dict.fromkeys(("input", "context", "suffix"), "write it into `prompt`"),
    "pairs": dict.fromkeys(("input", "context", "suffix"), "write it into `prompt`"),
    "alpaca": {"context": "write it as `input`"},
    "alpaca_prompt": {
        "context": "write it as `input`",
        **dict.fromkeys(
            ("history", "system", "system_prompt", "system_message", "tools"),
            "use `format: alpaca`, or write it into `instruction`",
        ),
    },
}
# What is kept beside a prompt: for who judges answers, gives them context, or routes them.
COMPLETION = "completion"
NOTES = ("answer", "solution", TEACHER, COMPLETION, "demonstration", "feedback",
         "privileged_context")  # fmt: skip
_NAME = 100  # characters of the name of a teacher that are looked at
# What a record may have besides the fields of its kind. Of what else it has the names are listed.
READ: Mapping[str, frozenset[str]] = {
    "text": frozenset({"text", *_ALWAYS}),
    "messages": frozenset({"messages", *_BESIDE, *_ALWAYS}),
    "completion": frozenset({"prompt", "completion", *_BESIDE, *_ALWAYS}),
    "sharegpt": frozenset({"conversations", *_BESIDE, *_ALWAYS}),
    "alpaca": frozenset({"instruction", "input", "output", "history", *_BESIDE, *_ALWAYS}),
    "alpaca_prompt": frozenset({"instruction", "input", "output", *_ALWAYS}),
    "pairs": frozenset({"prompt", "chosen", "rejected", *_BESIDE, *_ALWAYS}),
    "prompts": frozenset({"prompt", "completion", "messages", *NOTES, *_BESIDE, *_ALWAYS}),
}


def teacher_key(name: str | None) -> str:
    """The key of a teacher's section: "teachers.NAME" of several, "teacher" (None) of one."""
    return "teacher" if name is None else f"teachers.{name}"


@dataclasses.dataclass(frozen=True)
class Record:
    """A usable record.

    Attributes:
      kind: text, messages, completion, or dialogue: prompt and completion of a conversation; or
        prompt, a text or messages that somebody is to answer; or one of PAIRS.
      texts: one text; or prompt and completion; or the contents of the messages; of a pair those
        of both answers.
      line: where it stands in its file, from 1 (a line, a row of a table, a document).
      roles: the roles of the messages, else empty.
      opens: False for the later pieces of one long text: no beginning-of-text token.
      closes: False for all but the last piece of one long text: no end-of-text token.
      conversation: what messages hold besides roles and texts; None: nothing.
      notes: those of NOTES that it has and that its kind does not read; its TEACHER.
      answers: of a pair the chosen and the rejected answer, each a record with the prompt.
    """

    kind: str
    texts: tuple[str, ...]
    line: int
    roles: tuple[str, ...] = ()
    opens: bool = True
    closes: bool = True
    conversation: Conversation | None = None
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    answers: tuple["Record", ...] = ()


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


NumberedObjects = Iterator[tuple[int, Any] | Rejected]  # each with its line


def kinds_of(value: Mapping[str, Any]) -> list[str]:
    """The kinds whose fields an object has, all of them."""
    return [kind for kind in SHOWN_KINDS if has_fields(value, kind)]


def has_fields(value: Mapping[str, Any], kind: str) -> bool:
    """Whether an object has the fields that make a record of a kind."""
    return all(field in value for field in KINDS[kind])


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
        record = _parsed(value, kind, line, set() if unread is None else unread)
    except Unusable as unusable:
        return Rejected(line, unusable.args[0])
    notes = {} if kind == "prompts" else _notes(value, kind)
    return dataclasses.replace(record, notes=notes) if notes else record


def _notes(value: Mapping[str, Any], kind: str) -> dict[str, str]:
    """What stands beside a record that is learned itself."""
    named = value.get(TEACHER)
    teacher = {} if named is None else {TEACHER: str(named)[:_NAME]}
    beside = {name: value[name] for name in NOTES if name in value and name not in READ[kind]}
    sound = lambda text: isinstance(text, str) and rules.text_problem(text) is None
    return teacher | {name: text for name, text in beside.items() if sound(text)}


def _parsed(value: Mapping[str, Any], kind: str, line: int, unread: set[str]) -> Record:
    if len(value) > len(KINDS[kind]):
        refused = {name: why for name, why in rules.REFUSED.items() if name not in KINDS[kind]}
        rules.check_refused(value, "the record", refused)
        rules.check_refused(value, "the record", LOST.get(kind, {}))
        for name in value:
            if name not in READ[kind]:
                meaning.check(name, value[name], "the record", kind=kind)
                unread.add(name)
        if rules.mark_of(value, "the record") is False:
            raise Unusable(Unlearned("the record is marked as not learned"))
    if kind == "prompts":
        return _prompt(value, line, unread)
    if kind == "pairs":
        return _pair(value, line, unread)
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


def _pair(value: Mapping[str, Any], line: int, unread: set[str]) -> Record:
    """Two answers to one prompt: texts, or turns; of whole conversations what both begin with."""
    prompt, chosen, rejected = (value.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) is not isinstance(rejected, list):
        raise Unusable("`chosen` and `rejected` must both be texts, or both be lists of turns")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        prompt, chosen, rejected = _shared(prompt, chosen, rejected)
    elif prompt is None:
        raise Unusable(f"missing field `prompt`: found {rules.names_of(value)}")
    if chosen == rejected:
        raise Unusable(
            Unlearned("`chosen` and `rejected` are the same: there is nothing to prefer")
        )
    beside = {name: value[name] for name in _BESIDE if name in value}
    first, second = (
        _parsed({"prompt": prompt, "completion": answer, **beside}, "completion", line, unread)
        for answer in (chosen, rejected)
    )
    kind = next(pair for pair, one in PAIRS.items() if one == first.kind)
    roles = first.roles + second.roles
    return Record(kind, first.texts + second.texts, line, roles, answers=(first, second))


def _shared(prompt: Any, chosen: list, rejected: list) -> tuple[list, list, list]:
    """The turns that two conversations begin with, and what follows in each.

    Raises:
      Unusable: if they share none, or the prompt that stands beside them is another.
    """
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    if not count:
        raise Unusable("`chosen` and `rejected` share no first turn: give `prompt` as turns")
    before = chosen[:count]
    last = before[-1].get("content") if isinstance(before[-1], Mapping) else None
    if prompt is not None and prompt != last:
        raise Unusable(
            "`prompt` is not the last turn that `chosen` and `rejected` share: leave it out, or "
            "give it as turns and the answers alone"
        )
    if count in (len(chosen), len(rejected)):
        raise Unusable("one of `chosen` and `rejected` ends where the other goes on: no pair")
    return before, chosen[count:], rejected[count:]


def _prompt(value: Mapping[str, Any], line: int, unread: set[str]) -> Record:
    """A prompt: a text, or messages up to the last answer, which is not read."""
    notes = {
        name: checked_text(value[name], f"field `{name}`")
        for name in NOTES
        if value.get(name) is not None and name != COMPLETION
    }
    notes |= _answered(value)
    given = [name for name in ("prompt", "messages") if value.get(name) is not None]
    if len(given) != 1:
        names = rules.names_of(value) if not given else "both"
        raise Unusable(f"a prompt stands in `prompt` or in `messages`: found {names}")
    asked = value[given[0]]
    if isinstance(asked, str) and given == ["prompt"]:
        for name in _BESIDE:
            if value.get(name):
                raise Unusable(f"field `{name}` belongs to a conversation, not to plain text")
        text = checked_text(asked, "field `prompt`")
        if not text.strip():
            raise Unusable(Empty("empty: field `prompt` has no text"))
        return Record("prompt", (text,), line, notes=notes)
    others = {name: value[name] for name in _BESIDE if name in value}
    turns = parse_turns({"messages": asked, **others}, unread)
    count = len(turns.roles)
    while count and turns.roles[count - 1] == "assistant":
        count -= 1
    if not count:
        raise Unusable(Empty("empty: there is no message before the assistant's"))
    more = turns.conversation and dataclasses.replace(
        turns.conversation,
        fields=turns.conversation.fields[:count],
        marks=turns.conversation.marks[:count],
    )
    return Record(
        "prompt", turns.texts[:count], line, turns.roles[:count], conversation=more, notes=notes
    )


def _answered(value: Mapping[str, Any]) -> dict[str, str]:
    """The given answer to a prompt, a text or the assistant's last turn, where there is one."""
    text = value.get(COMPLETION) or value.get("messages")
    if isinstance(text, list):
        *_, before, last = ({}, {}, *(turn for turn in text if isinstance(turn, Mapping)))
        one = last.get("role") == "assistant" != before.get("role")
        text = last.get("content") if one else None
    sound = isinstance(text, str) and text.strip() and rules.text_problem(text) is None
    return {COMPLETION: text} if sound else {}
