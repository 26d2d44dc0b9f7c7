"""Answers piece by piece: what of a text may be shown already, and who waits for it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from jaxdistill.models.requests import Completion, Request
from jaxdistill.models.text import stops_of


class Piece(NamedTuple):
    """New text of one answer, and the whole answer once it is finished."""

    index: int
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
    """The answers to one client's requests, which the engine makes and hands over.

    Args:
      requests: one for each prompt, alike but for prompt and stream, which is its number.
      live: whether texts are wanted before they are finished.
      put: takes each piece in the engine's thread, or the error that ends the stream.

    Attributes:
      requests: the same, each with this stream as its tag.
      closed: nobody waits any more.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        live: bool,
        put: Callable[[Piece | Exception], None],
    ):
        self.requests = [replace(request, tag=self) for request in requests]
        self.live, self.closed, self._put = live, False, put
        self.samples = sum(request.samples for request in requests)
        self._shown = [0] * self.samples
        self._unfinished = self.samples

    @property
    def finished(self) -> bool:
        """Whether all answers have been handed over."""
        return self._unfinished == 0

    def hear(self, request: Request, sample: int, text: str) -> None:
        """Takes an answer's whole text so far."""
        index = _index(request, sample)
        text, shown = settled(text, stops_of(request)), self._shown[index]
        if len(text) > shown:
            self._shown[index] = len(text)
            self._put(Piece(index, text[shown:]))

    def end(self, done: Completion, text: str) -> None:
        """Takes an answer that is finished, and its whole text."""
        index = _index(done.request, done.sample)
        self._unfinished -= 1
        self._put(Piece(index, text[self._shown[index] :], done))

    def fail(self, error: Exception) -> None:
        """Ends the waiting with an error."""
        self._put(error)


def _index(request: Request, sample: int) -> int:
    """The protocol numbers all samples of the first prompt first, and so on."""
    return request.stream * request.samples + sample
