"""Rules that hold for every record: texts that can be tokenised, marks, and why one is left out."""

from collections.abc import Mapping
from typing import Any

MAX_RECORD_BYTES = 10_000_000

# Fields that say whether a turn, or a record, is learned: what their value means.
MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "masked")
# They change what a record says or what is learned of it, in ways that are not built: a record
# that has one is refused. The value is the remedy.
REFUSED: Mapping[str, str] = {
    "functions": "write them as `tools`",
    "function_call": "write it as `tool_calls`",
    "train_detail": "write `weight` 0 or 1 for a whole message",
    "training_detail": "write `weight` 0 or 1 for a whole message",
    "mask": "say `masked` (true: not learned) or `weight` (0: not learned)",
    **dict.fromkeys(
        ("train_on", "train_on_turn", "learn", "is_masked", "ignore_loss"),
        "say `masked` (true: not learned) or `weight` (0: not learned)",
    ),
    **dict.fromkeys(
        ("weights", "loss_weight", "loss_weights", "masks", "loss_masks", "assistant_masks"),
        "write `weight` 0 or 1 for each message",
    ),
    "labels": "say with data.loss_on and `weight` what is learned",
    "documents": "write them into a message",
    "chosen": "use `format: pairs`, or write the chosen text as `completion`",
    "rejected": "use `format: pairs`, or write the chosen text as `completion`",
    **dict.fromkeys(
        ("image", "images", "image_url", "video", "videos", "audio", "audios"), "only text is read"
    ),
    "refusal": "write it as `content`",
}


class Empty(str):
    """A reason: there is nothing in the record. It is skipped and counted, and no broken one."""


class Unlearned(str):
    """A reason: the record says itself that it is not to be learned."""


class TooLong(str):
    """A reason: what is to be learned does not fit into a row."""


class Unaligned(str):
    """A reason: no tokens behind the first spell the same bytes as tokens of a second model."""


class WithoutContext(str):
    """A reason: the record holds nothing that a teacher could be told beside the prompt."""


class Unusable(Exception):
    """Carries the reason from the rule that failed."""


def reason_of(unusable: Unusable) -> str:
    """The reason, of its own class."""
    return unusable.args[0]


def printable(text: str) -> str:
    r"""The text with every control character but the line end written as an escape, `\x1b`."""
    return "".join(
        character
        if character == "\n" or character.isprintable()
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def names_of(value: Mapping[str, Any]) -> str:
    """The first few field names of an object, for a message."""
    return ", ".join(f"`{name[:40]}`" for name in list(value)[:8]) or "no fields"


def text_problem(text: str) -> str | None:
    """Why a text cannot be tokenised, or None."""
    if "\0" in text:
        return "contains a NUL character"
    try:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "contains a lone surrogate, which is not Unicode text"
    if size > MAX_RECORD_BYTES:
        return f"too large: more than {MAX_RECORD_BYTES // 1_000_000} MB"
    return None


def checked_text(value: Any, what: str) -> str:
    """The text, if it can be tokenised.

    Raises:
      Unusable: with the reason.
    """
    if not isinstance(value, str):
        raise Unusable(f"wrong type: {what} must be a string, got {type(value).__name__}")
    problem = text_problem(value)
    if problem:
        raise Unusable(f"{what} {problem}")
    return value


def mark_of(value: Mapping[str, Any], where: str) -> bool | None:
    """Whether an object says of itself that it is learned; None: it says nothing.

    Args:
      value: a message or a record.
      where: which, for the reason.

    Raises:
      Unusable: for a value that is neither yes nor no, and for marks that contradict each other.
    """
    given_by_name: dict[str, bool] = {}
    for name in MARKS:
        given = value.get(name)
        if given is None:
            continue
        # A loss or a weight between 0 and 1 would have to be multiplied in, which is not built.
        if not isinstance(given, bool | int | float) or given not in (0, 1):
            raise Unusable(
                f"field `{name}` of {where} is {str(given)[:40]!r}: use true, false, 0 or 1, or "
                "remove the field"
            )
        given_by_name[name] = bool(given) != (name == "masked")
    if len(set(given_by_name.values())) > 1:
        names = " and ".join(f"`{name}`" for name in given_by_name)
        raise Unusable(f"fields {names} of {where} contradict each other")
    return next(iter(given_by_name.values()), None)


def check_refused(
    value: Mapping[str, Any], where: str, refused: Mapping[str, str] = REFUSED
) -> None:
    """Refuses fields that change the meaning and are not read, each with its remedy.

    Raises:
      Unusable: naming the field and the remedy.
    """
    for name, remedy in refused.items():
        if value.get(name) not in (None, [], {}, ""):
            raise Unusable(f"field `{name}` of {where} is not supported: {remedy}")
