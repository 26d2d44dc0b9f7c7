"""Prompts as token ids, with text kept as text: raw, or as turns of a chat to be answered."""

import functools
import threading
from typing import Any

from jaxdistill.data import chat, encode, rendering
from jaxdistill.data.chat_template import RenderError
from jaxdistill.data.records import Record, parse
from jaxdistill.data.rules import text_problem
from jaxdistill.errors import DataError, ModelError


class Prompter:
    """Makes prompts for a model the way its training data is made.

    No string in a prompt becomes a special token, unless that is asked for: those are the
    tokenizer's and the template's. Any thread may call.

    Args:
      tokenizer: a transformers PreTrainedTokenizerFast.
      special_tokens: `text`, or `parse`: special tokens written in raw prompts are read as such,
        for whoever renders the chat template alone.

    Raises:
      ModelError: if it is not a fast tokenizer.
    """

    def __init__(self, tokenizer: Any, special_tokens: str = "text"):
        self._codec = encode.prepare(tokenizer)
        self._parse = special_tokens == "parse"
        # Whether special tokens are split is a state of the tokenizer, which calls switch.
        self._lock = threading.Lock()

    def text(self, prompt: str) -> list[int]:
        """The ids of a text that the model is to continue.

        Raises:
          DataError: if the tokenizer cannot encode it.
        """
        with self._lock:
            ids = text_problem(prompt) or encode.encode_text(self._codec, [prompt], self._parse)[0]
        if isinstance(ids, str):
            raise DataError(f"prompt: {ids}")
        return [*encode.prefix_of(self._codec, ids, self._parse), *ids]

    def turns(self, messages: Any) -> list[int]:
        """The ids of a conversation that the assistant is to go on with.

        Args:
          messages: objects with `role` and `content`, as in records of the kind `messages`; they
            may come from a stranger, so anything can be given.

        Raises:
          DataError: if they are no such messages, or the template refuses them.
          ModelError: if there is no usable chat template.
        """
        record = parse({"messages": messages}, "messages", 1)
        if not isinstance(record, Record):
            raise DataError(f"messages: {record.reason}")
        try:
            with self._lock:
                return self._chat.encode_prompt(record)
        except RenderError as error:
            raise DataError(f"messages: {error}") from error

    @functools.cached_property
    def _chat(self) -> chat.ChatEncoder:
        source = rendering.template_of(self._codec.tokenizer)
        if source is None:
            raise ModelError("the tokenizer has no chat template: use plain prompts")
        return chat.ChatEncoder(self._codec, source, "all")
