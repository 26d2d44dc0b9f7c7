"""Who hears what a run does: callbacks of one's own, and the trackers W&B, MLflow and trackio."""

from jaxdistill.callbacks.base import Callback, Ending, Start
from jaxdistill.callbacks.broadcast import CONTROL, Broadcast
from jaxdistill.callbacks.trackers import build_trackers

__all__ = ["CONTROL", "Broadcast", "Callback", "Ending", "Start", "build_trackers"]
