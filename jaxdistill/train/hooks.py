"""What a caller can hand into a run: a call at named points, other batches, another loss."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdistill.types import Batch

# Where a run calls `Hooks.at`, in the order in which a step comes by.
POINTS = (
    "rollout.before",  # the student is about to write answers
    "rollout.call",  # a call of the decoder has made some tokens of them
    "rollout.after",  # all are written, and not yet in a batch
    "rollout.scored",  # a teacher that is served has scored them, which is on the disk
    "rollout.judging",  # verifiers have judged them, and nothing of it is on the disk
    "rollout.judged",  # their rewards are on the disk, and no update has learned from them
    "step.before",  # the batch is there, the step is not dispatched
    "step.after",  # the step is dispatched, its numbers are not read
    "metrics.append",  # a record is about to be written
    "metrics.appended",  # it is written, and not yet forced to the disk
    "checkpoint.begin",  # the state is about to be copied to the host
    "checkpoint.copied",  # it is copied, and being written in the background
    "checkpoint.seal",  # all arrays are written, their checksums are not
    "checkpoint.commit",  # sealed, and not yet given its name
    "checkpoint.committed",  # named; older ones are not yet removed
    "checkpoint.remove",  # an older one has lost its name, its files are there
    "metrics.cut",  # a resumed run has not yet cut the records of lost steps off
    "eval.before",  # the step is known to be sound and not yet evaluated
)


class Hooks:
    """Does nothing and changes nothing; a subclass overrides what it wants to do.

    >>> class Count(Hooks):
    ...     steps = 0
    ...
    ...     def at(self, point):
    ...         self.steps += point == "step.after"
    >>> hooks = Count()
    >>> hooks.at("step.before"), hooks.at("step.after"), hooks.steps
    (None, None, 1)
    """

    # Name -> function(prompt, answer, record) -> a reward, or None: see `reasoning.judging`.
    verifiers: Mapping[str, Callable[..., float | None]] = types.MappingProxyType({})

    def at(self, point: str) -> None:
        """Is called at every one of `POINTS`, some of them in the thread that writes checkpoints.

        An OSError is handled as one of the operating system at that place.
        """

    def batch(self, index: int, batch: Batch) -> Batch:
        """The batch that training reads in place of batch `index`."""
        return batch

    def loss(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The loss that the training step is compiled with in place of the method's."""
        return loss


class WithVerifiers(Hooks):
    """Hooks, and verifiers beside them."""

    def __init__(self, hooks: Hooks, verifiers: Mapping[str, Callable[..., float | None]]):
        self.at, self.batch, self.loss = hooks.at, hooks.batch, hooks.loss
        self.verifiers = {**hooks.verifiers, **verifiers}


NO_HOOKS = Hooks()
