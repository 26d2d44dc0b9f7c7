"""From a request of the protocol to the engine's, and from its completions to the answer."""

import dataclasses
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.commands.kinds import SpecialTokens
from jaxdistill.data.prompting import Prompter
from jaxdistill.errors import ModelError
from jaxdistill.models import Model, text
from jaxdistill.models.requests import Completion, FieldNames, Request, check
from jaxdistill.serve import protocol
from jaxdistill.serve.engine import Engine
from jaxdistill.serve.logprobs import Told
from jaxdistill.serve.protocol import BadRequest, Body, ChatBody, CompletionBody


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one client asked for.

    Attributes:
      body: in the protocol's words.
      requests: in the engine's, one for each prompt.
    """

    body: Body
    requests: Sequence[Request]

    @property
    def chat(self) -> bool:
        """Whether it is a conversation."""
        return isinstance(self.body, ChatBody)


class Service:
    """A model behind the protocol. Any thread may call.

    Args:
      model: with a tokenizer.
      slots: answers that are written at the same time.
      length: tokens of a prompt and its answer together.
      special_tokens: what is done with the string of a special token in a plain prompt.

    Raises:
      ModelError: if the model has no tokenizer.
    """

    def __init__(
        self, model: Model, *, slots: int, length: int, special_tokens: SpecialTokens = "refuse"
    ):
        if model.tokenizer is None:
            raise ModelError(f"{model.source}: has no tokenizer: texts need one")
        self.model, self._length, self._special_tokens = model, length, special_tokens
        self._prompter, self._told = Prompter(model.tokenizer), Told(model.tokenizer)
        self.engine = Engine(model, slots=slots, length=length)

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.model.source

    def check_name(self, name: str) -> None:
        """Raises NoModel where a client means another model; "" is this one."""
        if name and name != self.name:
            raise protocol.NoModel(f"the model {name[:80]!r} does not exist; there is {self.name}")

    def read(self, given: Mapping[str, Any], *, chat: bool) -> Asked:
        """What a request of the protocol asks for.

        Raises:
          BadRequest, UserError: with what is wrong with it.
          NoModel: if it is for another model.
        """
        if chat:
            body = protocol.read(ChatBody, given)
            self.check_name(body.model)
            prompts = [self._turns(body)]
        else:
            body = protocol.read(CompletionBody, given)
            self.check_name(body.model)
            prompts = [self._tokens(prompt) for prompt in body.prompts]
        seed = uuid.uuid4().int & 0xFFFFFFFF if body.seed is None else body.seed
        requests = [
            self._request(body, tokens, seed, number) for number, tokens in enumerate(prompts)
        ]
        for number, request in enumerate(requests):
            prompt = "messages" if chat else f"prompt.{number}" if len(prompts) > 1 else "prompt"
            words = FieldNames(prompt, "", {**protocol.NAMES, **body.NAMES})
            check(self.model.config, request, self._length, words)
        self._told.check(body, requests)
        return Asked(body, requests)

    def _request(self, body: Body, tokens: Sequence[int], seed: int, number: int) -> Request:
        # vLLM's clients say with -1 or 0 that all tokens may be drawn.
        top_k = body.top_k if body.top_k and body.top_k > 0 else None
        filters: dict[str, Any] = {"top_k": top_k, "top_p": body.top_p, "min_p": body.min_p}
        told = body.prompt_logprobs if isinstance(body, CompletionBody) else None
        return Request(
            tokens,
            max_new_tokens=body.limit or max(1, self._length - len(tokens)),
            samples=body.n,
            temperature=body.temperature,
            seed=seed,
            stream=number,
            stop=text.stop_at(self.model.tokenizer, body.stops),
            stop_tokens=tuple(body.stop_token_ids),
            bias=tuple(body.biases.items()),
            repetition_penalty=body.repetition_penalty,
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
            alternatives=body.alternatives or 0,
            prompt_alternatives=told,
            **(filters if body.temperature > 0 else {}),
        )

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._prompter.text(prompt, self._special_tokens)
        return prompt

    def _turns(self, body: ChatBody) -> list[int]:
        if not self.model.tokenizer.chat_template:
            raise BadRequest("this model has no chat template: use /v1/completions")
        turns = [{"role": turn.role, "content": turn.text} for turn in body.messages]
        if turns[-1] == {"role": "assistant", "content": ""} and len(turns) > 1:
            turns.pop()  # an answer that has not begun
        return self._prompter.turns(turns, body.chat_template_kwargs)

    def reply(self, asked: Asked, found: Sequence[Completion]) -> dict[str, Any]:
        """The protocol's answer; completions in the order of prompts and samples."""
        one = self._chat_choice if asked.chat else self._text_choice
        choices = [one(asked.body, number, done) for number, done in enumerate(found)]
        told: dict[int, Any] = {}  # the samples of a prompt share what is told of it
        for choice, done in zip(choices, found, strict=True):
            if done.prompt is not None:
                if done.request.stream not in told:
                    scores = self._told.of_prompt(done.request.tokens, done.prompt)
                    told[done.request.stream] = scores
                choice["prompt_logprobs"] = told[done.request.stream]
        return {
            **self.head(asked, part=False),
            "choices": choices,
            "usage": counts(asked, sum(len(done.tokens) for done in found)),
        }

    def head(self, asked: Asked, *, part: bool) -> dict[str, Any]:
        """What an answer begins with, or every event of one."""
        kind = "chat.completion.chunk" if part else "chat.completion"
        return {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind if asked.chat else "text_completion",
            "created": int(time.time()),
            "model": self.name,
        }

    def _text_choice(self, body: Any, number: int, done: Completion) -> dict[str, Any]:
        return {
            "index": number,
            "text": text.text_of(self.model.tokenizer, done),
            "finish_reason": done.reason,
            "logprobs": self._told.of_text(body, done),
        }

    def _chat_choice(self, body: Any, number: int, done: Completion) -> dict[str, Any]:
        return {
            "index": number,
            "message": {"role": "assistant", "content": text.text_of(self.model.tokenizer, done)},
            "finish_reason": done.reason,
            "logprobs": self._told.of_chat(body, done),
        }

    def close(self) -> None:
        """Ends the engine; what is under way is not finished."""
        self.engine.close()


def counts(asked: Asked, written: int) -> dict[str, int]:
    """The protocol's count of tokens."""
    read = sum(len(request.tokens) for request in asked.requests)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
