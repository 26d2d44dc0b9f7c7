"""From a configuration to a finished run: the doors that commands and scripts go through."""

from jaxdistill.engine.evaluation import evaluate
from jaxdistill.engine.export import export, load
from jaxdistill.engine.run import RunResult, distill, resume, train
from jaxdistill.engine.setup import build

__all__ = ["RunResult", "build", "distill", "evaluate", "export", "load", "resume", "train"]
