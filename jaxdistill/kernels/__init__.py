"""Fused operations: one definition, one API, exact in value and gradient."""

from jaxdistill.kernels.choice import support
from jaxdistill.kernels.divergence import divergence
from jaxdistill.kernels.linear_divergence import linear_divergence

__all__ = ["divergence", "linear_divergence", "support"]
