"""Fused operations: one definition, one API, exact in value and gradient."""

from jaxdistill.kernels.linear_divergence import linear_divergence

__all__ = ["linear_divergence"]
