"""A client's connection: how long it may take, how many there may be, what else is cut off."""

import asyncio
import re
import resource
import time
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxdistill.serve.app import Patient, error

PATIENCE = 30.0  # seconds for a whole request, and for reading an answer that has piled up
MAX_CONNECTIONS = 512
MOST_TOLD = 2048  # that are told so, as many as may wait to be taken; beyond, they are cut off
MAX_HEAD = 65_536  # bytes of a request before its body
MAX_CHUNKS = 4096  # of a body: each costs as much work as some kilobytes in one piece
_OTHER_FILES = 256
_LATE = 2.0  # seconds after which a connection without a whole request may go for another
_LATE_ANSWER = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


_END = re.compile(rb"\r?\n\r?\n")
_FOLDED = re.compile(rb"\n[ \t]")
_LENGTH = re.compile(rb"(?im)^content-length[ \t]*:([^\r\n]*)")


def framing_problem(request: bytes) -> str | None:
    """What in the head of a request somebody before this server may have understood otherwise.

    h11 makes one length of two that are equal, and one line of a header that is folded.
    """
    head = _END.split(request, maxsplit=1)[0]
    if _FOLDED.search(head):
        return "a header must stand on one line"
    lengths = _LENGTH.findall(head)
    if len(lengths) > 1 or any(b"," in value for value in lengths):
        return "Content-Length: must not be given twice"
    return None


def allow_files() -> None:
    """Lets this process hold as many connections as are told something, if that is left to it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_TOLD + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _most_told() -> int:
    """How many connections this process can hold without want of files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_TOLD if files == resource.RLIM_INFINITY else min(MOST_TOLD, files - _OTHER_FILES)


class RequestReader(h11.Connection):
    """h11's reader of requests, which refuses a body in more pieces than anybody makes of one.

    Attributes:
      problem: why it has refused one; None where h11 did.
    """

    problem: str | None = None
    _chunks = 0

    def next_event(self) -> Any:
        """The next part of a request.

        Raises:
          RemoteProtocolError: where it is none.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = 0
        self._chunks += isinstance(event, h11.Data) and event.chunk_start
        if self._chunks > MAX_CHUNKS:
            self.problem = f"the body: must have at most {MAX_CHUNKS} chunks: make them larger"
            raise h11.RemoteProtocolError(self.problem)
        return event


class Connection(H11Protocol):
    """uvicorn's connection with a deadline for the whole request, and one request at a time."""

    _timer: asyncio.TimerHandle | None = None
    _since = 0.0

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._reader = RequestReader(h11.SERVER, MAX_HEAD)
        self.conn: h11.Connection = self._reader

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
        elif len(self.connections) > _most_told():
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
            if self.conn.their_state is h11.IDLE and (problem := self._problem(data)):
                self.send_400_response(problem)
                return
            super().data_received(data)
            if not self._is_answering:
                return
            self._disarm()
            if not self.conn.trailing_data[0]:
                return
        self.cycle.keep_alive = False
        self.flow.resume_reading()

    def _problem(self, data: bytes) -> str | None:
        """What is wrong with a head once it is there: bytes that come one by one are cheap."""
        held = self.conn.trailing_data[0]
        return framing_problem(held + data) if _END.search(held[-3:] + data) else None

    def send_400_response(self, msg: str) -> None:
        """Refuses in the protocol's words, where an answer has not begun, and ends it."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refusal = error(400, self._reader.problem or msg)
            start = h11.Response(
                status_code=400, headers=refusal.raw_headers, reason=b"Bad Request"
            )
            for event in (start, h11.Data(data=bytes(refusal.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

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
