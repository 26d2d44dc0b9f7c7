"""HTTP to servers of strangers: an answer has a size and a time, and comes from who was asked."""

import concurrent.futures
import contextlib
import importlib
import threading
import time
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
            # Each read has a time of its own: headers may drip, and a body may stop between two
            # pieces. So all of it comes in a thread, and who asks waits no longer than once.
            until = time.monotonic() + seconds
            future: concurrent.futures.Future = concurrent.futures.Future()
            threading.Thread(target=self._ask, args=(request, until, future), daemon=True).start()
            concurrent.futures.wait([future], timeout=seconds)
            if not future.done():
                raise http.ReadTimeout(f"no whole answer within {seconds:g} s", request=request)
            return future.result()

        def _ask(self, request: Any, until: float, future: concurrent.futures.Future) -> None:
            try:
                response = self._inner.handle_request(request)
                with contextlib.closing(response):
                    future.set_result(self._whole(response, request, until))
            except BaseException as error:
                future.set_exception(error)
                del future  # it holds the error, which holds this frame

        def _whole(self, response: Any, request: Any, until: float) -> Any:
            """The response with its content in memory."""
            coding = response.headers.get("content-encoding", "identity")
            if coding != "identity":
                raise http.DecodingError(
                    f"the answer is compressed ({coding[:40]})", request=request
                )
            content = bytearray()
            for piece in response.stream:
                content += piece
                if len(content) > MAX_ANSWER:
                    raise http.DecodingError(
                        f"the answer has more than {MAX_ANSWER} bytes", request=request
                    )
                if time.monotonic() > until:  # nobody waits for it any more
                    raise http.ReadTimeout("the time is over", request=request)
            return http.Response(
                response.status_code, headers=response.headers, content=bytes(content)
            )

        def close(self) -> None:
            self._inner.close()

    return Transport()
