"""The folder of a run: who holds it, what it was asked, how it stands."""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdistill import agree
from jaxdistill.errors import ConfigError, DamagedError, StorageError
from jaxdistill.report import json_lines
from jaxdistill.report.writers import append_event
from jaxdistill.safe import json_file, lock, whole_file
from jaxdistill.safe.redact import redact, redacted
from jaxdistill.train.hooks import NO_HOOKS, Hooks

SCHEMA = 1
# Of RUN.json: what it always has, and what it may have.
_SHAPE = {"name": str, "status": str, "step": int, "attempts": list, "id": str}
_MORE = {
    **dict.fromkeys(("command",), list),
    **dict.fromkeys(
        ("saved", "callbacks", "versions", "mesh", "teacher", "teachers", "student"), dict
    ),
    **dict.fromkeys(("device", "method", "exit_reason"), str),
    "sealed": bool,
    "total_steps": int,
}
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
        self._changing = threading.RLock()  # the thread that writes checkpoints notes them here

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
        _refuse_secrets(resolved)
        _check_free(folder, path)
        record = {"schema": SCHEMA, "name": name, "status": "new", "step": 0, "attempts": []}
        record["id"] = uuid.uuid4().hex
        record["command"] = redacted(sys.argv)
        run = cls(folder, record)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise lock.cannot_write(folder, error) from error
        with lock.held(folder):
            _check_free(folder, path)  # another process may have been faster
            run.write_text("config.input.yaml", redact(input_text))
            run.write_text("config.resolved.yaml", resolved)
            run.write_text("overrides.txt", redact("".join(f"{line}\n" for line in overrides)))
            run.update()  # last: a folder without RUN.json is none of a run yet
        return run

    @classmethod
    def open(cls, path: str | os.PathLike, hooks: Hooks = NO_HOOKS) -> "RunDir":
        """An existing run.

        Raises:
          ConfigError: if there is none, or another version wrote it.
          DamagedError: if its RUN.json is damaged.
        """
        file = pathlib.Path(path) / "RUN.json"
        if not file.exists():
            raise ConfigError(f"{path}: holds no run (no RUN.json): give a run folder")
        record = json_file.read(file)
        if record.get("schema") != SCHEMA:
            raise ConfigError(f"{file}: was written by another version of jaxdistill")
        try:
            _check(record)
        except ValueError as error:
            raise DamagedError(f"{file}: is damaged: {error}") from error
        return cls(path, record, hooks)

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Holds the folder as `lock.held`; that a dead process held it is noted as an event."""
        return lock.held(self.path, lambda dead: self.event("taken_over", of=dead))

    @contextlib.contextmanager
    def attempt(self, step: int) -> Iterator[None]:
        """Notes when this process started and how it ended."""
        this: dict[str, Any] = {
            "started": round(time.time(), 3),
            "from_step": step,
            "pid": os.getpid(),
        }
        was_done = self.record["status"] == "done"
        with self._changing:
            self.record["attempts"].append(this)
            self.update(**({} if was_done else {"status": "running"}))
        try:
            yield
        except BaseException as error:
            reason = redact(str(error)) or type(error).__name__
            stopped = isinstance(error, KeyboardInterrupt)
            status = "stopped" if stopped else "failed"
            try:
                with self._changing:
                    this |= {"ended": round(time.time(), 3)}
                    if was_done and self.record["status"] == "done":
                        this["refused"] = reason  # nothing was begun: the run is as it was
                        self.update()
                    else:
                        self.update(status=status, exit_reason=reason)
            except StorageError as failure:
                error.add_note(str(failure))  # what ended the run comes first
            raise
        with self._changing:
            this["ended"] = round(time.time(), 3)
            self.record.pop("exit_reason", None)
            self.update(status="done")

    def reread(self) -> None:
        """Takes RUN.json as it is now: who held the folder before has changed it."""
        self.record = RunDir.open(self.path).record

    def configure(self, resolved: str) -> None:
        """Replaces the configuration as understood.

        Raises:
          ConfigError: if it holds what looks like a key.
        """
        _refuse_secrets(resolved)
        self.write_text("config.resolved.yaml", resolved)

    def note_saved(self, part: str, step: int) -> None:
        """Keeps that a training of the run has a checkpoint; from any thread.

        Where that cannot be written, the next one is noted instead.
        """
        with self._changing, contextlib.suppress(StorageError):
            saved = self.record.get("saved", {})
            if part not in saved:
                self.update(saved=saved | {part: step})

    def forget_saved(self, part: str) -> None:
        """From now on a training of the run needs no checkpoint: it is over."""
        with self._changing:
            saved = self.record.get("saved", {})
            self.update(saved={name: step for name, step in saved.items() if name != part})

    def forget(self) -> None:
        """Makes the record that of a run which has not begun."""
        kept = ("schema", "name", "attempts", "command")
        with self._changing:
            self.record = {name: self.record[name] for name in kept if name in self.record}
            # To a tracker it is another run, whose numbers do not go on those of the first.
            self.update(status="new", step=0, id=uuid.uuid4().hex)

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
        with self._changing:
            self.record |= fields
            self.write_json("RUN.json", self.record)

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file that appears whole or not at all; null for what is not finite."""
        self.write_text(name, json.dumps(json_lines.safe(content), indent=2) + "\n")

    def read_json(self, name: str, shape: json_file.FieldTypes | None = None) -> Any:
        """The object in a JSON file of this folder, or None where there is none.

        Raises:
          DamagedError: as `json_file.read`.
        """
        return json_file.read(self.path / name, shape, missing=None)

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
            raise lock.cannot_write(self.path / name, error) from error


def _check(record: dict[str, Any]) -> None:
    """Raises ValueError where a field of RUN.json is not of its kind."""
    json_file.check(record, _SHAPE | {name: _MORE[name] for name in _MORE if name in record})
    if not re.fullmatch("[0-9a-f]{32}", record["id"]):
        raise ValueError("its field 'id' is not 32 hexadecimal digits")
    if record["step"] < 0:
        raise ValueError("its field 'step' is negative")
    for entry in record["attempts"]:
        json_file.check(entry, {})
    saved, kept = record.get("saved", {}), record.get("callbacks", {})
    json_file.check(saved, dict.fromkeys(saved, int))
    json_file.check(kept, dict.fromkeys(kept, dict))


def _refuse_secrets(resolved: str) -> None:
    secrets = [line.strip() for line in resolved.splitlines() if redact(line) != line]
    if secrets:
        raise ConfigError(
            f"{redact(secrets[0])}: looks like a key or a password, and the run folder keeps "
            "the configuration: put it into an environment variable, or change that value"
        )


def _check_free(folder: pathlib.Path, path: str) -> None:
    """Raises ConfigError where a folder holds a run, or anything that is not ours."""
    if (folder / "RUN.json").exists():
        raise ConfigError(
            f"run.dir = {path!r}: holds a run already: `jaxdistill resume {path}` goes on with "
            "it, another run.dir starts a new one"
        )
    if folder.exists() and not (folder.is_dir() and _only_begun(folder)):
        raise ConfigError(f"run.dir = {path!r}: is not an empty folder: give another one")


def _only_begun(folder: pathlib.Path) -> bool:
    """Whether a folder holds nothing but what a process that died in `create` has left."""
    ours = {"config.input.yaml", "config.resolved.yaml", "overrides.txt", "RUN.json", lock.FILE}
    return all(path.name.removesuffix(".tmp") in ours for path in folder.iterdir())


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
