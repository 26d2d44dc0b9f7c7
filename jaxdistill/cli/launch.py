"""Several processes of one run on this machine: `jaxdistill launch -n N -- train CONFIG`."""

import argparse
import contextlib
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from jaxdistill.errors import ConfigError, StorageError
from jaxdistill.train import stopping

COMMANDS = ("train", "resume")
PROGRAM = ("-m", "jaxdistill")  # of every process
GRACE_SECONDS = 5.0  # for the others to say what they have to say once one has failed
LINGER_SECONDS = 60.0  # for the others to end once one is done
_POLL_SECONDS = 0.05
_WAITS = (1.0, 5.0, 15.0, 60.0)  # seconds before the first restart, the second ...
# What a user got wrong, what was lost for good, and a stop that was asked for: not tried again.
_FINAL = (2, 3, 4, 5, 6, 7, 9, 75, 130)
_NOISE = b"[Gloo] Rank "  # printed by XLA on stdout whenever processes meet
_FLAG = "--xla_force_host_platform_device_count"


def launch(arguments: argparse.Namespace) -> int:
    """Starts the processes, watches them, starts them again if asked to."""
    words = [word for word in arguments.words[:1] if word != "--"] + arguments.words[1:]
    if not words or words[0] not in COMMANDS:
        raise ConfigError(
            "launch: give a command after --, one of "
            f"{', '.join(COMMANDS)}: jaxdistill launch -n 2 -- train CONFIG"
        )
    logs = None if arguments.log_dir is None else pathlib.Path(arguments.log_dir)
    attempt = 0
    while True:
        group = Group(words, arguments.processes, arguments.devices_per_process, logs)
        code = group.run()
        if code == 0 or code in _FINAL or group.signals or attempt == arguments.restart:
            return code
        pause = _WAITS[min(attempt, len(_WAITS) - 1)]
        attempt += 1
        _tell(f"restart {attempt} of {arguments.restart} in {pause:g} s")
        time.sleep(pause)
        words = _resumed(words)


def _resumed(words: Sequence[str]) -> list[str]:
    """The command that goes on with what an earlier one began."""
    from jaxdistill import cli, config

    arguments = cli.parse(list(words))
    json = ["--json"] if arguments.json else []
    if words[0] == "resume":  # what is to change has changed, and it begins anew only once
        return ["resume", arguments.run_dir, *json]
    text = config.read(arguments.config)
    folder = config.loads(text, arguments.config, arguments.overrides).run.dir
    if not (pathlib.Path(folder) / "RUN.json").exists():
        return list(words)  # it failed before there was a run
    return ["resume", folder, *json]


class Group:
    """Processes that begin together and end together.

    Attributes:
      signals: what this process was told by others while they ran, one for each request; passed
        on to all of them.
    """

    def __init__(
        self, words: Sequence[str], count: int, devices: int, logs: pathlib.Path | None = None
    ):
        self._words, self._count, self._devices, self._logs = list(words), count, devices, logs
        self._running: list[subprocess.Popen] = []
        self._threads: list[threading.Thread] = []
        self.signals: list[int] = []

    def run(self) -> int:
        """Runs all of them to their end; the exit code of the first that failed, else 0."""
        with self._passing_signals():
            try:
                self._start()
                return self._watch()
            finally:
                self._kill()
                for thread in self._threads:
                    thread.join(GRACE_SECONDS)

    def _start(self) -> None:
        port = _free_port()
        for rank in range(self._count):
            # Process 0 keeps the terminal for its progress, unless what it says is to be kept.
            apart = rank > 0 or self._logs is not None
            process = subprocess.Popen(
                [sys.executable, *PROGRAM, *self._words],
                env=_environment(rank, self._count, self._devices, port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if apart else None,
                start_new_session=True,  # Ctrl-C reaches them through this process, once
            )
            self._running.append(process)
            for stream, own in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                if stream is not None:
                    self._follow(rank, stream, own if rank == 0 else sys.stderr)

    def _follow(self, rank: int, stream: IO[bytes], shown: Any) -> None:
        """Passes on what a process says, line by line: with its number, except process 0's."""
        prefix = f"[{rank}] " if rank else ""
        kept = contextlib.nullcontext() if self._logs is None else _log(self._logs, rank)

        def pump() -> None:
            with stream, kept as file:
                for line in stream:
                    if line.startswith(_NOISE):
                        continue
                    text = line.decode("utf-8", "replace")
                    with contextlib.suppress(OSError, ValueError):  # the reader has gone
                        shown.write(prefix + text)
                        shown.flush()
                    if file is not None:
                        with contextlib.suppress(OSError):  # a full disk stops no run
                            file.write(text)
                            file.flush()

        thread = threading.Thread(target=pump, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _watch(self) -> int:
        """Waits; once one has failed, or a second signal came, the others have a grace."""
        code, deadline, alive = 0, math.inf, True
        while alive:
            # Before who has failed: those that end together in between are still reported.
            alive = any(process.poll() is None for process in self._running)
            ended = {
                rank: process.returncode
                for rank, process in enumerate(self._running)
                if process.poll() not in (None, 0)
            }
            if ended and not code:
                rank = min(ended, key=lambda rank: _consequence(ended[rank]))
                code = _exit_code(ended[rank])
                _tell(f"process {rank} ended with {_described(ended[rank])}")
            if code not in (0, 75) or len(self.signals) > 1:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            elif any(process.poll() is not None for process in self._running):
                deadline = min(deadline, time.monotonic() + LINGER_SECONDS)
            if time.monotonic() > deadline:
                self._kill()
            if alive:
                time.sleep(_POLL_SECONDS)
        codes = [_exit_code(process.returncode) for process in self._running]
        return code or next((one for one in codes if one), 0)

    def _kill(self) -> None:
        """Ends what still runs, and what that has started."""
        for process in self._running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    @contextlib.contextmanager
    def _passing_signals(self) -> Iterator[None]:
        first = None

        def passed(number: int, frame: Any) -> None:
            nonlocal first
            now = time.monotonic()
            if first is not None and now - first <= stopping.SAME_SECONDS:
                return  # the rest of one request, which the processes have
            first = now if first is None else first
            self.signals.append(number)
            for process in self._running:
                if process.poll() is None:
                    process.send_signal(number)

        heard = [one for one in stopping.SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
        before = {one: signal.signal(one, passed) for one in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _environment(rank: int, count: int, devices: int, port: int) -> dict[str, str]:
    """What tells a process who it is: a coordinator on this machine alone, devices of its own."""
    address = f"127.0.0.1:{port}"
    mine = range(rank * devices, (rank + 1) * devices)
    flags = [word for word in os.environ.get("XLA_FLAGS", "").split() if _FLAG not in word]
    return os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(rank),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, mine)),  # of GPUs
        "XLA_FLAGS": " ".join(flags),
        "JAXDISTILL_LAUNCHER": str(os.getpid()),
    }


def die_with_launcher() -> None:
    """In a process that `launch` started: makes it end when the launcher does, however it ends."""
    launcher = os.environ.pop("JAXDISTILL_LAUNCHER", None)
    if launcher is None or sys.platform != "linux":
        return
    import ctypes

    set_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it ended before the line above
        sys.exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _log(folder: pathlib.Path, rank: int) -> Any:
    path = folder / f"rank-{rank}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"launch: --log-dir: {path}: cannot be written: {error}") from error


def _consequence(status: int) -> int:
    """0 for what ended a process from outside, 1 for its own error, 2 for an abort.

    A process that loses another aborts, or fails in a collective operation: what happened to the
    other is the cause, though both may have ended by the time they are looked at.
    """
    return 2 if status == -signal.SIGABRT else int(status > 0)


def _exit_code(status: int) -> int:
    """As a shell has it: 128 + N for an end by signal N."""
    return 128 - status if status < 0 else status


def _described(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"


def _tell(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
