"""Who hears a run: the trackers of its configuration, and the callbacks that were handed in."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdistill import agree, errors
from jaxdistill.callbacks import Broadcast, Callback, Start, build_trackers
from jaxdistill.config import trackers
from jaxdistill.config.schema import Logging
from jaxdistill.errors import ConfigError
from jaxdistill.run.folder import RunDir
from jaxdistill.safe.redact import redacted

KEPT = "callbacks"  # in RUN.json: what each of them keeps from one attempt to the next


def check(logging: Logging, callbacks: Sequence[Callback]) -> None:
    """Raises ConfigError where a callback is none, or the client of a tracker is not installed."""
    errors.check(trackers.missing(logging))
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks: {callback!r}: is no callback: give objects of subclasses of "
                "jaxdistill.Callback"
            )


def broadcast(logging: Logging, run: RunDir, callbacks: Sequence[Callback]) -> Broadcast:
    """All that hear this run, which `check` knows; in one process of it, the others have none."""

    def notice(text: str) -> None:
        print(text, file=sys.stderr)
        run.event("callback_failed", reason=text)

    named: dict[str, Callback] = {}
    if agree.leads():
        named |= build_trackers(logging, notice)
        named |= {f"{type(one).__name__}.{i}": one for i, one in enumerate(callbacks)}
    return Broadcast(named, notice)


@contextlib.contextmanager
def attempt(
    told: Broadcast, name: str, settings: Mapping[str, Any], run: RunDir, step: int
) -> Iterator[None]:
    """Reports the start and the end of an attempt, and keeps what callbacks want kept."""
    kept = dict(run.record.get(KEPT) or {})
    before = dict(kept)

    def start(own: Mapping[str, Any]) -> Start:
        options = redacted(settings)
        return Start(run.path, name, run.record["id"], options, step, own)

    with told.attempt(start, kept):
        if kept != before:
            run.update(**{KEPT: kept})
        yield
