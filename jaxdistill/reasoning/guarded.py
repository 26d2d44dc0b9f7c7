"""Runs a function on text from a model in a process that can be killed, with limits."""

import importlib
import multiprocessing
import os
import resource
from typing import Any

TASKS = 100  # after so many calls the process is replaced: libraries leak
MEMORY = 4 << 30  # bytes of address space beyond which the process fails


class TimedOut(Exception):
    """The function took too long, or its process died; the process is gone."""


class Guarded:
    """A function of a module, called in a process of its own.

        with Guarded("jaxdistill.reasoning.verifiers:search", seconds=1.0) as search:
            search(r"(a+)+$", "a" * 30)     # TimedOut after a second

    Args:
      name: "module:function"; arguments and result must be picklable.
      seconds: a call that takes longer is killed.
    """

    def __init__(self, name: str, *, seconds: float):
        self._name, self._seconds = name, seconds
        self._process: Any = None
        self._pipe: Any = None
        self._calls = 0

    def __call__(self, *arguments: Any) -> Any:
        """The function's result.

        Raises:
          TimedOut: if there is none in time.
          Exception: what the function raised, as a RuntimeError with its words.
        """
        if self._process is None or not self._process.is_alive() or self._calls >= TASKS:
            self._start()
        self._calls += 1
        try:
            self._pipe.send(arguments)
            # The first call pays for importing the module.
            allowed = self._seconds + (30.0 if self._calls == 1 else 0.0)
            if not self._pipe.poll(allowed):
                raise TimedOut(f"{self._name}: no result within {self._seconds} s")
            good, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise TimedOut(f"{self._name}: the process died") from error
        except TimedOut:
            self.close()
            raise
        if not good:
            raise RuntimeError(f"{self._name}: {value}")
        return value

    def _start(self) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")  # forking a process that runs XLA can hang
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._name, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe, self._calls = ours, 0

    def close(self) -> None:
        """Ends the process, by force if it does not listen."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.terminate()
            self._process.join(1.0)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process.close()
        self._process = self._pipe = None

    def __enter__(self) -> "Guarded":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _serve(name: str, pipe: Any) -> None:
    """The process: answers calls until the pipe closes."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    module, _, function = name.partition(":")
    call = getattr(importlib.import_module(module), function)
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, call(*arguments))
        except Exception as error:  # whatever a library makes of hostile text
            answer = (False, f"{type(error).__name__}: {str(error)[:500]}")
        pipe.send(answer)
