"""An answer piece by piece: what of it may be shown already, and OpenAI's events that show it."""

import contextlib
import json
import queue
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from jaxdistill.models.requests import Completion, Request
from jaxdistill.models.text import stops_of

DONE = b"data: [DONE]\n\n"


class Piece(NamedTuple):
    """New text of one sample, and the whole sample once it is finished."""

    sample: int
    text: str
    done: Completion | None = None


def settled(text: str, stops: Sequence[str]) -> str:
    r"""The part of an unfinished text that further tokens cannot change.

    Held back are half a character at its end, and what may be the beginning of a stop string.

    >>> settled("one, two, STO", ("STOP",)), settled("caf\ufffd", ()), settled("one", ("STOP",))
    ('one, two, ', 'caf', 'one')
    """
    text = text.rstrip("\ufffd")
    longest = max(map(len, stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return text[:-size]
    return text


class Stream:
    """Pieces of one request's samples: the engine puts them in, one reader takes them out.

    Args:
      request: what was asked.
      live: whether texts are wanted before they are finished.
      at_end: called once with the request, when nobody reads any more.
    """

    def __init__(
        self,
        request: Request,
        *,
        live: bool,
        at_end: Callable[[Request], None] = lambda _: None,
    ):
        self.request, self.live, self._at_end = request, live, at_end
        self.closed = False  # nobody reads any more
        self._shown = dict.fromkeys(range(request.first, request.first + request.samples), 0)
        self._unfinished = request.samples
        self._pieces: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()

    @property
    def finished(self) -> bool:
        """Whether all samples have been put in."""
        return self._unfinished == 0

    def hear(self, sample: int, text: str) -> None:
        """Takes a sample's whole text so far."""
        text, shown = settled(text, stops_of(self.request)), self._shown[sample]
        if len(text) > shown:
            self._shown[sample] = len(text)
            self._pieces.put(Piece(sample, text[shown:]))

    def end(self, done: Completion, text: str) -> None:
        """Takes a sample that is finished, and its whole text."""
        rest = text[self._shown[done.sample] :]
        self._unfinished -= 1
        self._pieces.put(Piece(done.sample, rest, done))

    def fail(self, error: Exception) -> None:
        """Ends the reading with an error."""
        self._pieces.put(error)

    def pieces(self) -> Generator[Piece, None, None]:
        """What is put in, as it comes, until all samples are finished."""
        missing = self.request.samples
        try:
            while missing:
                piece = self._pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                missing -= piece.done is not None
                yield piece
        finally:
            self.closed = True
            self._at_end(self.request)


def events(
    stream: Stream, head: dict[str, Any], *, chat: bool, usage: bool
) -> Generator[bytes, None, None]:
    """The protocol's server-sent events for a stream.

    Args:
      stream: of the request.
      head: what stands in every event.
      chat: chat completions, not plain ones.
      usage: whether a last event counts the tokens.

    Raises:
      ModelError: if the request cannot be served.
    """
    met, written = set(), 0
    with contextlib.closing(stream.pieces()) as pieces:
        for sample, text, done in pieces:
            choice: dict[str, Any] = {"index": sample, "finish_reason": done and done.reason}
            if chat:
                role = {} if sample in met else {"role": "assistant"}
                choice["delta"] = {"content": text} | role
            else:
                choice["text"] = text
            met.add(sample)
            written += len(done.tokens) if done else 0
            yield event_of(head | {"choices": [choice]})
    if usage:
        yield event_of(head | {"choices": [], "usage": counts(len(stream.request.tokens), written)})
    yield DONE


def counts(read: int, written: int) -> dict[str, int]:
    """The protocol's count of tokens."""
    total = read + written
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": total}


def event_of(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"
