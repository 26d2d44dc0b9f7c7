"""A port, and the server on it."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from jaxdistill.errors import ModelError
from jaxdistill.serve.connection import Connection, allow_files

BACKLOG = 2048  # connections that wait to be taken


def bind(host: str, port: int) -> socket.socket:
    """The port, which is nobody else's from now on; who comes waits until he is answered.

    A port that is bound and not listened to can be bound by others as well.

    Raises:
      ModelError: if host and port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        taken = socket.socket(family, socket.SOCK_STREAM)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind((host, port))
            taken.listen(BACKLOG)
        except BaseException:
            taken.close()
            raise
    except (OSError, OverflowError) as error:  # the latter for a port above 65535
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"serve: {host}:{port} cannot be had: {reason}") from error
    return taken


def make_server(app: ASGIApp) -> uvicorn.Server:
    """The server, which says nothing itself: the terminal belongs to the command."""
    allow_files()
    config = uvicorn.Config(
        app,
        http=Connection,
        backlog=BACKLOG,
        ws="none",
        loop="asyncio",
        interface="asgi3",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


@contextlib.contextmanager
def running(app: ASGIApp, taken: socket.socket) -> Iterator[int]:
    """Serves in a thread of its own while the context lasts; gives the port."""
    server, port = make_server(app), taken.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([taken],), name="serve", daemon=True)
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()
        taken.close()
