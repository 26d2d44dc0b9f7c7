"""What a change of a run's length or rate does to it, said before it happens."""

import json
import sys
from collections.abc import Collection, Mapping

import numpy as np

from jaxdistill.config.optimizer import Optimizer
from jaxdistill.errors import ConfigError
from jaxdistill.run import run_table, setup
from jaxdistill.run.folder import RunDir

_STEPS = "config.train.steps"
_OPTIMIZER = ("lr", "schedule", "warmup", "end_lr_ratio")


def check(run: RunDir, steps: int, changed: Collection[str], step: int) -> None:
    """Refuses other settings of a training without a step left, which would only be said to hold.

    Args:
      run: whose student is trained.
      steps: of the run from here on.
      changed: the facts that have changed.
      step: the one that the run has come to.

    Raises:
      ConfigError: naming what has changed.
    """
    late = [name.removeprefix("config.") for name in changed if run_table.trains(name)]
    if late and step >= steps:
        raise ConfigError(
            f"{run.path}: all {steps} steps are trained, none would use the new {', '.join(late)}: "
            f"leave it as it was, or train longer: `jaxdistill resume {run.path} train.steps=N`"
        )


def tell(
    run: RunDir, optimizer: Optimizer, steps: int, changed: Mapping[str, str | None], step: int
) -> None:
    """Reports how the learning rate of the next step changes; nothing where it does not.

    Args:
      run: gets an event.
      optimizer: its options from here on.
      steps: of the run from here on.
      changed: fact -> its value before, as `changes.check` returns it.
      step: the one that the run has come to.
    """
    before = _before(optimizer, steps, changed)
    if before is None or not step:
        return
    both = (before, (optimizer, steps))
    rates = [float(np.asarray(setup.learning_rate_of(*one)(step))) for one in both]
    longer = before[1] != steps
    lengths = f"{before[1]} -> {steps} steps" if longer else f"{steps} steps"
    text = (
        f"step {step}: {lengths}, {optimizer.schedule} schedule: the learning rate goes from "
        f"{rates[0]:.4g} to {rates[1]:.4g}"
    )
    if longer:
        text += ", and every schedule of the method runs over the new number of steps"
    run.event("schedule", step=step, before=rates[0], after=rates[1], steps=lengths)
    print(text, file=sys.stderr)


def _before(
    optimizer: Optimizer, steps: int, changed: Mapping[str, str | None]
) -> tuple[Optimizer, int] | None:
    """What the learning rate depended on before the change; None: on the same."""
    names = {f"config.optimizer.{name}": name for name in _OPTIMIZER}
    options = {
        names[name]: json.loads(value) for name, value in changed.items() if name in names and value
    }
    before = changed.get(_STEPS)
    if not options and not before:
        return None
    return optimizer.model_copy(update=options), json.loads(before) if before else steps
