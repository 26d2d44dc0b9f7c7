"""Runs a function on a stranger's text in a process of its own, bounded in time and memory."""

import contextlib
import importlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

CALLS = 100  # after so many calls the process is replaced: libraries leak
MEMORY = 4 << 30  # bytes of address space beyond which the process fails
MAX_RESULT = 1 << 30  # bytes
_STARTING = 60.0  # seconds in which the process may start and import the module
_SPARE = 2  # seconds of processor time beyond that after which an orphan ends itself
_KEPT = ("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")  # no keys among them


class TimedOut(Exception):
    """The function took too long, or its process died; the process is gone."""


class Guarded:
    """A function of a module, called in a process of its own.

        with Guarded("jaxdistill.reasoning.verifiers:search", seconds=1.0) as search:
            search(r"(a+)+$", "a" * 30)     # TimedOut after a second

    What goes in and comes out is JSON. The process starts at the first call, is replaced after
    `calls` of them, and ends with this object. Any thread may call; calls wait for one another.

    Args:
      name: "module:function"; arguments and result must be JSON values (tuples come back as lists).
      seconds: a call that takes longer is killed.
      memory: bytes of address space; beyond them the function fails.
      calls: how many a process serves.
    """

    def __init__(self, name: str, *, seconds: float, memory: int = MEMORY, calls: int = CALLS):
        self._name, self._seconds, self._memory, self._most = name, seconds, memory, calls
        self._process: subprocess.Popen | None = None
        self._end: Any = None
        self._calls = 0
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        """The function's result.

        Raises:
          TimedOut: if there is none in time.
          RuntimeError: with the words of what the function raised.
        """
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None or self._full:
                    self._start()
                self._calls += 1
                self._send(arguments)
                good, value = self._receive(self._seconds)
            except (OSError, ValueError) as error:
                self.close()
                raise TimedOut(f"{self._name}: the process died") from error
            except TimedOut:
                self.close()
                raise
        if not good:
            raise RuntimeError(f"{self._name}: {value}")
        return value

    @property
    def _full(self) -> bool:
        return self._calls >= self._most

    def _send(self, arguments: tuple) -> None:
        assert self._process is not None and self._process.stdin
        self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self, seconds: float) -> Any:
        """One line of the process."""
        assert self._process is not None and self._process.stdout
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        pieces, size = [], 0
        while not pieces or not pieces[-1].endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready or size > MAX_RESULT:
                raise TimedOut(f"{self._name}: no result within {seconds} s")
            pieces.append(os.read(pipe, 1 << 20))
            size += len(pieces[-1])
            if not pieces[-1]:
                raise TimedOut(f"{self._name}: the process died")
        return json.loads(b"".join(pieces))

    def _start(self) -> None:
        self.close()
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        environment["JAX_PLATFORMS"] = "cpu"
        main = "from jaxdistill.safe.guarded import serve; serve()"
        words = [self._name, str(self._memory), str(int(self._seconds) + 1 + _SPARE)]
        # Not multiprocessing: its children run the user's script again, and speak pickle.
        self._process = subprocess.Popen(
            [sys.executable, "-c", main, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._end = weakref.finalize(self, _stop, self._process)
        self._calls = 0
        self._receive(_STARTING)

    def close(self) -> None:
        """Ends the process."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def __enter__(self) -> "Guarded":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _stop(process: subprocess.Popen) -> None:
    process.kill()
    with contextlib.suppress(OSError):  # what could not be sent to a dead process
        process.communicate()


def serve() -> None:
    """The process: answers calls, one line each, until its standard input ends."""
    name, memory, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _limit(resource.RLIMIT_AS, memory)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    module, _, function = name.partition(":")
    call = getattr(importlib.import_module(module), function)
    answers.write(b"true\n")
    answers.flush()
    for line in sys.stdin.buffer:
        # A parent that was killed cannot end an endless call: the processor's clock does.
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + seconds)
        try:
            answer = json.dumps([True, call(*json.loads(line))])
        except Exception as error:  # whatever a library makes of hostile text
            answer = json.dumps([False, f"{type(error).__name__}: {str(error)[:500]}"])
        answers.write(answer.encode() + b"\n")
        answers.flush()


def _limit(kind: int, value: int) -> None:
    """Sets a limit that can be raised again, within what the system allows."""
    most = resource.getrlimit(kind)[1]
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(kind, (value, most))
