"""The folder of a run: who holds it, what it was asked, how it stands."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from jaxdistill import agree
from jaxdistill.errors import ConfigError, StorageError
from jaxdistill.report.writers import append_event
from jaxdistill.safe import whole_file
from jaxdistill.safe.redact import redact, redacted
from jaxdistill.train.hooks import NO_HOOKS, Hooks

# A link in a run folder, planted or stale, must not direct writes to a file elsewhere.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
SCHEMA = 1
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


class RunDir:
    """A run's folder; `RUN.json` tells its state to whoever looks.

    Attributes:
      path: the folder.
      record: the content of RUN.json.
      hooks: what the caller handed in.
    """

    def __init__(self, path: str | os.PathLike, record: dict[str, Any], hooks: Hooks = NO_HOOKS):
        self.path = pathlib.Path(path).resolve()
        self.record, self.hooks = record, hooks

    @classmethod
    def create(
        cls, path: str, *, name: str, input_text: str, resolved: str, overrides: Sequence[str]
    ) -> "RunDir":
        """Makes a new run folder with the configuration as given and as understood.

        Raises:
          ConfigError: if the folder holds a run, or anything else, already; or if the
            configuration holds what looks like a key, which must not be kept.
          StorageError: if it cannot be written.
        """
        folder = pathlib.Path(path)
        secrets = [line.strip() for line in resolved.splitlines() if redact(line) != line]
        if secrets:
            raise ConfigError(
                f"{redact(secrets[0])}: looks like a key or a password, and the run folder keeps "
                "the configuration: put it into an environment variable, or change that value"
            )
        if (folder / "RUN.json").exists():
            raise ConfigError(
                f"run.dir = {path!r}: holds a run already: `jaxdistill resume {path}` goes on with "
                "it, another run.dir starts a new one"
            )
        if folder.exists() and not (folder.is_dir() and _only_begun(folder)):
            raise ConfigError(f"run.dir = {path!r}: is not an empty folder: give another one")
        record = {"schema": SCHEMA, "name": name, "status": "new", "step": 0, "attempts": []}
        record["command"] = redacted(sys.argv)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run = cls(folder, record)
            run.write_text("config.input.yaml", redact(input_text))
            run.write_text("config.resolved.yaml", resolved)
            run.write_text("overrides.txt", redact("".join(f"{line}\n" for line in overrides)))
            run.update()  # last: a folder without RUN.json is none of a run yet
        except OSError as error:
            raise _cannot_write(folder, error) from error
        return run

    @classmethod
    def open(cls, path: str | os.PathLike, hooks: Hooks = NO_HOOKS) -> "RunDir":
        """An existing run.

        Raises:
          ConfigError: if there is none, or its RUN.json cannot be read.
        """
        file = pathlib.Path(path) / "RUN.json"
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: holds no run (no RUN.json): give a run folder") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ConfigError(f"{file}: was written by another version of jaxdistill")
        return cls(path, record, hooks)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the folder, so that no second process writes into it.

        The operating system lets go of the lock of a process that has died; its name, which is
        still in the file, is then noted as an event. Names of processes on other hosts are trusted
        as far as the file system carries locks between them.

        Raises:
          ConfigError: naming the process that holds it.
          StorageError: if the folder cannot be written.
        """
        try:
            lock = open(
                os.open(self.path / "LOCK", os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o644), "r+"
            )
        except OSError as error:
            raise _cannot_write(self.path / "LOCK", error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = _holder(lock) or "another process"
                raise ConfigError(
                    f"{self.path}: is being written by {holder}: wait until it ends, or stop it"
                ) from None
            if dead := _holder(lock):
                self.event("taken_over", of=dead)
            own = {"pid": os.getpid(), "host": platform.node(), "started": round(time.time())}
            try:
                _rewrite(lock, json.dumps(own))
            except OSError as error:
                raise _cannot_write(self.path / "LOCK", error) from error
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # the lock ends with the process anyway
                    _rewrite(lock, "")

    @contextlib.contextmanager
    def attempt(self, step: int) -> Iterator[None]:
        """Notes when this process started and how it ended."""
        this = {"started": round(time.time(), 3), "from_step": step, "pid": os.getpid()}
        self.record["attempts"].append(this)
        self.update(status="running")
        try:
            yield
        except BaseException as error:
            this["ended"] = round(time.time(), 3)
            reason = redact(str(error)) or type(error).__name__
            stopped = isinstance(error, KeyboardInterrupt)
            try:
                self.update(status="stopped" if stopped else "failed", exit_reason=reason)
            except StorageError as failure:
                error.add_note(str(failure))  # what ended the run comes first
            raise
        this["ended"] = round(time.time(), 3)
        self.record.pop("exit_reason", None)
        self.update(status="done")

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one line to events.jsonl, before or after training; told where it cannot be."""
        if not agree.leads():
            return
        try:
            append_event(self.path, kind, self.hooks, **fields)
        except OSError as error:
            print(f"events.jsonl cannot be written ({error}): {kind} {fields}", file=sys.stderr)

    def update(self, **fields: Any) -> None:
        """Changes RUN.json in one move."""
        self.record |= fields
        self.write_json("RUN.json", self.record)

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file that appears whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of this folder, or None where there is none."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file that appears whole or not at all; process 0 does it for all.

        Raises:
          StorageError: if it cannot be written; what was there before is then still there.
        """
        if not agree.leads():
            return
        try:
            whole_file.write_text(self.path / name, text)
        except OSError as error:
            raise _cannot_write(self.path / name, error) from error


def _only_begun(folder: pathlib.Path) -> bool:
    """Whether a folder holds nothing but what a process that died in `create` has left."""
    ours = {"config.input.yaml", "config.resolved.yaml", "overrides.txt", "RUN.json"}
    return all(path.name.removesuffix(".tmp") in ours for path in folder.iterdir())


def _cannot_write(path: pathlib.Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    return StorageError(f"{path}: cannot be written: {reason}: free space or mend the folder")


def _holder(lock: IO[str]) -> str:
    """Who wrote a lock file, or "" where it was let go."""
    lock.seek(0)
    text = lock.read(1000).strip()
    try:
        owner = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["started"]))
        return f"process {owner['pid']} on {owner['host']}, since {since}"
    except (ValueError, TypeError, KeyError):
        return text


def _rewrite(lock: IO[str], text: str) -> None:
    # Without a buffer, which would be written once more, and fail once more, when it is closed.
    os.ftruncate(lock.fileno(), 0)
    os.pwrite(lock.fileno(), text.encode(), 0)


def describe_machine(devices: Sequence[Any], mesh_shape: Mapping[str, int]) -> dict[str, Any]:
    """Versions, device and mesh, for RUN.json."""
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for package in ("jaxdistill", *PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    device = f"{len(devices)} x {devices[0].device_kind}"
    return {"versions": versions, "device": device, "mesh": dict(mesh_shape)}


def fingerprint(values: Any) -> str:
    """A digest of any JSON value."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
