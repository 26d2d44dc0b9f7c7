"""A client's connection: how long it may take, how many there may be, what else is cut off."""

import asyncio
import re
import time
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxdistill.serve.app import Patient, error

PATIENCE = 30.0  # seconds for a whole request, and for reading an answer that has piled up
MAX_CONNECTIONS = 512
_MOST = MAX_CONNECTIONS + 256  # that are told so; beyond, they are cut off
_LATE = 2.0  # seconds after which a connection without a whole request may go for another
_LATE_ANSWER = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


_END = re.compile(rb"\r?\n\r?\n")
_FOLDED = re.compile(rb"\r?\n[ \t]+")
_LENGTH = re.compile(rb"(?im)^content-length[ \t]*:([^\r\n]*)")


def has_two_lengths(request: bytes) -> bool:
    """Whether the head of a request, of which all may not be there yet, has two lengths.

    h11 makes one of two that are equal: but who has passed them on may have understood them
    otherwise.
    """
    head = _FOLDED.sub(b" ", _END.split(request, maxsplit=1)[0])
    found = _LENGTH.findall(head)
    return len(found) > 1 or any(b"," in value for value in found)


class Connection(H11Protocol):
    """uvicorn's connection with a deadline for the whole request, and one request at a time."""

    _timer: asyncio.TimerHandle | None = None
    _since = 0.0

    def connection_made(self, transport: Any) -> None:
        """A client has come: where there are too many, the one that has dripped longest goes."""
        super().connection_made(transport)
        self._since = time.monotonic()
        self._arm()
        if len(self.connections) <= MAX_CONNECTIONS:
            return
        slow = [one for one in self.connections if isinstance(one, Connection) and one.is_late]
        if slow:
            min(slow, key=lambda one: one._since).transport.abort()
        elif len(self.connections) > _MOST:
            self.transport.abort()
        else:
            self.app = _Crowded(self.app)

    @property
    def is_late(self) -> bool:
        """Whether it holds no whole request, and has had its time."""
        return not self._is_answering and time.monotonic() - self._since > _LATE

    @property
    def _is_answering(self) -> bool:
        """Whether a request has been read whole, and its answer is not complete."""
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; what comes before its answer is no new one, and ends the connection.

        Reading goes on, which is how a client that hangs up is noticed.
        """
        if not self._is_answering:
            if self.conn.their_state is h11.IDLE and has_two_lengths(
                self.conn.trailing_data[0] + data
            ):
                self.send_400_response("Content-Length: must not be given twice")
                return
            super().data_received(data)
            if not self._is_answering:
                return
            self._disarm()
            if not self.conn.trailing_data[0]:
                return
        self.cycle.keep_alive = False
        self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """An answer is complete: the time for the next request begins."""
        super().on_response_complete()
        self._since = time.monotonic()
        self._arm()

    def pause_writing(self) -> None:
        """The client does not read what piles up."""
        super().pause_writing()
        self._arm()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._is_answering:
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(PATIENCE, self._expire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        """The time is over."""
        cycle: Any = self.cycle
        if not self.transport.is_closing() and (cycle is None or not cycle.response_started):
            self.transport.write(_LATE_ANSWER)
        self.transport.close()
        self.loop.call_later(1.0, self.transport.abort)


class _Crowded:
    """Tells all but those who ask about the server's health to come again."""

    def __init__(self, app: Any):
        self._app: ASGIApp = app
        self._busy = Patient(error(503, "too many connections: try again later"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app if scope["path"] == "/health" else self._busy
        await app(scope, receive, send)
