"""The routes of the server, who may take them, and bounds on what a client may send."""

import asyncio
import contextlib
import hmac
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxdistill.data.rules import printable
from jaxdistill.errors import UserError
from jaxdistill.safe import strict_json
from jaxdistill.serve import origin
from jaxdistill.serve.answering import EventStream, Gone, PendingAnswer, while_there
from jaxdistill.serve.engine import Busy
from jaxdistill.serve.protocol import BadRequest, ChatBody, CompletionBody, NoModel
from jaxdistill.serve.service import Service

MAX_BODY = 1_000_000  # bytes of a request
_READ_ON = 4 * MAX_BODY
_CLOSE = {"Connection": "close"}
# Of two that differ, who stands before this server may have read the other one.
_ONCE = ("Authorization", "Content-Type", "Host", "Origin", "Sec-Fetch-Site")


def make_app(service: Service, *, key: str | None, everywhere: bool = False) -> ASGIApp:
    """The server as an ASGI application.

    Args:
      service: what the routes lead to.
      key: what clients must send as their key; None: nothing.
      everywhere: whether other machines can reach it.
    """
    routes = _Routes(service, key)
    app = Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refused},
    )
    app.router.redirect_slashes = False
    # A page does not know the key, by whatever name it comes.
    known = (lambda _: True) if key else origin.is_own if everywhere else origin.is_loopback
    return Patient(_RequestCheck(app, known))


_FIELD = re.compile(r"[a-z][a-z0-9_]*\b")  # how a message begins that names a field
_FIELDS = {*ChatBody.model_fields, *CompletionBody.model_fields}


class Patient:
    """Reads what is left of a body before it refuses: who is cut off while sending sees no answer.

    What is longer than some megabytes is cut off all the same.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        more, length = True, Headers(scope=scope).get("content-length", "0")

        async def receive_on() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        async def send_after(message: Message) -> None:
            if message.get("status", 0) >= 400 and len(length) < 9 and int(length) <= _READ_ON:
                left = _READ_ON
                while more and left > 0:
                    left -= len((await receive_on()).get("body", b""))
            await send(message)

        await self._app(scope, receive_on, send_after)


class _RequestCheck:
    """Looks at what every request must have, before any route does."""

    def __init__(self, app: ASGIApp, host_is_known: Callable[[str], bool]):
        self._app, self._host_is_known = app, host_is_known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        length, coded = headers.get("content-length"), "transfer-encoding" in headers
        if length is not None and coded:
            refusal = error(400, "Content-Length and Transfer-Encoding: only one may be given")
        elif twice := [name for name in _ONCE if len(headers.getlist(name)) > 1]:
            refusal = error(400, f"{twice[0]}: must not be given twice")
        elif scope["method"] != "POST" and (coded or length not in (None, "0")):
            refusal = error(400, f"{scope['method']}: must not have a body")
        elif problem := origin.problem(headers, self._host_is_known):
            refusal = error(403, problem)
        else:
            return await self._app(scope, receive, send)
        return await refusal(scope, receive, send)


class _Routes:
    def __init__(self, service: Service, key: str | None):
        self._service, self._key = service, key

    async def health(self, _: Request) -> Response:
        """Whether the server is there, and can answer."""
        if not self._service.engine.alive:
            return error(503, "the server's engine has stopped: start it again")
        return _json(200, {"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The list of the one model."""
        self._check_key(request)
        return _json(200, {"object": "list", "data": [self._row()]})

    async def model(self, request: Request) -> Response:
        """The one model."""
        self._check_key(request)
        try:
            self._service.check_name(request.path_params["name"])
        except NoModel as problem:
            return _no_model(problem)
        return _json(200, self._row())

    def _row(self) -> dict[str, Any]:
        return {
            "id": self._service.name,
            "object": "model",
            "created": 0,
            "owned_by": "jaxdistill",
        }

    async def completions(self, request: Request) -> Response:
        """Continues texts."""
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """Goes on with a conversation."""
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        try:
            self._check_key(request)
            data = await _body(request)
            read = lambda: self._service.read(_object(data), chat=chat)
            asked = await while_there(request.receive, asyncio.to_thread(read))
            answer = PendingAnswer(self._service, asked)
            if asked.body.stream:
                return EventStream(answer)
            with contextlib.closing(answer):
                body = await while_there(request.receive, answer.whole())
                return Response(body, 200, None, "application/json")
        except HTTPException:
            raise
        except (BadRequest, UserError) as problem:
            return error(400 if self._service.engine.alive else 503, str(problem), close=False)
        except NoModel as problem:
            return _no_model(problem)
        except Busy as problem:
            return error(503, str(problem), close=False)
        except (Gone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        except Exception as mistake:  # ours: the client learns that there was one
            words = f"{type(mistake).__name__}: {printable(str(mistake))[:500]}"
            print(f"serve: {words}", file=sys.stderr, flush=True)
            return error(500, "the server made a mistake; its terminal says more")

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if self._key is not None and not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
            raise HTTPException(401, "the key is wrong")


async def _body(request: Request) -> bytes:
    if not origin.is_json(request.headers.get("content-type", "")):
        raise HTTPException(415, "Content-Type: must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Content-Encoding: must be identity: send the JSON as it is")
    too_large = HTTPException(413, f"the body: must have at most {MAX_BODY} bytes")
    length = request.headers.get("content-length", "0")
    if len(length) > 9 or int(length) > MAX_BODY:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise too_large
    return bytes(data)


def _object(data: bytes) -> dict[str, Any]:
    try:
        body = strict_json.loads(data)
    except ValueError as problem:
        raise BadRequest(f"the body is not JSON: {problem}") from problem
    if not isinstance(body, dict):
        raise BadRequest("the body must be an object")
    return body


def _refused(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    words = {
        404: f"no such path: {request.url.path[:80]}",
        405: f"{request.url.path[:80]} does not take {request.method}",
    }
    generic = problem.detail in ("Not Found", "Method Not Allowed")
    return error(problem.status_code, words[problem.status_code] if generic else problem.detail)


def _no_model(problem: NoModel) -> Response:
    """As OpenAI says it: clients look at the word."""
    return error(404, str(problem), close=False, word="model_not_found")


def error(code: int, message: str, *, close: bool = True, word: str | None = None) -> Response:
    """The protocol's answer to what cannot be served; `word` stands for the code in the body."""
    kind = "invalid_request_error" if code < 500 else "server_error"
    headers = (_CLOSE if close else {}) | ({"Retry-After": "1"} if code == 503 else {})
    told: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": word or code}
    if code == 400 and (field := _FIELD.match(message)):
        known = field[0] in _FIELDS or message[field.end() :].startswith(": is not supported")
        told["param"] = field[0] if known else None
    return _json(code, {"error": told}, headers)


def _json(code: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value).encode(), code, headers, "application/json")
