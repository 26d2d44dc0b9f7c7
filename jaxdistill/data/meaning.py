"""Fields that nobody reads: harmless ones, and those whose names and values would change a record.

Marks of what is learned go by many names. Those of `rules.MARKS` are read. Another name that says
loss, mask, train, weight or the like refuses its record if its value is a mark too: a flag, or
numbers. Text that a record holds under a name of another tool is refused with the name to use.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

from jaxdistill.data.rules import Unusable

RECORD = "the record"

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_LEARNING = frozenset(
    "train trains trained trainable untrained training learn learned learnable unlearned finetune "
    "supervise supervised unsupervised backprop gradient grad freeze frozen detach skip skipped "
    "ignore ignored exclude excluded".split()
)
_LOSS = frozenset("loss losses mask masks masked unmasked".split())
_WEIGHT = frozenset("weight weights weighting importance".split())
_OF = frozenset("sample token tokens example turn message record row text instance".split())
# Names of facts about training: a number behind them is none of its marks.
_FACT = frozenset(
    "id ids idx index step steps split set time epoch epochs no num number count date name file "
    "source size length path dataset version hash".split()
)
_YES_NO = ("true", "false", "yes", "no", "0", "1")
_MARK = "say `weight` 0 or 1 (0: not learned), or remove the field"
_IN_CHATS = {
    **dict.fromkeys(("context", "history"), "write it into the messages"),
    **dict.fromkeys(("system_prompt", "system_message"), "write it as `system`"),
    **dict.fromkeys(
        ("chosen_response", "chosen_messages", "rejected_response", "rejected_messages"),
        "write the two as `chosen` and `rejected`, or the chosen text as `completion`",
    ),
    "enable_thinking": "write it into `chat_template_kwargs`",
}
_IN_MESSAGES = {
    **dict.fromkeys(
        ("thought", "thoughts", "thinking_blocks", "reasoning_details", "reasoning_text",
         "analysis", "tool_plan"),
        "write it as `reasoning_content`",
    ),
    **dict.fromkeys(("tool_call", "function"), "write it as `tool_calls`"),
    **dict.fromkeys(("tool_results", "tool_responses", "tool_outputs"),
                    "write each as a message of the role `tool`"),
    **dict.fromkeys(("attachments", "file", "files", "image_urls", "video_url", "audio_url",
                     "input_audio"), "only text is read"),
}  # fmt: skip


def check(name: str, value: Any, where: str, kind: str) -> None:
    """Refuses a field that is not read and would change what is said or learned.

    Args:
      name: of the field.
      value: of the field.
      where: `the record`, or which message of it.
      kind: of the record.

    Raises:
      Unusable: naming the field and the remedy.
    """
    remedy = _remedy(name, value, where != RECORD, kind)
    if remedy is not None:
        raise Unusable(f"field `{name[:40]}` of {where} is not supported: {remedy}")


def _remedy(name: str, value: Any, in_message: bool, kind: str) -> str | None:
    if value in (None, "", [], {}):
        return None
    if in_message and name in _IN_MESSAGES:
        return _IN_MESSAGES[name]
    if kind != "text":
        if not in_message and name in _IN_CHATS:
            return _IN_CHATS[name]
        if name == "label" and isinstance(value, bool):
            return "keep the records whose answer is wanted, and remove the field"
    return _MARK if _is_mark(value, _marks(name)) else None


def may_matter(name: str) -> bool:
    """Whether a value of a field of this name could change a record: a table's column to read."""
    return name in _IN_CHATS or name == "label" or _marks(name) is not None


@functools.lru_cache(maxsize=4096)
def _marks(name: str) -> Literal["flag", "number"] | None:
    """What a field of this name holds where it says what is learned; None: it does not."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _FACT:
        return None
    if _LOSS & set(words) or (_WEIGHT & set(words) and set(words) <= _WEIGHT | _OF):
        return "number"
    return "flag" if _LEARNING & set(words) else None


def _is_mark(value: Any, holds: str | None) -> bool:
    if holds is None:
        return False
    if isinstance(value, list):
        return all(_is_mark(one, holds) for one in value)
    if isinstance(value, str):
        return value.strip().lower() in _YES_NO
    if isinstance(value, Mapping):
        return False
    return isinstance(value, bool | int | float) and (holds == "number" or value in (0, 1))
