"""What the compiled step of a run asks of a device: memory by kind, work, traffic, least time."""

from jaxdistill.plan.cost import Cost, cost
from jaxdistill.plan.describe import describe
from jaxdistill.plan.memory import argument_bytes, host_bytes, local_bytes, temporary_bytes

__all__ = [
    "Cost",
    "argument_bytes",
    "cost",
    "describe",
    "host_bytes",
    "local_bytes",
    "temporary_bytes",
]
