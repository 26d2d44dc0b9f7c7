"""DistiLLM's adaptive share: how often the student's text is met, and how often old text of it."""

import bisect
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdistill.data.prompts import Prompt
from jaxdistill.rollouts import answers as records
from jaxdistill.rollouts.answers import Answer

META = "replay"  # in a checkpoint's meta: the threshold and the loss that it was raised at
LOSS = "eval/loss"
_LARGEST = 1.0


@dataclasses.dataclass(frozen=True)
class ReplaySettings:
    """How the share adapts; `config.rollout.Replay` has DistiLLM's numbers.

        validation   where loss >= previous + tolerance: phi += rise, at most 1; previous = loss
        rho          decreasing: phi (1 - u / U); increasing: phi u / U; constant: phi / 2
        update u     writes where r < rho, or r < phi and the buffer is not full;
                     meets old answers where r < phi; else given text, r drawn from [0, 1)

    Attributes:
      capacity: answers that the buffer holds; the oldest go first.
      schedule: of rho.
      start: phi of the first update.
      updates: U, of the run.
      rise, tolerance: of a validation.

    Reference: Ko et al. 2024, arXiv 2402.03898, and its code.
    """

    capacity: int
    schedule: str
    start: float
    updates: int
    rise: float
    tolerance: float

    def fresh(self, phi: float, update: int) -> float:
        """rho, the share of updates whose answers are written anew."""
        done = min(update / self.updates, 1.0)
        by = {"decreasing": 1 - done, "increasing": done, "constant": 0.5}
        return phi * by[self.schedule]


class ReplayBuffer:
    """The buffer of answers and the threshold phi, as they were at any update that may come again.

    Args:
      settings: how it adapts.
      seed: of the run.
      recalled: answers beyond the capacity that are kept, because the run may go back.
    """

    def __init__(self, settings: ReplaySettings, seed: int, recalled: int):
        self.settings, self._seed, self._recalled = settings, seed, recalled
        self.begin({}, None, lambda place: None)  # pyrefly: ignore

    def begin(
        self,
        meta: Mapping[str, Any],
        stored: Mapping[str, Any] | None,
        prompt_at: Callable[[int], Prompt],
    ) -> None:
        """Starts from what `kept` and `packed` gave, or from the start, where both are empty."""
        own = meta.get(META, {"phi": self.settings.start, "previous": None})
        # From which update on what holds, and after which update an answer was there.
        self._marks: list[tuple[int, float, float | None]] = [(-1, own["phi"], own["previous"])]
        old = records.unpacked(stored, prompt_at) if stored else []
        self._answers: list[tuple[int, Answer]] = [(-1, one) for one in old]

    def kept(self, update: int) -> dict[str, Any]:
        """What a checkpoint's meta keeps whose next update is this one."""
        _, phi, previous = self._mark(update)
        return {META: {"phi": phi, "previous": previous}}

    def packed(self, update: int) -> dict[str, Any] | None:
        """The buffer before an update, as JSON can hold it; None where it is empty."""
        buffer = self._buffer(update)
        return records.packed(buffer) if buffer else None

    def forget(self, update: int) -> None:
        """The run is at this update: what came later is not known yet."""
        self._marks = [mark for mark in self._marks if mark[0] <= update]
        self._answers = [one for one in self._answers if one[0] < update]

    def push(self, update: int, answers: Sequence[Answer]) -> None:
        """Adds the answers of an update, before which `forget` was called."""
        self._answers += [(update, one) for one in answers]
        self._answers = self._answers[-(self.settings.capacity + self._recalled) :]

    def evaluated(self, update: int, loss: float) -> None:
        """Hears the validation loss before an update; the first one is what others are held to."""
        if not math.isfinite(loss):
            return
        _, phi, previous = self._mark(update - 1)
        if previous is None:
            previous = loss
        elif loss >= previous + self.settings.tolerance:
            phi, previous = min(phi + self.settings.rise, _LARGEST), loss
        self._marks = [mark for mark in self._marks if mark[0] < update]
        self._marks.append((update, phi, previous))

    def phi(self, update: int) -> float:
        """The threshold at an update."""
        return self._mark(update)[1]

    def writes(self, update: int, r: float) -> bool:
        """Whether the answers of an update are written anew; r is its draw."""
        phi = self.phi(update)
        full = len(self._buffer(update)) >= self.settings.capacity
        return r < self.settings.fresh(phi, update) or (r < phi and not full)

    def meets(self, update: int, r: float) -> bool:
        """Whether an update meets the student's text, written anew or old."""
        return r < self.phi(update)

    def drawn(self, update: int, count: int) -> list[Answer]:
        """Different answers out of the buffer before an update, each as likely as another."""
        buffer = self._buffer(update)

        def lot(number: int) -> bytes:
            name = f"{self._seed} rollout.replay {update} {number}"
            return hashlib.blake2b(name.encode(), digest_size=8).digest()

        return [buffer[number] for number in sorted(range(len(buffer)), key=lot)[:count]]

    def _mark(self, update: int) -> tuple[int, float, float | None]:
        """What holds at an update."""
        place = bisect.bisect_right([mark[0] for mark in self._marks], update)
        return self._marks[max(place - 1, 0)]

    def _buffer(self, update: int) -> list[Answer]:
        """The answers that are there before an update, the oldest first."""
        there = [answer for since, answer in self._answers if since < update]
        return there[-self.settings.capacity :]
