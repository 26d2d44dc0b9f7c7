"""Waits for the engine as long as the client waits for it: whole answers, and events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxdistill.errors import ModelError
from jaxdistill.models.requests import Completion
from jaxdistill.serve.service import Asked, Service, counts
from jaxdistill.serve.stream import Piece, Stream

DONE = b"data: [DONE]\n\n"


class Gone(Exception):
    """The client does not wait any more."""


async def while_there(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work returns; it is cancelled when the client hangs up.

    Args:
      receive: of a request whose body has been read.
      work: what is done for it.

    Raises:
      Gone: if the client has hung up.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)
        # A task holds its error, which holds this frame: with all that was read, until Python
        # looks for cycles, which may be gigabytes later.
        del task, leaving, one


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class PendingAnswer:
    """The answer to one client, from the beginning until somebody calls `close`.

    Raises:
      ModelError: if it cannot be served.
      Busy: where it could be served at another time.
    """

    def __init__(self, service: Service, asked: Asked):
        loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        def put(piece: Piece | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended, and its loop with it
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self._service, self._asked = service, asked
        self._stream = Stream(asked.requests, live=asked.body.stream, put=put)
        service.engine.begin(self._stream)

    def close(self) -> None:
        """Lets the engine forget it."""
        self._service.engine.release(self._stream)

    async def _come(self) -> AsyncIterator[Piece]:
        """Pieces as they come, until all samples are finished."""
        missing = self._stream.samples
        while missing:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            missing -= piece.done is not None
            yield piece

    async def whole(self) -> bytes:
        """The whole answer, once it is finished."""
        completions: dict[int, Completion] = {}
        async for piece in self._come():
            if piece.done is not None:
                completions[piece.index] = piece.done
        ordered = [completions[index] for index in sorted(completions)]
        make = lambda: json.dumps(self._service.reply(self._asked, ordered)).encode()
        return await asyncio.to_thread(make)

    async def events(self) -> AsyncIterator[bytes]:
        """The protocol's server-sent events, as they come."""
        asked, head = self._asked, self._service.head(self._asked, part=True)
        met: set[int] = set()
        written = 0
        async for index, text, done in self._come():
            choice: dict[str, Any] = {"index": index, "finish_reason": done and done.reason}
            if asked.chat:
                role = {} if index in met else {"role": "assistant"}
                choice["delta"] = {"content": text} | role
            else:
                choice["text"] = text
            met.add(index)
            written += len(done.tokens) if done else 0
            yield _event(head | {"choices": [choice]})
        if asked.body.stream_options.include_usage:
            yield _event(head | {"choices": [], "usage": counts(asked, written)})
        yield DONE


class EventStream(Response):
    """Sends an answer's events; a client that hangs up ends it."""

    media_type = "text/event-stream"

    def __init__(self, answer: PendingAnswer):
        super().__init__(headers={"Cache-Control": "no-store"})
        self._answer = answer
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette's side of a response."""
        try:
            with contextlib.suppress(Gone):
                await while_there(receive, self._send(send))
        finally:
            self._answer.close()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        body = lambda data, more: {"type": "http.response.body", "body": data, "more_body": more}
        try:
            async for event in self._answer.events():
                await send(body(event, True))
                # Neither line waits while pieces are there: others, and news that the client is
                # gone, come in between.
                await asyncio.sleep(0)
        except ModelError as error:  # the engine has stopped
            told = {"error": {"message": str(error), "type": "server_error", "code": 500}}
            await send(body(_event(told), True))
        await send(body(b"", False))


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"
