"""Checkpoints on disk: saved in the background, whole or not at all, checked before use.

A checkpoint is one folder, `<step>/`, that Orbax renames into place once everything in it is
written. It holds the state as a flat table of arrays by name ("params/student/head"), a JSON object
(data position, seed) and the metrics that rank it, and a checksum of every file, because Orbax
loads a flipped bit in an array's file as another number.
"""

import concurrent.futures
import contextlib
import logging
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax import Array
from jax.sharding import Sharding
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from jaxdistill.errors import ConfigError, CorruptCheckpointError, StorageError
from jaxdistill.train import checksums
from jaxdistill.train.table import check_same, flatten

BAD = "bad"  # where checkpoints that cannot be read are put aside
_STATE = "state"

# A save that fails is told by StorageError, once; Orbax would print its traceback six times before.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


class Checkpoints:
    """The checkpoints of one run; one writer per folder.

        with Checkpoints(folder, keep_latest=2, keep_best=1, best_metric="eval/loss") as saved:
            saved.save(100, state, {"data_step": 100}, {"eval/loss": 2.5})

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
    ):
        """Opens a folder of checkpoints.

        Args:
          directory: made if it is missing and there is something to keep.
          keep_latest: how many of the newest stay; None opens the folder for reading alone, and
            changes nothing in it. A writer removes what a killed process left half-written, in the
            background and at the latest before its first save.
          keep_best: how many of the best by `best_metric` stay besides.
          best_metric: a name among the metrics given to `save`.
          mode: whether its smallest or its largest value is the best. NaN and infinities rank last.

        Raises:
          ConfigError: if keep_best asks for a ranking without a metric.
          StorageError: if the folder cannot be made or used.
          CorruptCheckpointError: if metrics cannot be read, and no checksum says of which step.
        """
        if keep_best and best_metric is None:
            raise ConfigError(f"keep_best = {keep_best}: needs best_metric, the metric that ranks")
        self.directory = pathlib.Path(directory).absolute()
        self._keep_latest, self._keep_best = keep_latest, keep_best
        self._metric, self._mode = best_metric, mode
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._orbax: ocp.training.Checkpointer | None = self._open()

    def _open(self) -> ocp.training.Checkpointer | None:
        if self._keep_latest is None and not self.directory.is_dir():
            return None
        every: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        make = lambda: ocp.training.Checkpointer(
            str(self.directory),
            save_decision_policy=every,
            preservation_policy=_preservation(self._keep_latest, self._keep_best),
            cleanup_tmp_directories=self._keep_latest is not None,
        )
        try:
            return make()
        except OSError as error:
            raise StorageError(f"{self.directory}: cannot be used: {_reason(error)}") from error
        except ValueError as error:  # metrics that cannot be read, before any step is asked for
            if self._keep_latest is None or not self._put_aside_damaged():
                raise CorruptCheckpointError(
                    f"{self.directory}: metrics of a checkpoint cannot be read: {_reason(error)}"
                ) from error
            return make()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except StorageError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what ended the run comes first

    def _complete(self) -> list[Any]:
        self.wait()
        return [] if self._orbax is None else list(self._orbax.checkpoints)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending; waits for one that is being written."""
        return [one.step for one in self._complete()]

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best finite `best_metric` of its run, the newest of equals, or None."""
        ranks = [(_rank(one.metrics), one.step) for one in self._complete()]
        rank, step = max(ranks, default=(-math.inf, None))
        return step if rank > -math.inf else None

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> float:
        """Copies the state to the host and goes on writing it in the background.

        Waits first for the save before it, and tells if that one failed.

        Args:
          step: above every step there is.
          state: a pytree of arrays, PRNG keys as key data; may be donated right after the call.
          meta: anything JSON can hold.
          metrics: of the evaluation at this step; without them a checkpoint stays only as long as
            it is among the newest.

        Returns:
          Seconds the caller was held up.

        Raises:
          StorageError: if the save before it failed, or the disk has too little space.
          ConfigError: if the step is not above the others, or the metrics lack `best_metric`.
        """
        began = time.perf_counter()
        assert self._keep_latest is not None and self._orbax is not None, "opened for reading alone"
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ConfigError(
                f"{self.directory}: step {step} cannot be saved after step {latest}: to go back, "
                "move the later checkpoints away first"
            )
        arrays, ranked = flatten(state), self._ranked(metrics)
        needed = sum(array.nbytes for array in arrays.values())
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise self._failure(step, f"needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
        try:
            response = self._orbax.save_checkpointables_async(
                step, {_STATE: arrays}, metrics=ranked, custom_metadata=dict(meta)
            )
        except (OSError, ValueError) as error:
            raise self._failure(step, _reason(error)) from error
        assert response is not None, "every step is due"
        folder = self.directory / str(step)
        self._pending = step, self._thread.submit(_finish, response, folder)
        return time.perf_counter() - began

    def _ranked(self, metrics: Mapping[str, float] | None) -> dict[str, Any] | None:
        """The metrics with their rank beside them, so that a reader needs no configuration."""
        if metrics is None:
            return None
        ranked: dict[str, Any] = {name: float(value) for name, value in metrics.items()}
        if self._metric is not None:
            if self._metric not in metrics:
                raise ConfigError(
                    f"checkpoint.best_metric = {self._metric!r}: not among the metrics: "
                    f"{', '.join(sorted(metrics))}"
                )
            value = ranked[self._metric] * (1 if self._mode == "max" else -1)
            ranked["rank"] = value if math.isfinite(value) else None
        return ranked

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          StorageError: if it failed, naming its step and the reason.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, future = pending
        try:
            future.result()
        except Exception as error:
            # A new Orbax object forgets the failure and knows what is on the disk.
            self._let_go()
            self._orbax = self._open()
            raise self._failure(step, _reason(error)) from error

    def poll(self) -> None:
        """Like `wait`, without waiting: tells early that a save has failed."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def _failure(self, step: int, reason: str) -> StorageError:
        latest = self.latest()
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
          CorruptCheckpointError: if its files are damaged.
          ConfigError: if there is no such step.
        """
        wanted = flatten(abstract_state)
        stored, meta = self._contents(step)
        check_same(stored, wanted, self.directory / str(step))
        arrays = self._load(step, wanted)
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), meta

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]]:
        """The newest checkpoint that is sound: (step, state, meta).

        A writer moves damaged ones to the folder `bad` on the way: their steps can be saved anew.

        Raises:
          CorruptCheckpointError: if none is sound, with the reason for each.
          ModelError: if the newest sound one does not fit.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                return step, *self.restore(step, abstract_state)
            except CorruptCheckpointError as error:
                reasons.append(str(error))
                self._put_aside(step)
                if self._orbax is not None:
                    self._orbax.reload()
        told = "; ".join(reasons) or "there are no checkpoints"
        raise CorruptCheckpointError(f"{self.directory}: no checkpoint can be read: {told}")

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
            kept = dtype or stored.get(prefix + name, leaf).dtype
            wanted[prefix + name] = jax.ShapeDtypeStruct(leaf.shape, kept, sharding=place)
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
            self._let_go()

    def _let_go(self) -> None:
        orbax, self._orbax = self._orbax, None
        if orbax is not None:
            with contextlib.suppress(OSError, ValueError):  # a save that failed, told once more
                orbax.close()

    def _contents(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint says it holds, once its files are known to be sound."""
        steps, orbax = self.steps(), self._orbax
        if orbax is None or step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"{self.directory}: no checkpoint of step {step}; there are: {have}")
        checksums.verify(self.directory / str(step))
        found = self._read(step, lambda: orbax.checkpointables_metadata(step))
        stored, meta = found.metadata.get(_STATE), found.custom_metadata
        if stored is None or meta is None:
            folder = self.directory / str(step)
            raise CorruptCheckpointError(f"{folder}: damaged: its list of arrays cannot be read")
        return dict(stored), dict(meta)

    def _load(self, step: int, wanted: dict[str, Any], partial: bool = False) -> dict[str, Array]:
        orbax = self._orbax
        assert orbax is not None
        context = ocp.Context()
        context.pytree_options.loading.partial_load = partial
        with context:
            read = lambda: orbax.load_checkpointables(step, {_STATE: wanted})
            return self._read(step, read)[_STATE]

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # a truncated file is a bare Exception
            if "RESOURCE_EXHAUSTED" in str(error):
                raise  # too little memory is not damage
            raise CorruptCheckpointError(
                f"{self.directory / str(step)}: cannot be read: {_reason(error)}"
            ) from error

    def _put_aside(self, step: int) -> None:
        if self._keep_latest is not None and jax.process_index() == 0:
            aside = self.directory / BAD
            aside.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(aside / f"{step}-{time.time_ns()}")

    def _put_aside_damaged(self) -> int:
        """Puts every checkpoint aside whose files are not as they were written; how many."""
        damaged = 0
        for folder in [one for one in self.directory.iterdir() if one.name.isdecimal()]:
            try:
                checksums.verify(folder)
            except CorruptCheckpointError:
                self._put_aside(int(folder.name))
                damaged += 1
        return damaged


def _preservation(keep_latest: int | None, keep_best: int) -> Any:
    """What stays after a save: the newest and the best; a reader removes nothing."""
    policies = ocp.training.preservation_policies
    if keep_latest is None:
        return policies.PreserveAll()
    # Orbax by itself would rank a NaN above all, and keep what has no metrics for ever.
    best = policies.BestN(get_metric_fn=_rank, n=keep_best, keep_checkpoints_without_metrics=False)
    return policies.AnyPreservationPolicy([policies.LatestN(keep_latest), best])


def _finish(response: Any, folder: pathlib.Path) -> None:
    """Waits for a save in the background, then writes its checksums."""
    response.result()
    # Keeping only better ones may have removed it already.
    if jax.process_index() == 0 and folder.is_dir():
        checksums.write(folder)


def _rank(metrics: Mapping[str, Any] | None) -> float:
    """Larger is better; what cannot be compared is never better than anything."""
    rank = (metrics or {}).get("rank")
    return -math.inf if rank is None else float(rank)


def _reason(error: BaseException) -> str:
    """What the operating system says, where an error wraps it; else the error's first line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return f"{os.strerror(int(code[1]))} (errno {code[1]})"
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
