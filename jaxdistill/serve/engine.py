"""One model and one thread, which continues everybody's prompts together."""

import queue
import threading

from jaxdistill.errors import ModelError
from jaxdistill.models import Model, text
from jaxdistill.models.generator import Generator
from jaxdistill.serve.stream import Stream

MAX_PENDING = 4096  # samples that are asked for and not yet answered


class Busy(Exception):
    """Too much is asked at the same time."""


class Engine:
    """The generation engine behind a server.

    Args:
      model: with a tokenizer.
      slots: answers that are written at the same time.
      length: tokens of a prompt and its answer together.
    """

    def __init__(self, model: Model, *, slots: int, length: int):
        self._model, self.length = model, length
        self._pending, self._counting = 0, threading.Lock()
        self._generator = Generator(model.config, model.params, slots=slots, length=length)
        self._inbox: queue.Queue[Stream | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether anything can be answered."""
        return self._thread.is_alive()

    @property
    def pending(self) -> int:
        """Samples that somebody waits for."""
        return self._pending

    def begin(self, stream: Stream) -> None:
        """Begins to answer what `requests.check` let in; who waits must call `release` in the end.

        Raises:
          ModelError: if the engine has stopped.
          Busy: if too many samples are waited for already.
        """
        if not self.alive:
            raise ModelError("the server's engine has stopped: start it again")
        with self._counting:
            if self._pending + stream.samples > MAX_PENDING:
                raise Busy(f"{self._pending} samples are waited for: try again later")
            self._pending += stream.samples
        self._inbox.put(stream)
        if not self.alive:  # it ended meanwhile, and may not have seen this stream
            stream.fail(ModelError("the server's engine has stopped"))

    def release(self, stream: Stream) -> None:
        """Nobody waits for this stream any more: what is not done of it is not done."""
        with self._counting:
            if not stream.closed:
                self._pending -= stream.samples
            stream.closed = True

    def close(self) -> None:
        """Ends the thread; what is under way is not finished."""
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        """The thread: whatever ends it, nobody is left waiting."""
        waiting: set[Stream] = set()
        try:
            self._serve(waiting)
        finally:
            while not self._inbox.empty():
                stream = self._inbox.get()
                if stream is not None:
                    waiting.add(stream)
            for stream in waiting:
                stream.fail(ModelError("the server's engine has stopped"))

    def _serve(self, waiting: set[Stream]) -> None:
        while True:
            try:
                stream = self._inbox.get(block=not self._generator.busy)
                if stream is None:
                    return
                if not stream.closed:
                    waiting.add(stream)
                    for request in stream.requests:
                        self._generator.submit(request)
                continue  # everything that has come goes in before the next tokens are made
            except queue.Empty:
                pass
            self._advance(waiting)

    def _advance(self, waiting: set[Stream]) -> None:
        """Makes the next tokens, and tells those who wait for them."""
        for stream in [stream for stream in waiting if stream.closed]:
            self._generator.cancel(stream)
            waiting.remove(stream)
        finished = self._generator.step()
        for request, sample, tokens in self._generator.written():
            if request.tag.live:
                request.tag.hear(request, sample, text.decode(self._model.tokenizer, tokens))
        for done in finished:
            stream = done.request.tag
            stream.end(done, text.text_of(self._model.tokenizer, done))
            if stream.finished:
                waiting.discard(stream)
