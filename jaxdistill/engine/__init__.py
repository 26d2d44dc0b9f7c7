"""From a configuration to a finished run: the doors that commands and scripts go through."""

from jaxdistill.engine.export import export, export_adapters, load, quantize
from jaxdistill.engine.planning import plan
from jaxdistill.engine.pruning import importance, prune, pruning_note
from jaxdistill.engine.run import RunResult, distill, resume, train
from jaxdistill.engine.setup import build
from jaxdistill.engine.workflow import plan as workflow_plan
from jaxdistill.engine.workflow import workflow as run_workflow
from jaxdistill.evaluate.comparison import compare_models
from jaxdistill.evaluate.harness import adapter, harness
from jaxdistill.evaluate.perplexity import evaluate

__all__ = [
    "RunResult",
    "adapter",
    "build",
    "compare_models",
    "distill",
    "evaluate",
    "export",
    "export_adapters",
    "harness",
    "importance",
    "load",
    "plan",
    "prune",
    "pruning_note",
    "quantize",
    "resume",
    "run_workflow",
    "train",
    "workflow_plan",
]
