"""Runs commands in children of a process that has imported everything and started nothing.

A command of ours spends seconds on imports. A child that is forked off after them, from one thread
and before JAX has a backend, runs exactly as a fresh process would, and dies as one.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

LIFE = 900.0  # seconds that any command may take: a tiny run on a busy machine takes a tenth
ROOT = pathlib.Path(__file__).resolve().parents[1]


class Command:
    """A command that runs; `wait` gives its exit code, negative for the signal that ended it."""

    def __init__(self, nursery: "Nursery", pid: int):
        self.pid, self._nursery, self._code = pid, nursery, None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal; to a process that has ended, none."""
        if self._code is None:
            os.kill(self.pid, number)  # the nursery has not waited for it yet: the pid is its own

    def wait(self) -> int:
        """The exit code, once it has ended.

        Raises:
          TimeoutError: if that takes longer than LIFE; it is then killed.
        """
        if self._code is None:
            until = time.monotonic() + LIFE
            while self.running() and time.monotonic() < until:
                time.sleep(0.002)
            if self.running():
                self.kill()
                raise TimeoutError(f"process {self.pid} has not ended after {LIFE:.0f} s")
            self._code = self._nursery.ask({"wait": self.pid})["code"]
        return self._code

    def running(self) -> bool:
        """Whether it has not ended; a zombie has."""
        state = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"


class Nursery:
    """Starts commands, `jaxdistill ARGUMENTS`, in a fraction of a second each.

    Args:
      python: the interpreter.
      environment: of all commands, over this process's own.
    """

    def __init__(self, python: str = sys.executable, environment: Mapping[str, str] | None = None):
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **one_thread, **(environment or {})},
        )
        self.facts = self._read()

    def ask(self, what: Mapping[str, object]) -> dict:
        """One request to the process that forks, and its answer."""
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that forks has ended: {self._process.wait()}")
        return json.loads(line)

    def start(self, arguments: Sequence[str], log: pathlib.Path, fault: str = "") -> Command:
        """Starts a command; what it prints goes to the end of `log`."""
        request = {"arguments": list(arguments), "log": str(log), "fault": fault}
        return Command(self, self.ask(request)["pid"])

    def run(self, arguments: Sequence[str], log: pathlib.Path, fault: str = "") -> int:
        """Runs a command to its end."""
        return self.start(arguments, log, fault).wait()

    def close(self) -> None:
        """Ends the process that forks."""
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve() -> None:
    """Imports what a run imports, then forks for every request."""
    began = time.perf_counter()
    import grain  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tensorboardX  # noqa: F401
    import transformers  # noqa: F401
    from jax._src import xla_bridge

    from jaxdistill import api, cli  # noqa: F401
    from jaxdistill.cli import runs  # noqa: F401
    from jaxdistill.train.hooks import NO_HOOKS
    from tests import inject

    with contextlib.suppress(ImportError):  # of the extra `report`
        import matplotlib.backends.backend_svg
        import matplotlib.figure  # noqa: F401

    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1 and not xla_bridge._backends, "a child would not be as a fresh process"
    answers = os.fdopen(os.dup(1), "w")
    facts = {"import_seconds": round(time.perf_counter() - began, 2), "threads": threads}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitpid(request["wait"], 0)[1]
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                _redirect(request["log"])
                hooks = inject.Fault(request["fault"]) if request["fault"] else NO_HOOKS
                sys.argv[1:] = request["arguments"]  # as typed: so ends a process of its own
                raise SystemExit(cli.main(hooks=hooks))
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)


def _redirect(path: str) -> None:
    """In the child: the command prints to the end of a file and reads nothing."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


if __name__ == "__main__":
    _serve()
