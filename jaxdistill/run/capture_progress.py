"""Tells how far a capture is: positions, bytes, and the time that is left."""

import logging
import time

log = logging.getLogger(__name__)

_EVERY = 10.0  # seconds between lines


class CaptureProgress:
    """Tells how far a capture is, now and then."""

    def __init__(self, positions: int):
        self._all, self._done, self._bytes = positions, 0, 0
        self._began = self._told = time.monotonic()

    def add(self, positions: int) -> None:
        """Some positions were answered."""
        self._done += positions
        now = time.monotonic()
        if now - self._told >= _EVERY or self._done == self._all:
            self._told, spent = now, now - self._began
            left = spent * (self._all - self._done) / self._done
            log.info(
                "captured %d of %d positions, %.1f MB, %.0f/s, %.0f s left",
                self._done, self._all, self._bytes / 1e6, self._done / max(spent, 1e-9), left,
            )  # fmt: skip

    def wrote(self, size: int) -> None:
        """A part is on disk."""
        self._bytes += size
