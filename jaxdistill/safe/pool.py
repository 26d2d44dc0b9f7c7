"""Processes of our own that answer messages, several at a time, in the order of the messages."""

import collections
import concurrent.futures
import contextlib
import importlib
import json
import logging
import os
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Iterable, Iterator
from typing import IO, Any, TypeVar

from jaxdistill import errors

_ANSWER, _REFUSAL, _FAILURE = b"a", b"u", b"f"
_HEAD = struct.Struct("<Qc")  # bytes that follow, and what they are
_TRIES = 2  # of a message, each in another process
_MOST_DEATHS = 8
_SHOWN = 300  # characters of what a dead process said last
# No keys among them: what is worked on may be a stranger's.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")
_ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
}
_log = logging.getLogger(__name__)
Origin = TypeVar("Origin")


class Died(Exception):
    """Processes ended while they worked on one message: how, and `place` says which message."""

    def __init__(self, place: Any, reason: str):
        super().__init__(reason)
        self.place = place


class Pool:
    """A function of a module, in several processes.

        with Pool("jaxdistill.data.worker:opened", setup, 4) as pool:
            for number, answer in pool.answers(enumerate(messages)):

    The function is called once in each process with `setup`, and gives what is called with each
    message. Messages and answers are bytes. A process that ends is replaced, and its message given
    to another one, once, which is told. They ignore Ctrl-C, and end with this object, or when this
    process has ended.

    Args:
      name: "module:function".
      setup: what the function is given.
      workers: how many processes.
    """

    def __init__(self, name: str, setup: bytes, workers: int):
        self._name, self._setup, self._workers = name, setup, workers
        self._lock, self._closed, self._deaths = threading.Lock(), False, 0
        self._all: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, "pool")
        for _ in range(workers):  # all of them start at once
            self._begin()

    def _begin(self) -> None:
        process = _Process(self._name)
        self._all.append(process)
        self._idle.put(process)

    def answers(self, messages: Iterable[tuple[Origin, bytes]]) -> Iterator[tuple[Origin, bytes]]:
        """(place, answer) of every (place, message), in their order, while later ones are read.

        Raises:
          UserError: that the function raised in its process.
          RuntimeError: with the words of anything else that it raised.
          Died: if two processes ended while they worked on one message, or too many did.
          Exception: what reading the messages raises, behind the answers to those before.
        """
        waiting: collections.deque[tuple[Origin, concurrent.futures.Future[bytes]]]
        waiting = collections.deque()
        source, stopped = iter(messages), None
        while True:
            try:
                place, message = next(source)
            except StopIteration:
                break
            except Exception as error:
                stopped = error
                break
            waiting.append((place, self._threads.submit(self._answer, place, message)))
            if len(waiting) > 2 * self._workers:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)
        if stopped is not None:
            raise stopped

    def _answer(self, place: Any, message: bytes) -> bytes:
        """The answer of whichever process is free; of another one where it ends."""
        tries = 0
        while True:
            process = self._idle.get()
            # One that had ended before, while it waited, says nothing about this message.
            tries += process.lives()
            try:
                answer = process.ask(self._setup, message)
            except (OSError, EOFError):
                reason = process.ended()
                with self._lock:
                    self._deaths += 1
                    if self._closed or tries == _TRIES or self._deaths > _MOST_DEATHS:
                        self._idle.put(process)  # nobody waits for it for ever
                        raise Died(place, reason) from None
                    self._begin()
                _log.warning("%s: what it was doing is done again by another one", reason)
            except BaseException:
                self._idle.put(process)
                raise
            else:
                self._idle.put(process)
                return answer

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        with self._lock:
            self._closed = True
        for process in self._all:
            process.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _first(
    waiting: "collections.deque[tuple[Origin, concurrent.futures.Future[bytes]]]",
) -> tuple[Origin, bytes]:
    """What waits longest, once it is there."""
    place, future = waiting.popleft()
    return place, future.result()


class _Process:
    """One process of a pool, and the pipes to it."""

    def __init__(self, name: str):
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        main = "from jaxdistill.safe.pool import serve; serve()"
        self._said, self._ready = tempfile.TemporaryFile(), False
        # Not multiprocessing: its children run the user's script again, and speak pickle.
        self._process = subprocess.Popen(
            [sys.executable, "-c", main, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment | _ONE_THREAD,
            process_group=0,  # Ctrl-C is for the process that asks
        )
        self._end = weakref.finalize(self, _stop, self._process, self._said)

    def ask(self, setup: bytes, message: bytes) -> bytes:
        """The answer to a message.

        Raises:
          OSError, EOFError: if the process has ended.
          UserError, RuntimeError: what was raised there.
        """
        if not self._ready:
            self._exchange(setup)
            self._ready = True
        return self._exchange(message)

    def _exchange(self, message: bytes) -> bytes:
        assert self._process.stdin and self._process.stdout
        _write(self._process.stdin, _ANSWER, message)
        kind, content = _read(self._process.stdout)
        if kind == _ANSWER:
            return content
        facts = json.loads(content)
        if kind == _REFUSAL:
            raise getattr(errors, facts["class"])(facts["words"])
        raise RuntimeError(facts["words"])

    def lives(self) -> bool:
        """Whether it has not ended, as far as can be told."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends it, whatever it is doing."""
        self._end()

    def ended(self) -> str:
        """How it has ended; a moment after its pipe did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5.0)
        code = self._process.poll()
        told = f"process {self._process.pid} "
        if code is None:
            told += "answers no more"
        elif code < 0:
            told += f"was ended by {signal.Signals(-code).name}"
            told += ", as where memory is short" if -code == signal.SIGKILL else ""
        else:
            told += f"ended with code {code}{self._last_words()}"
        self.stop()
        return told

    def _last_words(self) -> str:
        if self._said.closed:
            return ""
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").splitlines()
        return f": {lines[-1][-_SHOWN:]}" if lines else ""


def _stop(process: subprocess.Popen, said: Any) -> None:
    process.kill()
    for pipe in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(OSError):  # what could not be sent to a dead process
            pipe.close()
    process.wait()
    said.close()


def _write(stream: IO[bytes], kind: bytes, content: bytes) -> None:
    stream.write(_HEAD.pack(len(content), kind))
    stream.write(content)
    stream.flush()


def _read(stream: IO[bytes]) -> tuple[bytes, bytes]:
    """(kind, content) of what comes next.

    Raises:
      EOFError: if nothing does.
    """
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise EOFError
    size, kind = _HEAD.unpack(head)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return kind, content


def serve() -> None:
    """The process: answers messages until its standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    module, _, function = sys.argv[1].partition(":")
    call: Any = None
    with contextlib.suppress(EOFError, BrokenPipeError):  # who asks has ended
        while True:
            _, message = _read(sys.stdin.buffer)
            try:
                if call is None:
                    call = getattr(importlib.import_module(module), function)(message)
                    kind, content = _ANSWER, b""
                else:
                    kind, content = _ANSWER, call(message)
            except errors.UserError as error:
                kind, content = _REFUSAL, _told(type(error).__name__, str(error))
            except Exception as error:
                words = "".join(traceback.format_exception(error))
                kind, content = _FAILURE, _told(type(error).__name__, words)
            _write(answers, kind, content)


def _told(name: str, words: str) -> bytes:
    return json.dumps({"class": name, "words": words}).encode()
