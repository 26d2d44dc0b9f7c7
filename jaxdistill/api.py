"""From a configuration to a finished run: the doors that commands and scripts go through."""

from jaxdistill.compress.command import importance, prune, pruning_note
from jaxdistill.evaluate.comparison import compare_models
from jaxdistill.evaluate.harness import adapter, harness
from jaxdistill.plan.search import plan
from jaxdistill.run.evaluation import evaluate
from jaxdistill.run.export import (
    export,
    export_adapters,
    load,
    quantization_of,
    quantize,
    trained_for,
)
from jaxdistill.run.result import RunResult
from jaxdistill.run.session import distill, resume, train
from jaxdistill.run.setup import build
from jaxdistill.run.sweep import sweep
from jaxdistill.run.teacher_cache import capture
from jaxdistill.run.teacher_verify import verify as verify_captured
from jaxdistill.run.workflow import plan as workflow_plan
from jaxdistill.run.workflow import workflow as run_workflow

__all__ = [
    "RunResult",
    "adapter",
    "build",
    "capture",
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
    "quantization_of",
    "quantize",
    "resume",
    "run_workflow",
    "sweep",
    "train",
    "trained_for",
    "verify_captured",
    "workflow_plan",
]
