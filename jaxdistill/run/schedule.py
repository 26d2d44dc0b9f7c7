"""What a change of a run's length or rate does to the learning rate, said before it happens."""

import json
import sys
from collections.abc import Mapping

import numpy as np

from jaxdistill.config import Config
from jaxdistill.run import setup
from jaxdistill.run.folder import RunDir

_STEPS = "config.train.steps"
_OPTIMIZER = ("lr", "schedule", "warmup", "end_lr_ratio")


def tell(run: RunDir, config: Config, changed: Mapping[str, str | None], step: int) -> None:
    """Says how the learning rate of the next step changes; nothing where it does not.

    Args:
      run: gets an event.
      config: the new one.
      changed: fact -> its value before, as `changes.check` returns it.
      step: the one that the run has come to.
    """
    old = _before(config, changed)
    if old is None or not step:
        return
    rates = [float(np.asarray(setup.learning_rate_of(one)(step))) for one in (old, config)]
    steps = f"{old.train.steps} -> {config.train.steps} steps"
    text = (
        f"step {step}: {steps}, {config.optimizer.schedule} schedule: the learning rate goes from "
        f"{rates[0]:.4g} to {rates[1]:.4g}, and every schedule of the method runs over the new "
        "number of steps"
    )
    run.event("schedule", step=step, before=rates[0], after=rates[1], steps=steps)
    print(text, file=sys.stderr)


def _before(config: Config, changed: Mapping[str, str | None]) -> Config | None:
    """The configuration as it was, as far as the learning rate depends on it; None: the same."""
    names = {f"config.optimizer.{name}": name for name in _OPTIMIZER}
    optimizer = {
        names[name]: json.loads(value) for name, value in changed.items() if name in names and value
    }
    before = changed.get(_STEPS)
    steps = {"steps": json.loads(before)} if before else {}
    if not optimizer and not steps:
        return None
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=steps),
            "optimizer": config.optimizer.model_copy(update=optimizer),
        }
    )
