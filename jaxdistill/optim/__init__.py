"""The optimizer's side: knobs as transforms with state, schedules, masks, and the chain."""

from jaxdistill.optim.balance import balance
from jaxdistill.optim.ema import average, ema
from jaxdistill.optim.optimizer import learning_rate, optimizer
from jaxdistill.optim.schedules import knob, knobs, schedule
from jaxdistill.optim.sparsity import sparsity
from jaxdistill.optim.taid import taid

__all__ = [
    "average",
    "balance",
    "ema",
    "knob",
    "knobs",
    "learning_rate",
    "optimizer",
    "schedule",
    "sparsity",
    "taid",
]
