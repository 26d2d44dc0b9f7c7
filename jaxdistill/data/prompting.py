"""Prompts as token ids, with text kept as text: raw, or as turns of a chat to be answered."""

import functools
import json
import threading
from collections.abc import Mapping
from typing import Any

from jaxdistill.commands.kinds import SpecialTokens
from jaxdistill.data import chat, encode, rendering
from jaxdistill.data.chat_template import RenderError, VariableError
from jaxdistill.data.codec import prepare
from jaxdistill.data.records import Record, parse
from jaxdistill.data.rules import text_problem
from jaxdistill.errors import DataError, ModelError


class Prompter:
    """Makes prompts for a model the way its training data is made.

    No string in a prompt becomes a special token, unless that is asked for: those are the
    tokenizer's and the template's. Any thread may call.

    Args:
      tokenizer: a transformers PreTrainedTokenizerFast.

    Raises:
      ModelError: if it is not a fast tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._codec = prepare(tokenizer)
        # Whether special tokens are split is a state of the tokenizer, which calls switch.
        self._lock = threading.Lock()

    def text(self, prompt: str, special_tokens: SpecialTokens = "text") -> list[int]:
        """The ids of a text that the model is to continue.

        Args:
          prompt: the text.
          special_tokens: what the string of a special token is: text, the token, or refused.

        Raises:
          DataError: if the tokenizer cannot encode it, or it holds what is refused.
        """
        control = self._codec.control_pattern.search(prompt)
        if control and special_tokens == "refuse":
            raise DataError(
                f"prompt: holds the special token {control[0]!r}, which would be read as plain "
                "text: send the conversation as messages, or token ids; or start the server with "
                "--special-tokens parse (it is the token) or text (it is plain text)"
            )
        parse = control is not None and special_tokens == "parse"
        with self._lock:
            ids = text_problem(prompt) or encode.encode_text(self._codec, [prompt], parse)[0]
        if isinstance(ids, str):
            raise DataError(f"prompt: {ids}")
        return [*encode.prefix_of(self._codec, ids, parse), *ids]

    def turns(self, messages: Any, variables: Mapping[str, Any] | None = None) -> list[int]:
        """The ids of a conversation that the assistant is to go on with.

        The assistant begins a turn, or goes on with the last one if that is its own.

        Args:
          messages: objects with `role` and `content`, as in records of the kind `messages`; they
            may come from a stranger, so anything can be given.
          variables: further variables for the template, such as enable_thinking.

        Raises:
          DataError: if they are no such messages, or the template refuses them.
          ModelError: if there is no usable chat template.
        """
        record = parse({"messages": messages}, "messages", 1)
        if not isinstance(record, Record):
            raise DataError(f"messages: {record.reason}")
        # What a template prints of a variable would be read as its own words.
        variables = dict(variables or {})
        printed = json.dumps(variables, ensure_ascii=False)
        if control := self._codec.control_pattern.search(printed):
            raise DataError(f"chat_template_kwargs: must not hold the special token {control[0]!r}")
        try:
            with self._lock:
                return self._chat.encode_prompt(record, variables)
        except VariableError as error:
            raise DataError(str(error)) from error
        except RenderError as error:
            raise DataError(f"messages: {error}") from error

    @functools.cached_property
    def _chat(self) -> chat.ChatEncoder:
        source = rendering.template_of(self._codec.tokenizer)
        if source is None:
            raise ModelError("the tokenizer has no chat template: use plain prompts")
        return chat.ChatEncoder(self._codec, source, "all")
