"""What commands take: each set of options once, read by the command line, workflows and Python."""

from jaxdistill.commands.evaluate import Compare, EvalData, EvalRows, Evaluate, Harness, Tasks
from jaxdistill.commands.export import Export, Quantize, Quantized
from jaxdistill.commands.generate import Generate, Serve
from jaxdistill.commands.plan import Plan
from jaxdistill.commands.prune import Importance, Prune, Sizes
from jaxdistill.commands.teacher import Align, TeacherCache, TeacherVerify

__all__ = [
    "Align",
    "Compare",
    "EvalData",
    "EvalRows",
    "Evaluate",
    "Export",
    "Generate",
    "Harness",
    "Importance",
    "Plan",
    "Prune",
    "Quantize",
    "Quantized",
    "Serve",
    "Sizes",
    "Tasks",
    "TeacherCache",
    "TeacherVerify",
]
