"""When a checkpoint is due, and what a run does that cannot write one."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jaxdistill.errors import StorageError
from jaxdistill.train.checkpoint import Checkpoints

# However rare checkpoints are: a run that is killed often must still get somewhere.
FIRST_SHARE, FIRST_SECONDS = 0.01, 120.0
RETRY_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class SaveSchedule:
    """When to save; None is never, and the last step is always saved.

    Attributes:
      steps, minutes: whichever comes first.
      max_unsaved_minutes: how long training continues while no checkpoint can be written.
    """

    steps: int | None
    minutes: float | None
    max_unsaved_minutes: float


class Saver:
    """Saves by a schedule.

    The first save after every start comes after 1 % of the run's steps or two minutes. A save that
    fails is reported, and tried again a minute later; the checkpoints before it stand meanwhile.

    Args:
      checkpoints: where to.
      schedule: when.
      first: the step that the run has come to.
      last: the step to end with.
      failed: called with the error of a save that failed, before training continues.
      clock: seconds, of a clock that never goes back.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        schedule: SaveSchedule,
        first: int,
        last: int,
        failed: Callable[[StorageError], Any],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._checkpoints, self._schedule, self._last = checkpoints, schedule, last
        self._failed, self._clock = failed, clock
        # When the last save began that is known to be complete, and the last one at all.
        self._safe = self._tried = clock()
        self._early = first + max(1, math.ceil(FIRST_SHARE * last))
        self._wait = min(FIRST_SECONDS, 60 * (schedule.minutes or math.inf))

    def due(self, number: int) -> bool:
        """Whether the state after this step is to be saved, by its number."""
        by_steps = bool(self._schedule.steps and number % self._schedule.steps == 0)
        return number == self._last or number == self._early or by_steps

    def overdue(self) -> bool:
        """Whether it is time for a save, by this process's clock; stands until there is one."""
        return self._clock() - self._tried >= self._wait

    def save(
        self,
        number: int,
        state: Any,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
        final: bool,
        beside: Mapping[str, Any] = MappingProxyType({}),
    ) -> bool:
        """Saves in the background, or notes that it cannot; whether the save is on its way.

        Args:
          number: the step.
          state: as for `Checkpoints.save`.
          meta: as for `Checkpoints.save`.
          metrics: as for `Checkpoints.save`.
          final: nothing comes after this one: waits for it, and tries twice.
          beside: as for `Checkpoints.save`.

        Raises:
          StorageError: if there has been no checkpoint for too long, or none at the end.
        """
        before, self._tried = self._tried, self._clock()
        self._wait = 60 * (self._schedule.minutes or math.inf)

        def attempt() -> None:
            self._checkpoints.save(number, state, meta, metrics, beside)
            if final:
                self._checkpoints.wait()

        try:
            attempt()
        except StorageError as error:  # of this save, or of the one before
            self._note(error)
            if not final:
                return False
            attempt()
        self._safe = before
        return True

    def settled(self) -> bool:
        """Waits for the save on its way; False where it failed.

        Raises:
          StorageError: as `save`.
        """
        try:
            self._checkpoints.wait()
        except StorageError as error:
            self._note(error)
            return False
        return True

    def poll(self) -> None:
        """Notes early that the save in the background has failed.

        Raises:
          StorageError: as `save`.
        """
        try:
            self._checkpoints.poll()
        except StorageError as error:
            self._note(error)

    def _note(self, error: StorageError) -> None:
        now = self._clock()
        self._tried, self._wait = now, RETRY_SECONDS
        unsaved = (now - self._safe) / 60
        if unsaved > self._schedule.max_unsaved_minutes:
            raise StorageError(
                f"{error}. Nothing could be saved for {unsaved:.0f} minutes "
                "(checkpoint.max_unsaved_minutes)"
            ) from error
        self._failed(error)
