"""The HTTP side of the server: routes, keys, and bounds on what a client may send."""

import contextlib
import hmac
import http.server
import ipaddress
import itertools
import json
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Generator
from typing import Any, Protocol, runtime_checkable

from jaxdistill import strict_json
from jaxdistill.data.records import printable
from jaxdistill.errors import ModelError, UserError

MAX_BODY = 1_000_000  # bytes of a request
MAX_CONNECTIONS = 64
PATIENCE = 60  # seconds that a client may take to send a request


class BadRequest(Exception):
    """What the client sent cannot be served."""


class Busy(Exception):
    """Too much is asked at the same time."""


@runtime_checkable
class Answering(Protocol):
    """What the routes lead to: `serving.Service`."""

    @property
    def name(self) -> str:
        """What the model is called."""
        ...

    def answer(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        """The protocol's answer to a request of the protocol.

        Raises:
          BadRequest, UserError: with what is wrong with it.
          Busy: where it could be served at another time.
        """
        ...

    def stream(self, body: dict[str, Any], chat: bool) -> Generator[bytes, None, None]:
        """The same as server-sent events; raises when called or with the first event."""
        ...


def is_loopback(name: Any) -> bool:
    """Whether an address or a name means this machine, for sure."""
    if str(name).lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(str(name)).is_loopback
    except ValueError:
        return False


def make_server(
    service: Answering, *, host: str = "127.0.0.1", port: int = 8000, key: str | None = None
) -> http.server.ThreadingHTTPServer:
    """The server, bound and not yet serving; `serve_forever()` and `shutdown()` are its own.

    Raises:
      ModelError: if host and port cannot be had.
    """
    handler = type("Handler", (_Handler,), {"service": service, "key": key})
    try:
        return _Server((host, port), handler)
    except (OSError, OverflowError) as error:  # the latter for a port above 65535
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"serve: {host}:{port} cannot be had: {reason}") from error


class _Server(http.server.ThreadingHTTPServer):
    """A thread for each of a bounded number of connections."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Any):
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread, or closes the connection where there are enough."""
        if not self._free.acquire(blocking=False):
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise
        return None

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news for the terminal."""


class _Handler(http.server.BaseHTTPRequestHandler):
    """Routes of the protocol."""

    service: Answering
    key: str | None
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def do_GET(self) -> None:
        """Models, and whether the server is there."""
        if not self._at_home():
            return None
        if self.path == "/health":
            return self._send(200, {"status": "ok"})
        if not self._allowed():
            return None
        if self.path == "/v1/models":
            row = {"id": self.service.name, "object": "model", "owned_by": "jaxdistill"}
            return self._send(200, {"object": "list", "data": [row]})
        return self._error(404, f"no such path: {self.path[:80]}")

    def do_POST(self) -> None:
        """Completions."""
        chat = self.path == "/v1/chat/completions"
        if not chat and self.path != "/v1/completions":
            self.close_connection = True  # its body stays unread
            return self._error(404, f"no such path: {self.path[:80]}")
        if not self._at_home() or not self._allowed():
            return None
        try:
            body = self._body()
            if body.get("stream"):
                return self._stream(self.service.stream(body, chat))
            return self._send(200, self.service.answer(body, chat))
        except (BadRequest, UserError) as error:
            return self._error(400, str(error))
        except Busy as error:
            return self._error(503, str(error))
        except Exception as error:  # a mistake of ours: the client learns that there was one
            print(f"serve: {type(error).__name__}: {printable(str(error))[:500]}", file=sys.stderr)
            return self._error(500, "the server made a mistake; its terminal says more")

    def _at_home(self) -> bool:
        """Without a key, a page of another site must not reach a server of this machine alone.

        Whoever owns a name can let it mean 127.0.0.1, but the browser says which name it looked up.
        """
        if self.key is not None or not is_loopback(self.connection.getsockname()[0]):
            return True
        try:
            name = urllib.parse.urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname
        except ValueError:
            name = None
        if is_loopback(name):
            return True
        self.close_connection = True
        self._error(403, "this server answers to localhost only")
        return False

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
            body = strict_json.loads(self.rfile.read(int(length)))
        except ValueError as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise BadRequest("the body must be an object")
        return body

    def _stream(self, events: Generator[bytes, None, None]) -> None:
        """Sends events as they come; the end of the connection is the end of the answer."""
        first = next(events)  # what is wrong is told before the stream begins
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.closing(events):
            try:
                for event in itertools.chain([first], events):
                    self.wfile.write(event)
            except OSError:  # the client has gone: closing the events ends the work for it
                return
            except ModelError as error:  # the engine has stopped
                told = {"error": {"message": str(error), "type": "server_error"}}
                self.wfile.write(b"data: " + json.dumps(told).encode() + b"\n\n")

    def _error(self, code: int, message: str) -> None:
        kind = "invalid_request_error" if code < 500 else "server_error"
        self._send(code, {"error": {"message": message, "type": kind, "code": code}})
        if self.close_connection:
            self._linger()

    def _linger(self) -> None:
        """Reads on within bounds: who is cut off while it sends may never see the answer."""
        left, until = 4 * MAX_BODY, time.monotonic() + 2
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            while left > 0 and time.monotonic() < until:
                found = self.rfile.read1(min(left, 2**16))
                if not found:
                    return
                left -= len(found)

    def _send(self, code: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the terminal belongs to the command."""
