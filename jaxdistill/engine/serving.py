"""A small server that speaks OpenAI's protocol, on our generation engine: `jaxdistill serve`."""

import dataclasses
import hmac
import http.server
import itertools
import json
import queue
import threading
import time
import uuid
from collections.abc import Generator as Events
from typing import Any

from jaxdistill.engine.references import load_any
from jaxdistill.engine.streaming import Stream, counts, event_of, events
from jaxdistill.errors import ModelError, UserError
from jaxdistill.models import Model, unrolled
from jaxdistill.models.generator import Completion, Generator, Request
from jaxdistill.sharding import make_mesh

MAX_BODY = 10_000_000  # bytes of a request
MAX_SAMPLES = 256


class BadRequest(Exception):
    """What the client sent cannot be served."""


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
        self._length = length
        self._generator = Generator(model, slots=slots, length=length)
        self._inbox: queue.Queue[Stream | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def complete(self, request: Request) -> list[Completion]:
        """All samples of a request, in order; waits for them.

        Raises:
          ModelError: if the request cannot be served.
        """
        found = [piece.done for piece in self._begin(request, live=False).pieces() if piece.done]
        return sorted(found, key=lambda done: done.sample)

    def _begin(self, request: Request, *, live: bool) -> Stream:
        if not self._thread.is_alive():
            raise ModelError("the server's engine has stopped: start it again")
        stream = Stream(request, live=live)
        self._inbox.put(stream)
        return stream

    def stream(self, body: dict[str, Any], chat: bool) -> Events[bytes, None, None]:
        """The protocol's answer as server-sent events.

        Raises:
          BadRequest: with what is wrong with the request.
          ModelError: if it cannot be served; with the first event.
        """
        if body.get("logprobs"):
            raise BadRequest("logprobs: do not come in a stream: leave one of them out")
        kind = "chat.completion.chunk" if chat else "text_completion"
        stream = self._begin(self.request(body, chat), live=True)
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        return events(stream, self._head(body, kind), chat=chat, usage=usage)

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
                    tagged = dataclasses.replace(stream.request, tag=id(stream))
                    self._generator.submit(tagged)
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
                text = self.model.tokenizer.decode(tokens, skip_special_tokens=True)
                waiting[request.tag].hear(sample, text)
        for done in finished:
            stream = waiting[done.request.tag]
            stream.end(done)
            if stream.finished:
                del waiting[done.request.tag]

    def request(self, body: dict[str, Any], chat: bool) -> Request:
        """The engine's request for a request of the protocol.

        Raises:
          BadRequest: with what is wrong.
        """
        stops = body.get("stop") or ()
        count = _number(body, "n", int, 1)
        if not 1 <= count <= MAX_SAMPLES:
            raise BadRequest(f"n: {count} must be from 1 to {MAX_SAMPLES}")
        tokens = self._chat(body) if chat else self._text(body)
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        room = self._length - len(tokens)
        heat = float(_number(body, "temperature", float, 1.0))
        filters = {
            "top_k": _number(body, "top_k", int, None),
            "top_p": _number(body, "top_p", float, None),
            "min_p": _number(body, "min_p", float, None),
        }
        return Request(
            tokens,
            max_new_tokens=max(1, room) if limit is None else _number({"m": limit}, "m", int, 16),
            samples=count,
            temperature=heat,
            seed=_number(body, "seed", int, 0) if body.get("seed") is not None else _fresh(),
            stop=(stops,) if isinstance(stops, str) else tuple(map(str, stops)),
            **(filters if heat > 0 else {}),
        )

    def _text(self, body: dict[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise BadRequest("prompt: must be one text that is not empty")
        return self.model.tokenizer(prompt)["input_ids"]

    def _chat(self, body: dict[str, Any]) -> list[int]:
        turns = body.get("messages")
        if not isinstance(turns, list) or not turns:
            raise BadRequest("messages: must be a list of turns")
        for turn in turns:
            if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
                raise BadRequest("messages: every turn needs a role and a text as its content")
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            raise BadRequest("this model has no chat template: use /v1/completions")
        try:
            return tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # the template is the model's own program
            raise BadRequest(f"messages: the chat template refuses them: {error}") from error

    def reply(self, found: list[Completion], body: dict[str, Any], chat: bool) -> dict[str, Any]:
        """The protocol's answer."""
        told = body.get("logprobs")
        scored = told is not None and told is not False
        one = self._chat_choice if chat else self._text_choice
        written = sum(len(done.tokens) for done in found)
        return {
            **self._head(body, "chat.completion" if chat else "text_completion"),
            "choices": [one(number, done, scored) for number, done in enumerate(found)],
            "usage": counts(len(found[0].request.tokens), written),
        }

    def _head(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        """What every answer and every event begins with."""
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": str(body.get("model", self.model.source)),
        }

    def _text_choice(self, number: int, done: Completion, scored: bool) -> dict[str, Any]:
        words = self.model.tokenizer.convert_ids_to_tokens(done.tokens) if scored else []
        told = {"tokens": words, "token_logprobs": done.logprobs, "top_logprobs": None}
        return {
            "index": number,
            "text": done.text,
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
            "message": {"role": "assistant", "content": done.text},
            "finish_reason": done.reason,
            "logprobs": {"content": told} if scored else None,
        }


def _fresh() -> int:
    """A seed for a request that names none."""
    return uuid.uuid4().int & 0xFFFFFFFF


def _number(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A number of the request, or the default where it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise BadRequest(f"{name}: {str(value)[:40]!r} must be a number")
    return kind(value)


def make_server(
    service: Service, *, host: str = "127.0.0.1", port: int = 8000, key: str | None = None
) -> http.server.ThreadingHTTPServer:
    """The server, bound and not yet serving; `serve_forever()` and `shutdown()` are its own.

    Raises:
      ModelError: if host and port cannot be had.
    """
    handler = type("Handler", (_Handler,), {"service": service, "key": key})
    try:
        server = http.server.ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        raise ModelError(f"serve: {host}:{port} cannot be had: {error.strerror}") from error
    server.daemon_threads = True
    return server


class _Handler(http.server.BaseHTTPRequestHandler):
    """Routes of the protocol."""

    service: Service
    key: str | None
    protocol_version = "HTTP/1.1"
    timeout = 600

    def do_GET(self) -> None:
        """Models, and whether the server is there."""
        if self.path == "/health":
            return self._send(200, {"status": "ok"})
        if not self._allowed():
            return None
        if self.path == "/v1/models":
            row = {"id": self.service.model.source, "object": "model", "owned_by": "jaxdistill"}
            return self._send(200, {"object": "list", "data": [row]})
        return self._error(404, f"no such path: {self.path[:80]}")

    def do_POST(self) -> None:
        """Completions."""
        chat = self.path == "/v1/chat/completions"
        if not chat and self.path != "/v1/completions":
            self.close_connection = True  # its body stays unread
            return self._error(404, f"no such path: {self.path[:80]}")
        if not self._allowed():
            return None
        try:
            body = self._body()
            if body.get("stream"):
                return self._stream(self.service.stream(body, chat))
            found = self.service.complete(self.service.request(body, chat))
            return self._send(200, self.service.reply(found, body, chat))
        except (BadRequest, UserError) as error:
            return self._error(400, str(error))

    def _allowed(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        if self.key is None or hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            return True
        self.close_connection = True
        self._error(401, "the key is wrong")
        return False

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        # A page in a browser can send plain forms anywhere, but not JSON to a stranger.
        if "json" not in self.headers.get("Content-Type", ""):
            self.close_connection = True
            raise BadRequest("Content-Type: must be application/json")
        if not length.isdecimal() or len(length) > 9 or int(length) > MAX_BODY:
            self.close_connection = True
            raise BadRequest(f"the body must have a length of at most {MAX_BODY} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise BadRequest("the body must be an object")
        return body

    def _stream(self, events: Events[bytes, None, None]) -> None:
        """Sends events as they come; the end of the connection is the end of the answer."""
        first = next(events)  # what is wrong is told before the stream begins
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for event in itertools.chain([first], events):
                self.wfile.write(event)
        except OSError:  # the client has gone: closing the events ends the work for it
            pass
        except ModelError as error:
            self.wfile.write(event_of({"error": {"message": str(error), "type": "server_error"}}))
        finally:
            events.close()

    def _error(self, code: int, message: str) -> None:
        kind = "invalid_request_error" if code < 500 else "server_error"
        self._send(code, {"error": {"message": message, "type": kind, "code": code}})

    def _send(self, code: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the terminal belongs to the command."""


def serve(
    source: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    slots: int = 32,
    length: int | None = None,
    dtype: str = "bfloat16",
    key: str | None = None,
) -> None:
    """Serves a model until it is interrupted.

    Args:
      source: any name `engine.load` understands.
      host: address to listen on.
      port: 0 takes a free one.
      slots: answers that are written at the same time.
      length: tokens of a prompt and its answer together; None: at most 2048 of the model's context.
      dtype: held and computed in.
      key: what clients must send as their key; None: nothing.

    Raises:
      UserError: if the model cannot be used or the port not be had.
    """
    model = unrolled.take(load_any(source, dtype=dtype, mesh=make_mesh()))
    length = min(length or 2048, model.config.max_positions)
    service = Service(model, slots=slots, length=length)
    server = make_server(service, host=host, port=port, key=key)
    print(f"serving {source} on http://{host}:{server.server_address[1]}/v1", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
        service.close()
