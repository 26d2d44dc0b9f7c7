"""Records of other shapes, turned into those that are read: ShareGPT and Alpaca."""

from collections.abc import Mapping
from typing import Any

from jaxdistill.data import rules
from jaxdistill.data.rules import Empty, Unusable, checked_text

# Who speaks, in ShareGPT's records and those that copied it.
_SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(
        ("gpt", "assistant", "model", "chatgpt", "bing", "bard", "claude"), "assistant"
    ),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
}
# The prompt of Stanford's Alpaca, with and without an input.
_PROMPT = (
    "Below is an instruction that describes a task{further}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_FURTHER = ", paired with an input that provides further context"


def sharegpt(value: Mapping[str, Any]) -> dict[str, Any]:
    """`conversations` of {from, value}, or of {role, content}, as `messages`.

    Raises:
      Unusable: with the reason.
    """
    turns = value["conversations"]
    if not isinstance(turns, list):
        kind = type(turns).__name__
        raise Unusable(f"wrong type: field `conversations` must be a list, got {kind}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise Unusable(
                f"wrong type: turn {number} must be an object, got {type(turn).__name__}"
            )
        rest = {name: item for name, item in turn.items() if name not in ("from", "value")}
        if "from" in turn:
            speaker = str(turn["from"])
            if speaker not in _SPEAKERS:
                raise Unusable(
                    f"unknown speaker {speaker[:40]!r} in turn {number}: use one of "
                    f"{', '.join(_SPEAKERS)}"
                )
            rest["role"] = _SPEAKERS[speaker]
        if "value" in turn:
            rest["content"] = turn["value"]
        messages.append(rest)
    return {**_without(value, "conversations"), "messages": messages}


def alpaca(value: Mapping[str, Any]) -> dict[str, Any]:
    """`instruction`, `input` and `output` as a conversation; `history` are earlier turns.

    Raises:
      Unusable: with the reason.
    """
    instruction, given, output = _alpaca(value)
    history = value.get("history") or []
    if not isinstance(history, list):
        raise Unusable("wrong type: field `history` must be a list of [question, answer]")
    messages = []
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unusable(f"wrong type: entry {number} of `history` must be [question, answer]")
        messages += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    asked = f"{instruction}\n\n{given}" if given else instruction
    messages += [_turn("user", asked), _turn("assistant", output)]
    rest = _without(value, "instruction", "input", "output", "history")
    return {**rest, "messages": messages}


def alpaca_prompt(value: Mapping[str, Any]) -> dict[str, Any]:
    """`instruction`, `input` and `output` as the prompt of Stanford's Alpaca and its completion.

    Raises:
      Unusable: with the reason.
    """
    instruction, given, output = _alpaca(value)
    prompt = _PROMPT.format(
        further=_FURTHER if given else "",
        instruction=instruction,
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    rest = _without(value, "instruction", "input", "output")
    return {**rest, "prompt": prompt, "completion": output}


CONVERTERS = {
    "sharegpt": ("messages", sharegpt),
    "alpaca": ("messages", alpaca),
    "alpaca_prompt": ("completion", alpaca_prompt),
}


def _alpaca(value: Mapping[str, Any]) -> tuple[str, str, str]:
    """Instruction, input and output, checked."""
    texts = []
    for name in ("instruction", "input", "output"):
        given = value.get(name)
        texts.append("" if given is None else checked_text(given, f"field `{name}`"))
    if not texts[2].strip():
        raise Unusable(Empty("empty: field `output` has no text"))
    return texts[0], texts[1], texts[2]


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _without(value: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The other fields of a record, which are read or listed like those of any."""
    rules.check_refused(value, "the record")
    return {name: item for name, item in value.items() if name not in names}
