"""Text beside the generation engine: prompts as token ids, stop strings, texts of completions."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from jaxdistill.errors import ModelError
from jaxdistill.models.requests import Completion, Request

TextsOrTokens = Sequence[str] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """Ends a row where one of some strings is complete in its text; a `requests.Stop`.

    Attributes:
      tokenizer: of the model.
      strings: what ends a row.
      special: ids of those strings that are one special token, which the text does not show.
    """

    tokenizer: Any
    strings: tuple[str, ...]
    special: frozenset[int] = frozenset()

    def __call__(self, tokens: Sequence[int], seen: int) -> int | None:
        """How many tokens there are up to the one that completes a string, or None."""
        sizes = range(seen + 1, len(tokens) + 1)
        ended = next((n for n in sizes if tokens[n - 1] in self.special), None)
        if not self._has_one(decode(self.tokenizer, tokens[:ended])):
            return ended
        sizes = range(seen + 1, len(tokens[:ended]) + 1)
        return next((n for n in sizes if self._has_one(decode(self.tokenizer, tokens[:n]))), ended)

    def _has_one(self, text: str) -> bool:
        return any(stop in text for stop in self.strings)

    def before(self, text: str) -> str:
        """What stands before the first of the strings; all, where a special token ended it."""
        return text[
            : min((text.index(stop) for stop in self.strings if stop in text), default=None)
        ]


def stop_at(tokenizer: Any, strings: Iterable[str]) -> StopStrings | None:
    """What a request's `stop` is for some strings; None for no strings.

    Raises:
      ModelError: for an empty string, or without a tokenizer.
    """
    strings = tuple(strings)
    if "" in strings:
        raise ModelError(f"generate: stop: {strings} must be strings that are not empty")
    if strings and tokenizer is None:
        raise ModelError("generate: stop: needs a tokenizer: use stop_tokens")
    if not strings:
        return None
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = (id_ for id_, token in added.items() if token.special and token.content in strings)
    return StopStrings(tokenizer, strings, frozenset(special))


def stops_of(request: Request) -> tuple[str, ...]:
    """The strings that end a request's rows."""
    return request.stop.strings if isinstance(request.stop, StopStrings) else ()


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens that a model wrote, without special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=True)


def text_of(tokenizer: Any, done: Completion) -> str:
    """The text of a completion, without the end token and the stop string."""
    stop = done.request.stop
    if done.reason == "stop" and isinstance(stop, StopStrings):
        whole = decode(tokenizer, done.tokens)  # a token that ends a text may be the stop's last
        if (cut := stop.before(whole)) != whole:
            return cut
    return decode(tokenizer, done.content)


def token_ids(tokenizer: Any, prompts: TextsOrTokens, source: str = "") -> list[list[int]]:
    """The prompts as token ids; texts as the tokenizer begins them.

    Args:
      tokenizer: of the model, or None.
      prompts: texts, or lists of token ids.
      source: the model's name, for messages.

    Raises:
      ModelError: for texts without a tokenizer.
    """
    if not any(isinstance(prompt, str) for prompt in prompts):
        return [[int(token) for token in row] for row in prompts]
    if tokenizer is None:
        raise ModelError(
            f"generate: {source or 'the model'} has no tokenizer: give prompts as token ids"
        )
    return tokenizer(list(prompts))["input_ids"]
