"""Checkpoints of a run: saved in the background, whole or not at all, checked before use.

A checkpoint is one folder, `<step>/`, that gets its name once everything in it is written and on
the disk. It holds the state as a flat table of arrays by name ("params/student/head"), and a
manifest: a JSON object (data position, seed), the metrics that rank it, and a checksum of every
file, because Orbax loads a flipped bit in an array's file as another number.
"""

import concurrent.futures
import contextlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
from jax import Array
from jax.sharding import Sharding
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from jaxdistill import agree
from jaxdistill.errors import ConfigError, DamagedError, StorageError
from jaxdistill.safe import json_file, manifest
from jaxdistill.train import step_folders
from jaxdistill.train.hooks import NO_HOOKS, Hooks
from jaxdistill.train.table import check_same, flatten

_STATE = "state"

# A save that fails raises one StorageError; Orbax would print its traceback six times before.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


class Checkpoints:
    """The checkpoints of one run; one writer per folder.

        with Checkpoints(folder, keep_latest=2, keep_best=1, best_metric="eval/loss") as saved:
            saved.save(100, state, {"data_row": 800}, {"eval/loss": 2.5})

    Every method is called by all processes of a run, from the main thread.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_latest: int | None = None,
        keep_best: int = 0,
        best_metric: str | None = None,
        mode: Literal["min", "max"] = "min",
        hooks: Hooks = NO_HOOKS,
        committed: Callable[[int], Any] = lambda step: None,
    ):
        """Opens a folder of checkpoints.

        Args:
          directory: made if it is missing and there is something to keep.
          keep_latest: how many of the newest stay; None opens the folder for reading alone, and
            changes nothing in it. A writer removes at once what a killed process left half-done.
          keep_best: how many of the best by `best_metric` stay besides.
          best_metric: a name among the metrics given to `save`.
          mode: whether its smallest or its largest value is the best. NaN and infinities rank last.
          hooks: what the caller handed in.
          committed: called with every step that has its checkpoint, in the thread that writes.

        Raises:
          ConfigError: if keep_best asks for a ranking without a metric.
          StorageError: if the folder cannot be made or used.
        """
        if keep_best and best_metric is None:
            raise ConfigError(f"keep_best = {keep_best}: needs best_metric, the metric that ranks")
        self.directory = pathlib.Path(directory).absolute()
        self._keep_latest, self._keep_best = keep_latest, keep_best
        self._metric, self._mode = best_metric, mode
        self._hooks, self._committed = hooks, committed
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        try:
            if self._writes():
                self.directory.mkdir(parents=True, exist_ok=True)
                step_folders.sweep(self.directory)
            step_folders.steps(self.directory)
        except OSError as error:
            raise StorageError(f"{self.directory}: cannot be used: {_reason(error)}") from error

    def _writes(self) -> bool:
        """Whether this process changes the folder."""
        return self._keep_latest is not None and agree.leads()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except StorageError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what ended the run comes first

    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending; waits for one that is being written."""
        self.wait()
        return agree.by_leader(lambda: step_folders.steps(self.directory))

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best finite `best_metric` of its run, the newest of equals, or None."""
        self.wait()
        return agree.by_leader(lambda: step_folders.best(self.directory))

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        beside: Mapping[str, Any] = MappingProxyType({}),
    ) -> float:
        """Copies the state to the host and writes it in the background.

        Waits first for the save before it, and raises if that one failed.

        Args:
          step: above every step there is.
          state: a pytree of arrays, PRNG keys as key data; may be donated right after the call.
          meta: anything JSON can hold.
          metrics: of the evaluation at this step; without them a checkpoint stays only as long as
            it is among the newest.
          beside: more of `meta`, by names: too large for the manifest, each in a file of its own.

        Returns:
          Seconds the caller was held up.

        Raises:
          StorageError: if the save before it failed, or the disk has too little space.
          ConfigError: if the step is not above the others, or the metrics lack `best_metric`.
        """
        began = time.perf_counter()
        assert self._keep_latest is not None, "opened for reading alone"
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ConfigError(
                f"{self.directory}: step {step} cannot be saved after step {latest}: to go back, "
                "`jaxdistill ckpt rollback` moves the later checkpoints away"
            )
        arrays, facts = flatten(state), {"meta": dict(meta), **self._ranked(metrics)}
        files = {f"{name}.json": json.dumps(value).encode() for name, value in beside.items()}
        facts["beside"] = sorted(beside)
        self._hooks.at("checkpoint.begin")
        needed = sum(array.nbytes for array in arrays.values()) + sum(map(len, files.values()))
        agree.together(lambda: self._check_room(step, needed))
        try:
            staged = step_folders.staging(self.directory, step)
            response = ocp.save_checkpointables_async(str(staged), {_STATE: arrays})
        except (OSError, ValueError) as error:
            raise self._failure(step, _reason(error)) from error
        self._hooks.at("checkpoint.copied")
        self._pending = step, self._thread.submit(self._finish, response, step, facts, files)
        return time.perf_counter() - began

    def _check_room(self, step: int, needed: int) -> None:
        """Raises where a save cannot succeed, before it is begun."""
        if not self.directory.is_dir():  # Orbax would make the whole path anew
            raise self._failure(step, "the folder is gone")
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise self._failure(step, f"needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")

    def _finish(
        self, response: Any, step: int, facts: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> None:
        """In the background: waits for the arrays, makes them a checkpoint, removes old ones."""
        response.result()
        if self._writes():
            for name, content in files.items():
                (step_folders.staging(self.directory, step) / name).write_bytes(content)
            step_folders.commit(self.directory, step, facts, self._hooks)
            self._committed(step)
            assert self._keep_latest is not None
            there = step_folders.readable(self.directory)
            keep = step_folders.kept(there, self._keep_latest, self._keep_best)
            with contextlib.suppress(OSError):  # no reason to call the new one a failure
                step_folders.retire(self.directory, keep, self._hooks)

    def _ranked(self, metrics: Mapping[str, float] | None) -> dict[str, Any]:
        """The metrics with their rank beside them, so that a reader needs no configuration."""
        if metrics is None:
            return {"metrics": None, "rank": None}
        finite: Callable[[float], float | None] = lambda x: x if math.isfinite(x) else None
        numbers = {name: finite(float(value)) for name, value in metrics.items()}
        rank = None
        if self._metric is not None:
            if self._metric not in metrics:
                raise ConfigError(
                    f"checkpoint.best_metric = {self._metric!r}: not among the metrics: "
                    f"{', '.join(sorted(metrics))}"
                )
            rank = finite(float(metrics[self._metric]) * (1 if self._mode == "max" else -1))
        return {"metrics": numbers, "rank": rank}

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          StorageError: if it failed, naming its step and the reason.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, future = pending

        def finish() -> None:
            try:
                future.result()
            except Exception as error:
                if self._writes():
                    step_folders.sweep(self.directory)
                raise self._failure(step, _reason(error)) from error

        agree.together(finish)

    def poll(self) -> None:
        """Like `wait`, without waiting: raises early where a save has failed.

        Only where a process is alone: several learn it together, at the next save.
        """
        if jax.process_count() == 1 and self._pending is not None and self._pending[1].done():
            self.wait()

    def _failure(self, step: int, reason: str) -> StorageError:
        latest = max(step_folders.steps(self.directory), default=None)
        stands = "no other is there" if latest is None else f"the one of step {latest} stands"
        return StorageError(
            f"{self.directory}: the checkpoint of step {step} could not be written: {reason}; "
            f"{stands}. Free space or mend the folder, then resume"
        )

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """The state of a checkpoint, placed as asked, and what was kept beside it.

        Args:
          step: one of `steps()`.
          abstract_state: a pytree of ShapeDtypeStruct, each with the sharding to restore into; it
            need not be that of the mesh the checkpoint was saved on.

        Raises:
          ModelError: if names, shapes or dtypes differ; the message lists the first ten.
          DamagedError: if its files are damaged.
          ConfigError: if there is no such step.
        """
        wanted = flatten(abstract_state)
        stored, meta = self._contents(step)
        check_same(stored, wanted, self.directory / str(step))
        arrays = self._load(step, wanted)
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), meta

    def restore_latest(
        self, abstract_state: Any, notice: Callable[[int, str], Any]
    ) -> tuple[int, Any, dict[str, Any]]:
        """The newest checkpoint that is sound: (step, state, meta).

        A writer moves damaged ones to the folder `bad` on the way: their steps can be saved anew.

        Args:
          abstract_state: as for `restore`.
          notice: called with the step of every damaged checkpoint and what is wrong with it.

        Raises:
          DamagedError: if none is sound, with the reason for each.
          ModelError: if the newest sound one does not fit.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                return step, *self.restore(step, abstract_state)
            except DamagedError as error:
                reasons.append(str(error))
                notice(step, str(error))
                if self._writes():
                    step_folders.set_aside(self.directory, step, step_folders.BAD)
        why = "; ".join(reasons) or "there are no checkpoints"
        raise DamagedError(f"{self.directory}: no checkpoint can be read: {why}")

    def restore_part(
        self,
        step: int,
        path: tuple[str, ...],
        shapes: Any,
        places: Any,
        dtype: DTypeLike | None = None,
    ) -> Any:
        """A part of a checkpoint's state, such as ("params", "student"), without reading the rest.

        Args:
          step: one of `steps()`.
          path: where the part is in the state.
          shapes: its tree of ShapeDtypeStruct; only their shapes matter.
          places: the same tree of shardings.
          dtype: what the arrays become; None keeps the dtype they were saved in.

        Raises:
          As `restore`, but dtypes may differ.
        """
        prefix = "/".join(path) + "/"
        stored, _ = self._contents(step)
        stored = {name: leaf for name, leaf in stored.items() if name.startswith(prefix)}
        wanted: dict[str, Any] = {}
        named, shardings = flatten(shapes), jax.tree.leaves(places)
        for (name, leaf), place in zip(named.items(), shardings, strict=True):
            assert isinstance(place, Sharding)
            type_ = dtype or stored.get(prefix + name, leaf).dtype
            wanted[prefix + name] = jax.ShapeDtypeStruct(leaf.shape, type_, sharding=place)
        check_same(stored, wanted, self.directory / str(step), dtypes=False)
        arrays = self._load(step, wanted, partial=True)
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    def close(self) -> None:
        """Waits for the last save and lets go of the folder.

        Raises:
          StorageError: if the last save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _contents(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint says it holds, once its files are known to be sound."""
        steps = self.steps()
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"{self.directory}: no checkpoint of step {step}; there are: {have}")
        folder = self.directory / str(step)
        part, parts = jax.process_index(), jax.process_count()

        def told() -> dict[str, Any]:
            facts = manifest.verify(folder, part, parts)
            files = {name: json_file.read(folder / f"{name}.json") for name in facts["beside"]}
            return {**facts["meta"], **files}

        meta = self._read(step, told)
        stored = lambda: dict(ocp.checkpointables_metadata(str(folder)).metadata[_STATE])
        return self._read(step, stored), meta

    def _load(self, step: int, wanted: dict[str, Any], partial: bool = False) -> dict[str, Array]:
        context = ocp.Context()
        context.pytree_options.loading.partial_load = partial
        folder = str(self.directory / str(step))
        with context:
            read = lambda: ocp.load_checkpointables(folder, {_STATE: wanted})
            return self._read(step, read)[_STATE]

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        def attempt() -> Any:
            try:
                return read()
            except Exception as error:  # a truncated file is a bare Exception
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise  # too little memory is not damage
                folder = self.directory / str(step)
                if self._keep_latest is None and not folder.exists():
                    raise ConfigError(
                        f"{folder}: was removed while it was read, by the run that it is of, which "
                        "keeps newer ones: ask again"
                    ) from error
                if isinstance(error, DamagedError):
                    raise
                raise DamagedError(f"{folder}: cannot be read: {_reason(error)}") from error

        return agree.together(attempt)


def _reason(error: BaseException) -> str:
    """What the operating system says, where an error wraps it; else the error's first line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return f"{os.strerror(int(code[1]))} (errno {code[1]})"
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
