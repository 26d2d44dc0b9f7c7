"""HTTP to servers of strangers: an answer has a size and a time, and comes from who was asked."""

import concurrent.futures
import importlib
import threading
import time
from collections.abc import Iterator
from typing import Any

MAX_ANSWER = 64_000_000  # bytes


def client(openai: Any, *, seconds: float) -> Any:
    """A client for `openai.OpenAI` that bounds every try.

    No redirect is followed, which could lead to any host with what was asked, and no compression is
    taken, in which some megabytes may be gigabytes.

    Args:
      openai: the module.
      seconds: until a try has failed, from its beginning to the last byte.
    """
    http = importlib.import_module("httpx2")
    return openai.DefaultHttpx2Client(
        transport=_bounded(http, seconds),
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},
    )


def _bounded(http: Any, seconds: float) -> Any:
    """A transport of the library `http`, which is installed with the extra `api` alone."""

    class Transport(http.BaseTransport):
        def __init__(self) -> None:
            self._inner = http.HTTPTransport()

        def handle_request(self, request: Any) -> Any:
            until = time.monotonic() + seconds
            # Each read has its own time, so headers may drip: who asks does not wait for them.
            future: concurrent.futures.Future = concurrent.futures.Future()
            threading.Thread(target=self._ask, args=(request, future), daemon=True).start()
            try:
                response = future.result(timeout=seconds)
            except concurrent.futures.TimeoutError:
                future.add_done_callback(_close)
                raise http.ReadTimeout(f"no answer within {seconds:g} s", request=request) from None
            coding = response.headers.get("content-encoding", "identity")
            if coding != "identity":
                response.close()
                raise http.DecodingError(
                    f"the answer is compressed ({coding[:40]})", request=request
                )
            response.stream = Stream(response.stream, request, until)
            return response

        def _ask(self, request: Any, future: concurrent.futures.Future) -> None:
            try:
                future.set_result(self._inner.handle_request(request))
            except BaseException as error:
                future.set_exception(error)
                del future  # it holds the error, which holds this frame

        def close(self) -> None:
            self._inner.close()

    class Stream(http.SyncByteStream):
        def __init__(self, inner: Any, request: Any, until: float) -> None:
            self._inner, self._request, self._until = inner, request, until

        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for piece in self._inner:
                size += len(piece)
                if size > MAX_ANSWER:
                    raise http.DecodingError(
                        f"the answer has more than {MAX_ANSWER} bytes", request=self._request
                    )
                if time.monotonic() > self._until:
                    raise http.ReadTimeout(
                        f"the answer was not complete within {seconds:g} s", request=self._request
                    )
                yield piece

        def close(self) -> None:
            self._inner.close()

    return Transport()


def _close(future: concurrent.futures.Future) -> None:
    """Ends an answer that nobody waits for any more."""
    if future.exception() is None:
        future.result().close()
