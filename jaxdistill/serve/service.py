"""A small server that speaks OpenAI's protocol, on our generation engine: `jaxdistill serve`."""

import dataclasses
import queue
import sys
import threading
import time
import uuid
from collections.abc import Generator as Events
from typing import Any

from jaxdistill.commands import Serve
from jaxdistill.data.prompting import Prompter
from jaxdistill.engine.streaming import Stream, counts, events
from jaxdistill.engine.web import BadRequest, Busy, is_loopback, make_server
from jaxdistill.errors import ModelError
from jaxdistill.models import Model, text
from jaxdistill.models.generator import Generator
from jaxdistill.models.requests import Completion, Request
from jaxdistill.references import load_any
from jaxdistill.sharding import make_mesh

MAX_SAMPLES = 256
MAX_STOPS, MAX_STOP = 16, 256  # strings, and characters of each
MAX_PENDING = 4096  # samples that are asked for and not yet answered


class Service:
    """One model and one thread that continues everybody's prompts together.

    Args:
      model: with a tokenizer.
      slots: answers that are written at the same time.
      length: tokens of a prompt and its answer together.

    Raises:
      ModelError: if the model has no tokenizer.
    """

    def __init__(self, model: Model, *, slots: int, length: int):
        if model.tokenizer is None:
            raise ModelError(f"{model.source}: has no tokenizer: texts need one")
        self.model = model
        self._prompter = Prompter(model.tokenizer)
        self._length = length
        self._pending, self._counting = 0, threading.Lock()
        self._generator = Generator(model.config, model.params, slots=slots, length=length)
        self._inbox: queue.Queue[Stream | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def complete(self, request: Request) -> list[Completion]:
        """All samples of a request, in order; waits for them.

        Raises:
          ModelError: if the request cannot be served.
          Busy: if too many samples are waited for already.
        """
        stream = self._begin(request, live=False)
        found = [piece.done for piece in stream.pieces() if piece.done]
        return sorted(found, key=lambda done: done.sample)

    def _begin(self, request: Request, *, live: bool) -> Stream:
        """Puts a request into the thread's hands."""
        if not self._thread.is_alive():
            raise ModelError("the server's engine has stopped: start it again")
        with self._counting:
            if self._pending + request.samples > MAX_PENDING:
                raise Busy(f"{self._pending} samples are waited for: try again later")
            self._pending += request.samples
        stream = Stream(request, live=live, at_end=self._forget)
        self._inbox.put(stream)
        return stream

    def _forget(self, request: Request) -> None:
        """Nobody waits for this request any more."""
        with self._counting:
            self._pending -= request.samples

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.model.source

    def answer(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        """The protocol's answer to a request of the protocol.

        Raises:
          BadRequest, UserError: with what is wrong with it.
          Busy: where it could be served at another time.
        """
        return self.reply(self.complete(self.request(body, chat)), body, chat)

    def stream(self, body: dict[str, Any], chat: bool) -> Events[bytes, None, None]:
        """The protocol's answer as server-sent events; what is wrong is raised with the first one.

        Raises:
          BadRequest, UserError: with what is wrong with the request.
          Busy: where it could be served at another time.
        """
        usage, head = _counted(body), self._head(body, chat, part=True)
        stream = self._begin(self.request(body, chat), live=True)
        return events(stream, head, chat=chat, usage=usage)

    def close(self) -> None:
        """Ends the thread; what is under way is not finished."""
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        """The thread: whatever ends it, nobody is left waiting."""
        waiting: dict[int, Stream] = {}
        try:
            self._serve(waiting)
        finally:
            while not self._inbox.empty():
                stream = self._inbox.get()
                if stream is not None:
                    waiting[id(stream)] = stream
            for stream in waiting.values():
                stream.fail(ModelError("the server's engine has stopped"))

    def _serve(self, waiting: dict[int, Stream]) -> None:
        while True:
            try:
                stream = self._inbox.get(block=not self._generator.busy)
                if stream is None:
                    return
                try:
                    # The tag leads back from what the engine makes to who waits for it.
                    self._generator.submit(dataclasses.replace(stream.request, tag=id(stream)))
                    waiting[id(stream)] = stream
                except ModelError as error:
                    stream.fail(error)
                continue  # everything that has come goes in before the next tokens are made
            except queue.Empty:
                pass
            self._advance(waiting)

    def _advance(self, waiting: dict[int, Stream]) -> None:
        """Makes the next tokens, and tells those who wait for them."""
        for name, stream in list(waiting.items()):
            if stream.closed:
                self._generator.cancel(name)
                del waiting[name]
        finished = self._generator.step()
        for request, sample, tokens in self._generator.written():
            if waiting[request.tag].live:
                waiting[request.tag].hear(sample, text.decode(self.model.tokenizer, tokens))
        for done in finished:
            stream = waiting[done.request.tag]
            stream.end(done, text.text_of(self.model.tokenizer, done))
            if stream.finished:
                del waiting[done.request.tag]

    def request(self, body: dict[str, Any], chat: bool) -> Request:
        """The engine's request for a request of the protocol.

        Raises:
          BadRequest: with what is wrong.
        """
        count = _number(body, "n", int, 1)
        if not 1 <= count <= MAX_SAMPLES:
            raise BadRequest(f"n: {str(count)[:40]} must be from 1 to {MAX_SAMPLES}")
        tokens = self._chat(body) if chat else self._text(body)
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        temperature, seed = (
            _number(body, "temperature", float, 1.0),
            _number(body, "seed", int, None),
        )
        filters = {
            "top_k": _number(body, "top_k", int, None),
            "top_p": _number(body, "top_p", float, None),
            "min_p": _number(body, "min_p", float, None),
        }
        return Request(
            tokens,
            max_new_tokens=_number(body, limit, int, max(1, self._length - len(tokens))),
            samples=count,
            temperature=temperature,
            seed=_fresh() if seed is None else seed,
            stop=text.stop_at(self.model.tokenizer, _stops(body.get("stop"))),
            **(filters if temperature > 0 else {}),
        )

    def _text(self, body: dict[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise BadRequest("prompt: must be one text that is not empty")
        return self._prompter.text(prompt)

    def _chat(self, body: dict[str, Any]) -> list[int]:
        turns = body.get("messages")
        if not isinstance(turns, list) or not turns:
            raise BadRequest("messages: must be a list of turns")
        for turn in turns:
            if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
                raise BadRequest("messages: every turn needs a role and a text as its content")
        if not self.model.tokenizer.chat_template:
            raise BadRequest("this model has no chat template: use /v1/completions")
        return self._prompter.turns(turns)

    def reply(self, found: list[Completion], body: dict[str, Any], chat: bool) -> dict[str, Any]:
        """The protocol's answer."""
        told = body.get("logprobs")
        scored = told is not None and told is not False
        one = self._chat_choice if chat else self._text_choice
        written = sum(len(done.tokens) for done in found)
        return {
            **self._head(body, chat),
            "choices": [one(number, done, scored) for number, done in enumerate(found)],
            "usage": counts(len(found[0].request.tokens), written),
        }

    def _head(self, body: dict[str, Any], chat: bool, part: bool = False) -> dict[str, Any]:
        """What an answer begins with, or every event of one."""
        kind = "chat.completion.chunk" if part else "chat.completion"
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": kind if chat else "text_completion",
            "created": int(time.time()),
            "model": str(body.get("model", self.model.source))[:200],
        }

    def _text_choice(self, number: int, done: Completion, scored: bool) -> dict[str, Any]:
        words = self.model.tokenizer.convert_ids_to_tokens(done.tokens) if scored else []
        told = {"tokens": words, "token_logprobs": done.logprobs, "top_logprobs": None}
        return {
            "index": number,
            "text": text.text_of(self.model.tokenizer, done),
            "finish_reason": done.reason,
            "logprobs": told if scored else None,
        }

    def _chat_choice(self, number: int, done: Completion, scored: bool) -> dict[str, Any]:
        words = self.model.tokenizer.convert_ids_to_tokens(done.tokens) if scored else []
        told = [
            {"token": word, "logprob": score, "bytes": None, "top_logprobs": []}
            for word, score in zip(words, done.logprobs, strict=False)
        ]
        return {
            "index": number,
            "message": {"role": "assistant", "content": text.text_of(self.model.tokenizer, done)},
            "finish_reason": done.reason,
            "logprobs": {"content": told} if scored else None,
        }


def _counted(body: dict[str, Any]) -> bool:
    """Whether a stream is to end with a count of its tokens."""
    if body.get("logprobs"):
        raise BadRequest("logprobs: do not come in a stream: leave one of them out")
    told = body.get("stream_options") or {}
    if not isinstance(told, dict):
        raise BadRequest("stream_options: must be an object")
    return bool(told.get("include_usage"))


def _fresh() -> int:
    """A seed for a request that names none."""
    return uuid.uuid4().int & 0xFFFFFFFF


def _stops(given: Any) -> tuple[str, ...]:
    """The strings that end an answer."""
    stops = [given] if isinstance(given, str) else given or []
    short = lambda stop: isinstance(stop, str) and 0 < len(stop) <= MAX_STOP
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(map(short, stops)):
        raise BadRequest(
            f"stop: must be at most {MAX_STOPS} texts of 1 to {MAX_STOP} characters each"
        )
    return tuple(stops)


def _number(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A number of the request, or the default where it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise BadRequest(f"{name}: {str(value)[:40]!r} must be a number")
    try:
        return kind(value)
    except OverflowError:  # of float, for a whole number of hundreds of digits
        raise BadRequest(f"{name}: {str(value)[:40]} is too large") from None


def serve(source: str, options: Serve | None = None, *, key: str | None = None) -> None:
    """Serves a model until it is interrupted.

    Args:
      source: any name `engine.load` understands.
      options: where to listen, and how much is answered at a time.
      key: what clients must send as their key; None: nothing.

    Raises:
      UserError: if the model cannot be used or the port not be had.
    """
    options = options or Serve()
    model = load_any(source, dtype=options.dtype, mesh=make_mesh()).consume_per_layer()
    length = min(options.length or 2048, model.config.max_positions)
    service = Service(model, slots=options.slots, length=length)
    server = make_server(service, host=options.host, port=options.port, key=key)
    if key is None and not is_loopback(options.host):
        print("anybody who reaches this machine can ask: --key-env sets a key", file=sys.stderr)
    print(f"serving {source} on http://{options.host}:{server.server_address[1]}/v1", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
        service.close()
